"""`avex-serve evaluate`: the figures of a bundle are those of its answers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from sklearn.metrics import average_precision_score, roc_auc_score

from avex_serve.audio.reader import decode
from avex_serve.cli import main
from avex_serve.errors import UnsupportedError
from avex_serve.inference.backend import open_bundle
from avex_serve.training.evaluate import EvaluationRequest, evaluate_bundle
from tests.bundles import LABELS, SAMPLE_RATE, make_audio_bundle
from tests.test_imports import BLOCKER
from tests.training.reports import make_windows, write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise with random labels: the figures mean nothing, but are the same for every implementation."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / LABELS[i % 3]).mkdir(exist_ok=True)
        soundfile.write(folder / LABELS[i % 3] / f"{i}.wav", rng.uniform(-1, 1, 8000), SAMPLE_RATE)
    return folder


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_figures_are_those_of_the_answers(data, tmp_path, activation):
    bundle = make_audio_bundle(tmp_path / "bundle", activation=activation)
    found = evaluate_bundle(EvaluationRequest(bundle, data, cache=tmp_path), lambda text: None)
    scores, targets = [], []
    with open_bundle(bundle, "cpu") as engine:
        for path in sorted(data.rglob("*.wav")):
            rows = engine.score(*decode(path)).scores
            scores.append(rows)
            targets.append(np.tile(np.array(LABELS) == path.parent.name, (len(rows), 1)))
    scores, targets = np.concatenate(scores), np.concatenate(targets)
    assert (found.evaluated, found.windows, found.recordings, found.groups) == ("all", 60, 12, 12)
    for i, label in enumerate(LABELS):
        figures = found.labels[label]
        assert figures.average_precision.value == pytest.approx(average_precision_score(targets[:, i], scores[:, i]))
        assert figures.auroc.value == pytest.approx(roc_auc_score(targets[:, i], scores[:, i]))
        assert figures.recall.value == pytest.approx((scores[targets[:, i], i] >= 0.5).mean())
        assert figures.recall_at_threshold.value is None, "the bundle has no thresholds"
    assert found.macro.auroc.value == pytest.approx(roc_auc_score(targets, scores, average="macro"))
    assert sum(sum(row.values()) for row in found.confusion.values()) == 60
    assert all(mistake.score >= 0.5 for mistake in found.worst if mistake.kind == "false")


def test_the_command_needs_no_torch(audio_bundle, data, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "-m", "avex_serve", "evaluate", audio_bundle, data, "--output", tmp_path / "report"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--cache", tmp_path], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "evaluated on 60 windows of 12 recordings (all labelled windows)" in done.stdout
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert set(report["labels"]) == set(LABELS)
    assert (tmp_path / "report" / "evaluation.csv").read_text("utf-8").count("\n") == 5


def test_outputs_that_lost_their_content_are_computed_again(audio_bundle, data, tmp_path):
    request = EvaluationRequest(audio_bundle, data, cache=tmp_path)
    first = evaluate_bundle(request, lambda text: None)
    for path in list(tmp_path.rglob("*.npz"))[::2]:  # as after a power cut
        path.write_bytes(b"")
    assert evaluate_bundle(request, lambda text: None) == first


def test_a_bundle_that_takes_embeddings_is_refused(embedding_bundle, data, tmp_path, capsys):
    with pytest.raises(UnsupportedError):
        evaluate_bundle(EvaluationRequest(embedding_bundle, data, cache=tmp_path))
    assert main(["evaluate", str(embedding_bundle), str(data)]) == 2
    assert "takes embeddings, not audio" in capsys.readouterr().err


def test_a_report_can_not_be_a_file(audio_bundle, data, tmp_path, capsys):
    (tmp_path / "report").write_text("mine")
    assert main(["evaluate", str(audio_bundle), str(data), "--output", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().err
    assert "is a file; name a folder for the report" in said
    assert "embedded" not in said, "before the work"


def test_a_report_does_not_replace_that_of_a_fit(audio_bundle, data, tmp_path, capsys):
    """The exporter takes it for the evaluation of the probe."""
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "probe.yml").touch()
    assert main(["evaluate", str(audio_bundle), str(data), "--output", str(tmp_path / "probe")]) == 2
    assert "holds a probe with a report of its own" in capsys.readouterr().err


def test_a_page_of_an_earlier_report_does_not_stay(audio_bundle, data, tmp_path, monkeypatch):
    request = EvaluationRequest(audio_bundle, data, tmp_path / "report", cache=tmp_path)
    evaluate_bundle(request, lambda text: None)
    assert (tmp_path / "report" / "report.html").is_file()
    monkeypatch.setattr("avex_serve.training.evaluate.can_make_page", lambda say: False)
    evaluate_bundle(request, lambda text: None)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        f"evaluation.{e}" for e in ("csv", "json", "parquet")
    }


def test_a_label_of_noise_is_no_detection_in_noise(tmp_path):
    """Heads that were trained with cross entropy have such a label; it is right in noise."""
    windows = make_windows(tmp_path / "recordings", ["owl", "Noise"])
    windows.targets[:, 1] = windows.targets[:, 0] == 0  # every window without an owl has noise
    found, _ = write(tmp_path / "report", windows, ["owl", "Noise"], skill=0.0, noise={"hum": np.full((60, 2), 9.0)})
    assert found.noise["hum"].per_hour == {"owl": 3600.0}
    assert set(found.noise["the background of the data"].per_hour) == {"owl"}
