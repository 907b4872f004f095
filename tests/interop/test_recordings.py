"""The whole way on recordings: every format, through Python, HTTP and gRPC, names what the eager module names."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
import tritonclient.grpc
import tritonclient.http

import avex_serve
from avex_export.cli import main
from avex_export.recipes import variants
from avex_serve.bundle import ONNX, TORCHSCRIPT
from avex_serve.demo.sounds import make_recording
from avex_serve.models.probes import load_probe
from avex_serve.runtime.audio import decode
from tests.bundles import replace_file
from tests.service.conftest import running_server
from tests.shared import SHARED

PROBES = Path(avex_serve.__file__).parent / "demo" / "probes"
RATE, WINDOW = 16000, 32000
# Rounding may carry a score over the threshold; detections this close to it are not compared.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Synthetic sounds at another rate and in stereo, and the real recordings where they are."""
    path = tmp_path_factory.mktemp("audio") / "synthetic.flac"
    wave, _ = make_recording(3, seconds=9.5, sample_rate=44100)
    soundfile.write(path, np.stack([wave, 0.5 * wave], axis=1), 44100)
    real = SHARED / "audio"
    return [path, *sorted([*real.glob("*.wav"), *real.glob("*.flac")])]


@functools.cache
def demo_probe(name):
    return load_probe(PROBES / name)


@functools.cache
def eager_scores(probe, path):
    """Windows and scores by the eager module, soundfile, soxr and numpy alone."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = soxr.resample(samples.mean(axis=1), rate, RATE, quality="HQ") if rate != RATE else samples.mean(axis=1)
    starts = range(0, len(wave), WINDOW)
    windows = [np.pad(wave[start : start + WINDOW], (0, max(0, start + WINDOW - len(wave)))) for start in starts]
    spans = [(start / RATE, min(start + WINDOW, len(wave)) / RATE) for start in starts]
    with torch.no_grad():
        rows = [torch.sigmoid(probe(torch.from_numpy(window)[None]))[0].numpy() for window in windows]
    return spans, np.stack(rows)


def assert_agrees(document, probe, path, threshold=0.5):
    spans, scores = eager_scores(probe, path)
    assert document["duration"] == pytest.approx(spans[-1][1])
    found = {(round(d["start"], 6), d["label"]): d for d in document["detections"]}
    assert len(found) == len(document["detections"])
    for (start, end), row in zip(spans, scores, strict=True):
        for label, score in zip(probe.labels, row, strict=True):
            detection = found.pop((round(start, 6), label), None)
            if detection is None:
                assert score < threshold + CLOSE
            else:
                assert detection["end"] == pytest.approx(end)
                assert abs(detection["score"] - score) <= CLOSE
    assert found == {}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of the demo probes by name and format, exported when they are asked for."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(name, form):
        output, other = root / form / name, {"onnx": TORCHSCRIPT, "torchscript": ONNX}[form]
        if not output.exists():
            if not (root / name).exists():
                assert main(["--probe", name, "--output", str(root / name)]) == 0
            replace_file(shutil.copytree(root / name, output), other, None)
        return output

    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", sorted(variants()))
def test_every_format_names_what_the_eager_module_names(recordings, bundles, name, form):
    probe = demo_probe(name)
    with avex_serve.open_bundle(bundles(name, form), "cpu") as engine:
        assert engine.backend.format == form
        assert engine.manifest.trained
        for path in recordings:
            assert_agrees(engine.predict(*decode(path)).model_dump(), probe, path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("linear_last", "onnx"), ("transformer_all", "torchscript")])
def test_http_and_grpc_name_what_the_eager_module_names(tmp_path, recordings, bundles, name, form):
    probe = demo_probe(name)
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(bundles(name, form))) as server:
        for path in recordings:
            document = server.post("/predict", content=path.read_bytes()).json()
            assert_agrees(document, probe, path)
            _, scores = eager_scores(probe, path)
            for answer in (over_grpc(server, name, path), over_v2(server, name, path)):
                assert json.loads(answer[1]) == [len(scores)]
                np.testing.assert_allclose(answer[0], scores, atol=CLOSE)


def over_grpc(server, name, path):
    tensor = tritonclient.grpc.InferInput("waveform", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([path.read_bytes()], dtype=np.object_))
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer(name, [tensor])
    return answer.as_numpy("scores"), answer.get_response().parameters["windows"].string_param


def over_v2(server, name, path):
    tensor = tritonclient.http.InferInput("waveform", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([path.read_bytes()], dtype=np.object_))
    with tritonclient.http.InferenceServerClient(server.http) as client:
        answer = client.infer(name, [tensor])
    return answer.as_numpy("scores"), answer.get_response()["parameters"]["windows"]
