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
from avex_export.recipes import find_recipe, variants
from avex_serve.audio.reader import decode
from avex_serve.bundles.manifest import ONNX, TORCHSCRIPT
from avex_serve.models.probes import build_probe_from_config, load_probe, save_probe
from avex_serve.synthetic import make_recording
from tests.answers import as_json
from tests.bundles import replace_file
from tests.models.backbones import effnet, effnet_spec, tiny_eat, tiny_eat_spec, write_model
from tests.service.conftest import running_server
from tests.shared import SHARED

PROBES = Path(avex_serve.__file__).parent / "demo" / "probes"
RATE = 16000
# Rounding may carry a score over the threshold; detections this close to it are not compared.
CLOSE = 1e-4
# Every recording goes every way with the trained probes below, the shorter ones (in seconds) with all others.
WHOLE = [("beats", "linear_last", "onnx"), ("beats", "transformer_all", "torchscript")]
SHORT, SHORTEST = 15.0, 5.0
# BEATs has trained probes, those of the demo; the others have random ones, which hear something in everything.
BACKBONES = {
    "eat": (tiny_eat, tiny_eat_spec, {}),
    "efficientnet": (effnet, effnet_spec, {"n_mels": 32}),
}
# Each backbone and each kind of head, from all layers and from the last. Every other pair of the two is nightly.
PAIRS = {
    ("beats", "linear_last"),
    ("beats", "mlp_last"),
    ("beats", "transformer_all"),
    ("eat", "attention_last"),
    ("eat", "linear_all"),
    ("eat", "lstm_last"),
    ("eat", "transformer_all"),
    ("efficientnet", "transformer_all"),
}
CASES = [
    pytest.param(model, name, marks=() if (model, name) in PAIRS else pytest.mark.nightly)
    for model in ("beats", *BACKBONES)
    for name in sorted(variants())
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Synthetic sounds at another rate and in stereo, and the real recordings where they are."""
    path = tmp_path_factory.mktemp("audio") / "synthetic.flac"
    wave, _ = make_recording(3, seconds=9.5, sample_rate=44100)
    soundfile.write(path, np.stack([wave, 0.5 * wave], axis=1), 44100)
    real = SHARED / "audio"
    return [path, *sorted([*real.glob("*.wav"), *real.glob("*.flac")])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of saved probes by backbone and variant."""
    root = tmp_path_factory.mktemp("probes")

    def folder(model, name):
        if model == "beats":
            return PROBES / name
        target = root / model / name
        if not target.exists():
            make, make_spec, options = BACKBONES[model]
            base, yaml_file = make(seed=5, **options), root / f"{model}.yml"
            if not yaml_file.exists():
                write_model(yaml_file, base, make_spec(**options))
            torch.manual_seed(1)
            probe = build_probe_from_config(find_recipe(name).config, 5, "cpu", base_model=base)
            save_probe(probe, target, labels=[f"sound {i}" for i in range(5)], model=yaml_file, activation="sigmoid")
        return target

    return folder


def up_to(seconds, recordings):
    """The recordings that are no longer than that, and the synthetic one, which is always there."""
    return recordings[:1] + [path for path in recordings[1:] if soundfile.info(path).duration <= seconds]


@functools.cache
def eager_probe(folder):
    return load_probe(folder)


@functools.cache
def eager_scores(probe, path):
    """Windows and scores by the eager module, soundfile, soxr and numpy alone."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = soxr.resample(samples.mean(axis=1), rate, RATE, quality="HQ") if rate != RATE else samples.mean(axis=1)
    window = probe.base_model.clip_samples
    starts = [*range(0, len(wave), window)]
    if len(starts) > 1 and len(wave) - starts[-1] < window / 10:  # too little to be evidence
        starts[-1] = len(wave) - window
    windows = [np.pad(wave[start : start + window], (0, max(0, start + window - len(wave)))) for start in starts]
    spans = [(start / RATE, min(start + window, len(wave)) / RATE) for start in starts]
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
def bundles(tmp_path_factory, saved, one_operator_table):
    """Bundles by backbone, variant and format, exported when they are asked for."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(model, name, form):
        whole, output = root / model / name, root / model / form / name
        other = {"onnx": TORCHSCRIPT, "torchscript": ONNX}[form]
        if not output.exists():
            if not whole.exists():
                assert main(["--probe", str(saved(model, name)), "--output", str(whole)]) == 0
            replace_file(shutil.copytree(whole, output), other, None)
        return output

    return bundle


@pytest.mark.parametrize(("model", "name"), CASES)
def test_every_way_names_what_the_eager_module_names(tmp_path, recordings, saved, bundles, model, name):
    probe = eager_probe(saved(model, name))
    for form in ("onnx", "torchscript"):
        with avex_serve.open_bundle(bundles(model, name, form), "cpu") as engine:
            assert engine.backend.format == form
            for path in recordings if model == "beats" else up_to(SHORT, recordings):
                assert_agrees(as_json(engine.predict(*decode(path))), probe, path)
    # TorchScript is served once for each backbone: what the formats answer was compared above.
    for form in ("onnx", "torchscript") if name == "transformer_all" else ("onnx",):
        heard = recordings if (model, name, form) in WHOLE else up_to(SHORTEST, recordings)
        with running_server(tmp_path / form, AVEX_BUNDLE=str(bundles(model, name, form))) as server:
            for path in heard:
                assert_served(server, name, probe, path)


def assert_served(server, name, probe, path):
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
