"""docs/scores.md and docs/verification.md are true: their programs run, and their numbers are the code's."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from avex_export.cases import _LENGTHS
from avex_export.verify import _KEPT_AUDIO
from avex_serve.bundles.manifest import MANIFEST
from avex_serve.bundles.reading import read_bundle
from avex_serve.calibration import fit
from avex_serve.calibration.scales import Calibration, Calibrator, LabelCalibration, Scale
from avex_serve.cli import main
from avex_serve.evidence import verify
from avex_serve.evidence.cases import read_evidence
from avex_serve.inference.scores import Selection, activate, score_scale
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.training.heads import MOST_WEIGHT
from tests.bundles import replace_file

DOCS = Path(__file__).parents[1] / "docs"
SCORES, VERIFICATION = ((DOCS / f"{name}.md").read_text() for name in ("scores", "verification"))


def table(page, first):
    """The rows of the table whose header begins so."""
    rows = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", page, re.MULTILINE).group(1).splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.fixture(scope="module")
def computed():
    """The names of the programs of the page about scores, which print what it shows."""
    names, blocks = {}, re.findall(r"```(python|text)\n(.*?)```", SCORES, re.DOTALL)
    for (_, program), (kind, shown) in zip(blocks[::2], blocks[1::2], strict=True):
        assert kind == "text"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "scores.md", "exec"), names)
        assert printed.getvalue() == shown
    return names


def test_scores_are_those_of_the_service(computed):
    logits = computed["logits"].astype(np.float32)
    for activation in ("sigmoid", "softmax"):
        np.testing.assert_allclose(computed[activation], activate(logits, activation), rtol=1e-6)
    scales = [re.fullmatch("`(.+)`", row[0])[1] for row in table(SCORES, "`score_scale`")]
    assert scales == [score_scale(activation) for activation in ("sigmoid", "softmax", "none")]


def test_probabilities_are_those_of_a_calibration(computed):
    scale = Scale(slope=0.5, offset=-1.5, slope_interval=(0, 1), offset_interval=(-2, -1))
    label = LabelCalibration(label="owl", with_sound=50, without_sound=50, recordings=9, scale=scale)
    calibrator = Calibrator.of(Calibration(target_precision=0.9, source="a test", labels=(label,)), "sigmoid")
    found = calibrator.probabilities(computed["scores"].astype(np.float32)[:, None])[:, 0]
    np.testing.assert_allclose(computed["probability"], found, rtol=1e-5)


def test_numbers_about_scores():
    needed = f"{fit.WITH_SOUND} windows with the sound, from {fit.RECORDINGS} recordings, and {fit.WITHOUT_SOUND}"
    assert needed in SCORES
    assert f"a weight of up to {MOST_WEIGHT:g}." in SCORES
    lowest = [Selection.of(activation, None, None).threshold for activation in ("sigmoid", "softmax", "none")]
    assert lowest == [0.5, 0.5, 0]
    assert "scores of at least 0.5; of raw logits, at least 0" in SCORES
    assert f"is right: {fit.TARGET}," in SCORES


@pytest.mark.parametrize("page", [SCORES, VERIFICATION], ids=["scores", "verification"])
def test_the_command_runs(page, capsys):
    (command,) = re.findall(r"```sh\n(.*?)\n```", page)
    program, *arguments = shlex.split(command.replace("export/bundles/my_probe", shlex.quote(str(DEMO_BUNDLE))))
    assert program == "avex-serve"
    assert main(arguments) == 0
    assert "sigmoid" in capsys.readouterr().out or page is VERIFICATION


def test_a_bundle_that_answers_otherwise(tmp_path, capsys):
    bundle = read_bundle(DEMO_BUNDLE)
    for name in (MANIFEST, *bundle.manifest.files):
        (tmp_path / name).write_bytes((DEMO_BUNDLE / name).read_bytes())
    graph = bytearray((tmp_path / "model.onnx").read_bytes())
    middle = len(graph) // 2
    graph[middle : middle + 4000] = bytes(4000)  # some weights are zero
    (tmp_path / "model.onnx").write_bytes(graph)
    assert main(["verify", str(tmp_path)]) != 0  # by its digest
    assert "sha256" in capsys.readouterr().err.lower()
    replace_file(tmp_path, "model.onnx", bytes(graph))
    code = int(re.search(r"answers as your probe does\. (\d+) says", VERIFICATION)[1])
    assert main(["verify", str(tmp_path)]) == code
    assert "✗" in capsys.readouterr().out


def test_the_cases_are_those_of_the_page():
    record, cases = read_evidence(read_bundle(DEMO_BUNDLE))
    named = [name for row in table(VERIFICATION, "input") for name in re.findall("`(.+?)`", row[0])]
    assert named == [case.name.partition(":")[0] for case in cases]
    assert [check.passed for check in record.checks] == [True] * len(record.checks)
    assert f"half a window, of one, and of {_LENGTHS['long']:g}, run" in VERIFICATION
    assert [_LENGTHS["short"], _LENGTHS["exact"]] == [0.5, 1.0]


def test_numbers_about_verification():
    limits = dict(table(VERIFICATION, "graph"))
    assert float(limits["float32"]) == verify.TOLERANCE
    assert float(limits["half precision, on CUDA"]) == verify._HALF_TOLERANCE
    assert verify._INT8_FACTOR == 2
    assert f"twice the error at the export, plus {verify._INT8_SLACK:.0e}".replace("e-03", "e-3") in limits["int8"]
    assert f"at most {verify._NOISE_FACTOR:g} times the module's own" in VERIFICATION
    assert f"at most {_KEPT_AUDIO // 2**20} MiB of recordings" in VERIFICATION
