"""The first answer of a bundle on this machine, compared with what its evidence says."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve.bundles.manifest import EVIDENCE, VERIFICATION
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.errors import BundleError, InputError, VerificationError
from avex_serve.evidence.cases import Case, read_evidence
from avex_serve.evidence.first import VARIABLE, open_checked
from avex_serve.inference.onnx import OnnxBackend
from tests.bundles import (
    SAMPLE_RATE,
    WINDOW,
    make_embedding_bundle,
    make_measuring_bundle,
    proven,
    replace_file,
    weights,
    with_evidence,
)

SHORTEST = WINDOW // 4
AVEX_SERVE = Path(sys.executable).with_name("avex-serve")


@pytest.fixture
def bundle(tmp_path, audio_bundle):
    """A bundle of this test alone, without evidence."""
    return shutil.copytree(audio_bundle, tmp_path / "bundle")


@pytest.fixture
def asked(monkeypatch):
    """The shapes of the batches that onnxruntime gets."""
    shapes, run = [], OnnxBackend.run

    def noted(self, *inputs):
        shapes.append(inputs[0].shape)
        return run(self, *inputs)

    monkeypatch.setattr(OnnxBackend, "run", noted)
    return shapes


def opens(bundle, **options):
    with open_checked(bundle, **options) as engine:
        return engine.warnings


def test_one_clip_is_enough(bundle, asked, caplog):
    assert opens(proven(bundle)) == ()
    assert asked == [(1, WINDOW)]
    assert not caplog.records


def test_other_answers_are_refused(bundle):
    proven(bundle, off=2e-4)
    with pytest.raises(VerificationError) as caught:
        opens(bundle)
    message = str(caught.value)
    assert "bundle tiny, version 1, answers otherwise than its evidence (onnx on cpu): " in message
    assert "for 'noise', 1 at once: off by " in message
    assert "expected at most 1.0e-04" in message
    assert f"`avex-serve verify {bundle}` shows more" in message
    assert message.endswith("AVEX_CHECK=warn uses it nevertheless")
    assert main(["verify", str(bundle)]) == 5


def test_a_warning_in_each_answer_instead(bundle, caplog):
    proven(bundle, off=1e-2)
    with open_checked(bundle, mode="warn") as engine:
        (warning,) = engine.warnings
        assert engine.predict(np.zeros(WINDOW, np.float32), SAMPLE_RATE).warnings == (warning,)
    assert [(each.levelname, each.message) for each in caplog.records] == [("WARNING", warning)]


def test_nothing_is_compared_with_silence(bundle, asked, caplog):
    assert opens(proven(bundle, off=1e-2), mode="off") == ()
    assert asked == [(1, WINDOW)]
    assert not caplog.records


def test_a_bundle_without_evidence_says_so_once(bundle, asked, caplog):
    caplog.set_level(logging.INFO, "avex_serve")
    assert opens(bundle) == ()
    assert asked == [(1, WINDOW)]
    assert caplog.messages == ["bundle tiny carries no evidence: its first answer isn't compared"]


@pytest.mark.parametrize("filled", [0.0, np.nan, 1e30])
def test_an_engine_that_leaves_its_output_unfilled(bundle, monkeypatch, filled):
    run = OnnxBackend.run
    empty = lambda self, *inputs: {n: np.full_like(v, filled) for n, v in run(self, *inputs).items()}  # noqa: E731
    monkeypatch.setattr(OnnxBackend, "run", empty)
    said = "not finite, or of another shape" if np.isnan(filled) else r"off by \d"
    with pytest.raises(VerificationError, match=said):
        opens(proven(bundle))


def test_a_second_shape_of_clips_of_any_length(tmp_path, monkeypatch, asked):
    """OpenVINO answered rightly for its first shape and not for the next one."""
    bundle = make_measuring_bundle(tmp_path / "bundle", shortest=SHORTEST)
    (matrix,) = (each.astype(np.float64) for each in weights(bundle) if each.ndim == 2)
    random, cases = np.random.default_rng(0), []
    for name, samples in (("noise", WINDOW), ("longer", 2 * WINDOW), ("shortest", SHORTEST)):
        clips = random.integers(-3000, 3000, (3, samples)).astype(np.float32) / 32768
        sums, count = (clips.astype(np.float64), clips.astype(np.float64) ** 2), np.full(3, float(samples))
        embedding = np.stack([*(each.sum(axis=1) for each in sums), count, count], axis=1)
        answers = {"logits": embedding @ matrix, "embedding": embedding}
        eager = {name: value.astype(np.float32) for name, value in answers.items()}
        cases.append(Case(name, clips, None, (1, 3), None, eager, answers))
    with_evidence(bundle, *cases)
    opens(bundle)
    assert asked == [(1, WINDOW), (1, SHORTEST)]

    run, first = OnnxBackend.run, []

    def right_once(self, *inputs):
        first.append(inputs[0].shape)
        return {name: value * (inputs[0].shape == first[0]) for name, value in run(self, *inputs).items()}

    monkeypatch.setattr(OnnxBackend, "run", right_once)
    with pytest.raises(VerificationError, match="for 'shortest', 1 at once"):
        opens(bundle)


def test_a_bundle_of_embeddings(tmp_path):
    bundle = make_embedding_bundle(tmp_path / "bundle")
    (matrix,) = weights(bundle)
    rows = np.random.default_rng(0).normal(size=(3, len(matrix))).astype(np.float32)
    for off, refused in ((0.0, False), (1e-2, True)):
        answers = {"logits": (rows @ matrix + off).astype(np.float32)}
        with_evidence(bundle, Case("noise", rows, None, (1, 3), None, answers, None))
        if refused:
            with pytest.raises(VerificationError, match="logits for 'noise'"):
                opens(bundle)
        else:
            assert opens(bundle) == ()


def test_cases_that_are_not_asked_for_stay_on_the_disk(bundle):
    """Those behind the first one are not even there, which reading all of them finds out."""
    proven(bundle)
    _, (case,) = read_evidence(read_bundle(bundle))
    with_evidence(bundle, case, case)
    with np.load(bundle / EVIDENCE) as stored:
        kept = {name: stored[name] for name in stored if name.startswith("0/")}
    np.savez_compressed(bundle / "kept.npz", **kept)
    content = (bundle / "kept.npz").read_bytes()
    (bundle / "kept.npz").unlink()
    replace_file(bundle, EVIDENCE, content)
    opens(bundle)
    with pytest.raises(BundleError, match="can't be read"):
        read_evidence(read_bundle(bundle))


def test_damaged_evidence_proves_nothing(bundle):
    replace_file(proven(bundle), VERIFICATION, b"{}")
    for mode in ("on", "warn"):
        with pytest.raises(BundleError, match="evidence version None"):
            opens(bundle, mode=mode)
    opens(bundle, mode="off")


def test_the_setting_is_on_warn_or_off(bundle, monkeypatch):
    monkeypatch.setenv(VARIABLE, "of")
    with pytest.raises(InputError, match="AVEX_CHECK is 'of'; expected on, warn or off"):
        opens(bundle)


def test_a_run_over_an_archive(bundle, tmp_path, monkeypatch, capsys):
    proven(bundle, off=1e-2)
    soundfile.write(tmp_path / "a.wav", np.zeros(WINDOW, np.float32), SAMPLE_RATE)
    command = ["run", str(bundle), str(tmp_path / "a.wav"), "--out", str(tmp_path / "out"), "--progress", "none"]
    assert main(command) == VerificationError.exit_code
    assert "answers otherwise than its evidence" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(VARIABLE, "warn")
    done = subprocess.run([AVEX_SERVE, *command], capture_output=True, text=True, check=True)
    assert done.stderr.count("answers otherwise than its evidence") == 1
    assert "1 computed, 0 known, 0 failed" in done.stdout
