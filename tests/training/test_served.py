"""What is served is what was trained and reported: scores of all five heads, over the command, HTTP and gRPC."""

import json

import numpy as np
import pytest
import soundfile
import torch
import tritonclient.grpc
from sklearn.metrics import average_precision_score

from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.models.probes import load_probe
from avex_serve.training import fit as module
from avex_serve.training import heads
from avex_serve.training.fit import FitRequest, fit_probe
from avex_serve.training.split import split
from tests.service.conftest import running_server
from tests.training.conftest import LABELS
from tests.training.test_fit import windows_of

HEADS = ("linear_last", "mlp_last", "lstm_last", "attention_last", "transformer_last")


@pytest.fixture(scope="module")
def reports(data, cache, tmp_path_factory):
    """The folder of the probes, and the report of each."""
    folder = tmp_path_factory.mktemp("probes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "EPOCHS", 8)
        patch.setattr(heads, "RATES", (3e-3,))
        found = {}
        for name in HEADS:
            found[name] = fit_probe(FitRequest(data, folder / name, probe=name, cache=cache), lambda text: None)
    return folder, found


@pytest.fixture(scope="module")
def bundle(reports, tmp_path_factory):
    """All five heads in one bundle."""
    target = tmp_path_factory.mktemp("bundles") / "five"
    probes = [part for name in HEADS for part in ("--probe", str(reports[0] / name))]
    module.run_exporter([*probes, "--format", "onnx", "--output", str(target), "--name", "five"])
    return target


@pytest.fixture(scope="module")
def windows(data, cache, tmp_path_factory):
    """The windows of the data, with their targets and groups."""
    return module._keep_copies_together(windows_of(data, cache, tmp_path_factory.mktemp("scratch"))[1])[0]


@pytest.fixture(scope="module")
def served(bundle, data, windows, tmp_path_factory):
    """Scores and probabilities (windows, labels) of each head, by way: http, grpc and command."""
    paths = [data / recording.name for recording in windows.recordings]
    found = {}
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(bundle)) as server:
        answers = [
            server.post("/predict_all?threshold=0", content=path.read_bytes()).json()["predictions"]
            for path in paths
        ]
        for i, name in enumerate(HEADS):
            found[name, "http"] = arrays([answer[i]["detections"] for answer in answers])
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            audio = tritonclient.grpc.InferInput("waveform", [len(paths)], "BYTES")
            audio.set_data_from_numpy(np.array([path.read_bytes() for path in paths], dtype=np.object_))
            result = client.infer("five", [audio])
            for name in HEADS:
                columns = [result.as_numpy(f"{name}.{what}") for what in ("scores", "probabilities")]
                found[name, "grpc"] = np.stack(columns)
    return found


def arrays(answers):
    """(2, windows, labels) scores and probabilities from the detections of each recording."""
    rows = [
        [[each[what] for each in sorted(own, key=lambda each: each["label"])] for own in by_window(detections)]
        for what in ("score", "probability")
        for detections in answers
    ]
    return np.array([row for part in rows for row in part]).reshape(2, -1, len(LABELS))


def by_window(detections):
    starts = sorted({each["start"] for each in detections})
    return [[each for each in detections if each["start"] == start] for start in starts]


@pytest.mark.parametrize("name", HEADS)
def test_every_way_serves_the_scores_of_training_and_report(name, reports, bundle, data, windows, served, capsys):
    folder, evaluations = reports
    capsys.readouterr()
    paths = [str(data / recording.name) for recording in windows.recordings]
    assert main(["predict", str(bundle), *paths, "--probe", name, "--threshold", "0", "--json"]) == 0
    documents = {found["file"]: found for found in map(json.loads, capsys.readouterr().out.splitlines())}
    by_command = arrays([documents[path]["detections"] for path in paths])
    scores, probabilities = served[name, "http"]
    assert scores.shape == windows.targets.shape
    for other in (served[name, "grpc"], by_command):
        assert other == pytest.approx(served[name, "http"], abs=1e-6)

    # Every window: the saved probe in torch.
    probe = load_probe(folder / name)
    waves = np.stack([part for path in paths for part in soundfile.read(path, dtype="float32")[0].reshape(2, -1)])
    with torch.no_grad():
        eager = probe(torch.from_numpy(waves)).sigmoid().numpy()
    assert scores == pytest.approx(eager, abs=1e-5)

    # Windows held out: the figures of the report.
    parts = split(windows.targets, windows.groups, windows.splits, 0)
    ((_, held),) = parts.parts
    report = evaluations[name]
    calibration = read_bundle(bundle).manifest.probes[HEADS.index(name)].calibration
    for i, label in enumerate(LABELS):
        figures = report.labels[label]
        own = scores[held, i]
        assert [point[0] for point in figures.precision_recall] == pytest.approx(np.sort(own)[::-1], abs=1e-5)
        assert figures.average_precision.value == pytest.approx(
            average_precision_score(windows.targets[held, i], own), abs=1e-6
        )
        fitted = calibration.labels[i]
        kept = np.clip(scores[:, i].astype(np.float64), 2**-25, 1 - 2**-25)
        logits = np.log(kept) - np.log1p(-kept)
        logistic = 1 / (1 + np.exp(-(fitted.scale.slope * logits + fitted.scale.offset)))
        assert probabilities[:, i] == pytest.approx(logistic, abs=1e-5)
        if fitted.threshold is not None:
            detected = own >= 1 / (1 + np.exp(-fitted.threshold.logit))
            right = windows.targets[held, i][detected].mean() if detected.any() else None
            assert figures.precision_at_threshold.value == (None if right is None else pytest.approx(right))
