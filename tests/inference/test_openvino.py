"""The graph of a bundle in OpenVINO: asked for by name, never chosen, and an error where it can't run."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.bundles.manifest import ONNX, TORCHSCRIPT
from avex_serve.cli import main
from avex_serve.errors import BundleError, DependencyError, InputError, VerificationError
from avex_serve.evidence.first import open_checked
from avex_serve.service.settings import DEMO_BUNDLE as DEMO
from tests.bundles import SAMPLE_RATE, copy_bundle, make_embedding_bundle, make_measuring_bundle, replace_file

RECORDING = 0.1 * np.random.default_rng(0).standard_normal(12 * SAMPLE_RATE).astype(np.float32)


@pytest.fixture
def installed():
    pytest.importorskip("openvino")


def test_it_answers_as_onnxruntime(installed):
    with open_bundle(DEMO) as expected, open_checked(DEMO, runtime="openvino", mode="on") as served:
        assert (served.backend.format, served.backend.device, served.warnings) == ("openvino", "cpu", ())
        rate = expected.audio_spec.sample_rate
        right = expected.infer_recording(RECORDING, rate)
        found = served.infer_recording(RECORDING, rate)
        assert len(right["logits"]) > 3
        for name, value in right.items():
            np.testing.assert_allclose(found[name], value, atol=1e-4 * max(1, np.abs(value).max()))


def test_rows_lengths_masks_and_threads(installed, tmp_path):
    bundle = make_measuring_bundle(tmp_path / "bundle", shortest=SAMPLE_RATE // 100)
    random = np.random.default_rng(1)
    shapes = [(3, 900), (1, 400), (2, 900), (1, 1600), (5, 200), (1, 900)] * 10
    batches = [random.uniform(-0.5, 0.5, shape).astype(np.float32) for shape in shapes]
    masks = [random.uniform(size=batch.shape) < 0.3 for batch in batches]
    with open_bundle(bundle) as right, open_bundle(bundle, runtime="openvino", threads=2) as served:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(served.backend.run, batches, masks))
        for batch, mask, found in zip(batches, masks, answers, strict=True):
            for name, value in right.backend.run(batch, mask).items():
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


def test_a_bundle_of_embeddings(installed, tmp_path):
    bundle = make_embedding_bundle(tmp_path / "bundle")
    with open_bundle(bundle) as right, open_bundle(bundle, runtime="openvino") as served:
        rows = np.random.default_rng(2).normal(size=(4, right.manifest.inputs[0].shape[1])).astype(np.float32)
        np.testing.assert_allclose(served.infer(rows)["logits"], right.infer(rows)["logits"], atol=1e-5)


def test_an_answer_that_differs_from_the_evidence_is_refused(installed, monkeypatch):
    from avex_serve.inference.openvino import OpenvinoBackend

    run = OpenvinoBackend.run
    wrong = lambda self, *inputs: {name: value + 0.1 for name, value in run(self, *inputs).items()}  # noqa: E731
    monkeypatch.setattr(OpenvinoBackend, "run", wrong)
    with pytest.raises(VerificationError, match=r"\(openvino on cpu\): .* --runtime openvino` shows more"):
        open_checked(DEMO, runtime="openvino", mode="on")


def test_a_graph_that_it_cannot_load(installed, tmp_path, audio_bundle):
    bundle = replace_file(copy_bundle(audio_bundle, tmp_path / "bundle"), ONNX, b"no graph")
    with pytest.raises(BundleError, match="OpenVINO can't load"):
        open_bundle(bundle, runtime="openvino")


def test_the_command_line(installed, capsys, tmp_path):
    import soundfile

    recording = tmp_path / "noise.wav"
    soundfile.write(recording, RECORDING[: 4 * SAMPLE_RATE], SAMPLE_RATE)
    documents = []
    for options in ([], ["--runtime", "openvino"]):
        assert main(["predict", str(DEMO), str(recording), "--top-k", "1", *options]) == 0
        documents.append(capsys.readouterr().out)
    assert documents[0].splitlines()[:2] == documents[1].splitlines()[:2]


def test_the_whole_evidence(installed, capsys):
    assert main(["verify", str(DEMO), "--runtime", "openvino"]) == 0
    table = capsys.readouterr().out
    assert "  openvino " in table
    assert "✗" not in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime 'tensorrt'; expected auto or openvino"),
        ({"runtime": "openvino", "device": "cuda"}, "runtime openvino is for device cpu"),
        ({"runtime": "openvino", "precision": "int8"}, "runtime openvino runs float32"),
        ({"runtime": "openvino", "precision": "bfloat16"}, "precision 'bfloat16'"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        open_bundle(DEMO, **options)


def test_without_the_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "avex_serve.inference.openvino", raising=False)
    with pytest.raises(DependencyError, match=r"pip install 'avex-serve\[openvino\]'"):
        open_bundle(DEMO, runtime="openvino")
    assert main(["predict", str(DEMO), str(tmp_path / "none.wav"), "--runtime", "openvino"]) == 3
    assert "OpenVINO is not installed" in capsys.readouterr().err


def test_a_bundle_without_onnx(tmp_path, audio_bundle):
    bundle = copy_bundle(audio_bundle, tmp_path / "bundle")
    replace_file(replace_file(bundle, TORCHSCRIPT, b"never read"), ONNX, None)
    with pytest.raises(BundleError, match="export it again with --format onnx"):
        open_bundle(bundle, runtime="openvino")
    assert json.loads((bundle / "manifest.json").read_text())
