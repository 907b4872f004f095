"""`avex-serve fit` on synthetic sounds: what it says, what it writes, and that no figure leaks."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import msgspec
import numpy as np
import psutil
import pytest
import soundfile
import torch

from avex_export.recipes import variants
from avex_serve.bundles.reading import read_bundle, sha256_of
from avex_serve.calibration.scales import read_calibration
from avex_serve.cli import main
from avex_serve.errors import AvexServeError, InputError, NotFoundError
from avex_serve.inference.backend import open_bundle
from avex_serve.models.probes import load_probe
from avex_serve.synthetic import make_clip
from avex_serve.training import fit as module
from avex_serve.training import heads, metrics
from avex_serve.training.embed import run_windows
from avex_serve.training.fit import FitRequest, check_data, embeddings_bundle, fit_probe, probe_config
from avex_serve.training.heads import Task, train
from avex_serve.training.split import split
from tests.training.conftest import LABELS, RATE, RECORDINGS


@pytest.fixture(scope="session")
def fitted(data, cache, tmp_path_factory):
    """A probe that was fitted by the command."""
    folder = tmp_path_factory.mktemp("fitted") / "my_probe"
    command = ["fit", data, "--model", "avex_demo", "--probe", "linear_last", "--output", folder, "--cache", cache]
    assert main([*map(str, command), "--export", str(folder.with_name("bundle"))]) == 0
    return folder


def test_the_probe_the_calibration_and_the_report(fitted):
    assert {path.name for path in fitted.iterdir()} == {
        "probe.yml",
        "model.safetensors",
        "labels.json",
        "calibration.json",
        "trained_on.txt",
        "evaluation.json",
        "evaluation.csv",
        "evaluation.parquet",
        "report.html",
    }
    assert load_probe(fitted).labels == LABELS
    calibration = read_calibration(fitted)
    assert [label.label for label in calibration.labels] == list(LABELS)
    assert all(label.threshold is not None for label in calibration.labels)
    report = json.loads((fitted / "evaluation.json").read_text())
    assert (report["model"], report["probe"], report["evaluated"]) == ("avex_demo", "linear_last", "hold-out")
    assert 14 <= report["recordings"] <= 16
    for figures in (report["macro"], *report["labels"].values()):
        for name in ("average_precision", "auroc", "precision", "recall", "f1", "f1_at_threshold"):
            measure = figures[name]
            assert measure["low"] <= measure["value"] <= measure["high"]
            assert min(measure["windows"], measure["recordings"]) > 0
    assert report["macro"]["auroc"]["value"] > 0.9
    assert {"silence", "white noise", "hum", "clipped noise", "the background of the data"} <= report["noise"].keys()
    lines = (fitted / "evaluation.csv").read_text().splitlines()
    assert lines[0].startswith("Class,Precision (0.5),Recall (0.5),F1 Score (0.5),Precision (opt)")
    assert [line.split(",")[0] for line in lines[1:]] == [*LABELS, "OVERALL (macro-averaged)"]


def test_a_check_says_what_would_be_trained_on(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_model", None)  # nothing expensive
    assert main(["fit", str(data), "--output", str(tmp_path / "x"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "75 recordings, 150 windows with labels, 75 groups; evaluation: hold-out" in said
    counts = {line.split()[0]: line.split()[-3:] for line in said.splitlines()}
    assert counts["windows/recordings/groups"] == ["windows/recordings/groups"]
    assert counts["all"] == ["all", "train", "test"]
    assert counts["buzz"][0] == "50/25/25"
    for label in LABELS:
        everything, train, test = (list(map(int, cell.split("/"))) for cell in counts[label])
        assert everything == [sum(pair) for pair in zip(train, test, strict=True)]
    assert not (tmp_path / "x").exists()


def test_only_a_check_needs_no_output(data, capsys):
    assert main(["fit", str(data), "--check"]) == 0
    assert "75 recordings" in capsys.readouterr().out
    assert main(["fit", str(data)]) == 2
    assert "--output is missing" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bytes_from_stored_embeddings(fitted, data, cache, tmp_path, monkeypatch):
    said = []
    fit_probe(FitRequest(data, tmp_path / "again", cache=cache), said.append)
    assert not any("embedded" in text or "export" in text for text in said)
    for name in ("model.safetensors", "calibration.json", "evaluation.json", "evaluation.parquet", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (fitted / name).read_bytes()


def test_the_bundle_carries_calibration_and_headline(fitted):
    bundle = read_bundle(fitted.with_name("bundle"))
    (probe,) = bundle.manifest.probes
    assert probe.calibration == read_calibration(fitted)
    assert (bundle.directory / probe.trained_on).read_bytes() == (fitted / "trained_on.txt").read_bytes()
    report = json.loads((fitted / "evaluation.json").read_text())
    precision = report["macro"]["average_precision"]
    assert msgspec.to_builtins(probe.evaluation) == {
        "average_precision": precision["value"],
        "interval": (precision["low"], precision["high"]),
        "windows": report["windows"],
        "recordings": report["recordings"],
        "split": "hold-out",
    }
    card = " ".join((bundle.directory / "README.md").read_text().split())
    assert f"of {report['recordings']} recordings that did not train it (hold-out)" in card
    assert "Of 2 labels, 2 have a probability, and 2 a threshold from which on 90% of the detections" in card


def test_recordings_that_trained_the_head_are_known(fitted, data, cache, tmp_path, capsys):
    bundle = fitted.with_name("bundle")
    trained = (bundle / "trained_on.txt").read_text().split()
    recordings = {sha256_of(path): path for path in data.rglob("*.wav")}
    held_out = [path for digest, path in recordings.items() if digest not in trained]
    assert set(trained) < recordings.keys()
    assert len(held_out) == json.loads((fitted / "evaluation.json").read_text())["recordings"]
    assert main(["info", str(bundle)]) == 0
    assert f"trained on  {len(trained)} recordings" in capsys.readouterr().out

    evaluate = ["evaluate", str(bundle), "--cache", str(cache), "--output"]
    assert main([*evaluate, str(tmp_path / "all"), str(data)]) == 0
    warning = f"{len(trained)} of {len(recordings)} recordings trained this head"
    assert f"WARNING: {warning}, which is better on these than on new ones" in capsys.readouterr().out
    assert json.loads((tmp_path / "all" / "evaluation.json").read_text())["trained_on"] == len(trained)
    assert warning in (tmp_path / "all" / "report.html").read_text()
    assert main(["compare", str(tmp_path / "all"), str(tmp_path / "all")]) == 0
    assert warning in capsys.readouterr().out

    for path in held_out:  # by content, whatever the name
        target = tmp_path / "new" / path.parent.name / f"other-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert main([*evaluate, str(tmp_path / "rest"), str(tmp_path / "new")]) == 0
    assert "trained this head" not in capsys.readouterr().out
    assert json.loads((tmp_path / "rest" / "evaluation.json").read_text())["trained_on"] == 0

    (bundle_of_others := shutil.copytree(bundle, tmp_path / "b") / "trained_on.txt").write_text("rewritten")
    assert main(["evaluate", str(bundle_of_others.parent), str(data), "--cache", str(cache)]) != 0
    assert "was changed after the export" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["recordings", "run", "table"])
def test_a_calibration_on_recordings_that_trained_the_head_warns(fitted, data, tmp_path, capsys, way):
    bundle, paths = fitted.with_name("bundle"), sorted(data.rglob("*.wav"))
    trained = set((bundle / "trained_on.txt").read_text().split())
    rows = [
        f"{path},{start},{start + 1},buzz,"
        + (f"present,0.{3 + i % 7}1" if path.parent.name == "buzz" else f"absent,0.{i % 7}1")
        for i, path in enumerate(paths)
        for start in (0, 1)
    ]
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("\n".join(["file,start,end,label,decision,score", *rows]) + "\n")
    options = {"recordings": [], "run": ["--run", str(tmp_path / "run")], "table": ["--table-scores"]}[way]
    if way == "run":
        assert main(["run", str(bundle), str(data), "--out", str(tmp_path / "run")]) == 0
    assert main(["calibrate", str(bundle), str(reviews), *options, "--output", str(tmp_path / "new")]) == 0
    assert f"WARNING: {len(trained)} of {len(paths)} recordings trained this head" in capsys.readouterr().err
    (probe,) = read_bundle(tmp_path / "new").manifest.probes
    assert probe.calibration.source.endswith(f"of 75 recordings, {len(trained)} of which trained the head")
    fresh = [row for row, path in zip(rows[::2], paths, strict=True) if sha256_of(path) not in trained]
    reviews.write_text("\n".join(["file,start,end,label,decision,score", *fresh]) + "\n")
    main(["calibrate", str(bundle), str(reviews), *options, "--output", str(tmp_path / "new")])
    assert "trained this head" not in capsys.readouterr().err


def test_a_calibration_of_something_else_is_left_out_or_refused(fitted, tmp_path, capsys):
    other = shutil.copytree(fitted, tmp_path / "other")
    export = ["--format", "onnx", "--output", str(tmp_path / "bundle"), "--probe", str(other)]
    said = module.run_exporter([*export, "--activation", "none"])
    assert "calibration and evaluation of other are left out: its scores are others than in its training" in said
    (probe,) = read_bundle(tmp_path / "bundle").manifest.probes
    assert (probe.calibration, probe.evaluation) == (None, None)
    text = (other / "calibration.json").read_text()
    (other / "calibration.json").write_text(text.replace('"buzz"', '"hum"'))
    with pytest.raises(AvexServeError, match="is of other labels than the probe's"):
        module.run_exporter(export)


def test_the_exporter_ends_with_the_command(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "avex_serve",
        "fit",
        data,
        "--output",
        tmp_path / "x",
        "--cache",
        tmp_path / "cache",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = []
    deadline = time.monotonic() + 120
    while not children and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.5)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert children
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / "x").exists()
    assert list((tmp_path / "cache").rglob("*.onnx*")) == []


def test_the_served_score_is_the_score_of_the_training(fitted, data, capsys):
    bundle = fitted.with_name("bundle")
    path = data / "trill" / "00.wav"
    capsys.readouterr()
    assert main(["predict", str(bundle), str(path), "--threshold", "0", "--json"]) == 0
    served = {
        (found["start"], found["label"]): found["score"]
        for found in json.loads(capsys.readouterr().out)["detections"]
    }
    wave, rate = soundfile.read(path, dtype="float32")
    with open_bundle(bundle, "cpu") as engine:
        scores = engine.score(wave, rate).scores
    assert served[(0.0, "trill")] == pytest.approx(float(scores[0, 1]), abs=1e-7)
    assert served == pytest.approx(trained_scores(fitted, path), abs=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["linear_all", "mlp_last", "attention_last", "lstm_last", "transformer_last"])
def test_every_head_goes_the_whole_way(data, cache, tmp_path, monkeypatch, name):
    monkeypatch.setattr(heads, "EPOCHS", 4)
    monkeypatch.setattr(heads, "RATES", (3e-3,))
    folder = tmp_path / name
    evaluation = fit_probe(FitRequest(data, folder, probe=name, cache=cache), print)
    assert evaluation.macro.auroc.value > 0.6
    bundle = tmp_path / "bundle"
    module.run_exporter(["--probe", str(folder), "--format", "onnx", "--output", str(bundle)])
    path = data / "buzz" / "00.wav"
    with open_bundle(bundle, "cpu") as engine:
        scores = engine.score(*soundfile.read(path, dtype="float32")).scores
    expected = trained_scores(folder, path)
    assert {(2.0 * i, label): float(scores[i, j]) for i in range(2) for j, label in enumerate(LABELS)} == (
        pytest.approx(expected, abs=1e-5)
    )


def trained_scores(fitted, path):
    """Scores of a recording's windows by the saved probe."""
    probe = load_probe(fitted)
    wave, _ = soundfile.read(path, dtype="float32")
    with torch.no_grad():
        scores = probe(torch.from_numpy(wave.reshape(2, -1))).sigmoid()
    return {(2.0 * i, label): float(scores[i, j]) for i in range(2) for j, label in enumerate(LABELS)}


def windows_of(data, cache, scratch, **options):
    """The windows of a data set with their embeddings, as `fit` has them."""
    dataset = FitRequest(data, data, **options).read(data)
    base = module._load("avex_demo")
    bundle = embeddings_bundle(probe_config("linear_last"), "avex_demo", base, cache / "bundles")
    with open_bundle(bundle, "cpu", precision="float32") as engine:
        outputs = [info.output for info in engine.manifest.embeddings]
        windows, _ = run_windows(engine, outputs, dataset, cache / "embeddings", scratch, say=lambda text: None)
    return Task(
        probe_config("linear_last"), dataset.labels, windows.outputs, windows.targets, windows.groups
    ), windows


def test_a_hum_that_gives_the_class_away_does_not_leak(cache, tmp_path):
    """Every recording has a hum of its own and nothing of its class: chance by recording, near-perfect by window."""
    rng = np.random.default_rng(1)
    for i in range(24):
        folder = tmp_path / "data" / "AB"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        time = np.arange(16 * RATE) / RATE
        hum = sum(
            a * np.sin(2 * np.pi * f * time) for f, a in zip(rng.uniform(200, 6000, 4), rng.random(4), strict=True)
        )
        soundfile.write(folder / f"{i}.wav", 0.1 * hum + 0.02 * rng.standard_normal(time.size), RATE)
    task, windows = windows_of(tmp_path / "data", cache, tmp_path)
    nothing = np.full(len(windows.targets), "")

    def area(groups):
        scores, rows = [], []
        for train_rows, held in split(windows.targets, groups, nothing, 0).parts:
            trained = train(replace(task, groups=groups), train_rows, 0)
            rows.append(np.flatnonzero(held))
            scores.append(trained.logits(task, rows[-1])[:, 0])
        rows, scores = np.concatenate(rows), np.concatenate(scores)
        return metrics.estimate(metrics.auroc, windows.targets[rows, 0], scores, groups[rows], 0)

    by_recording, by_window = area(windows.groups), area(np.arange(len(windows.targets)))
    assert by_recording.low < 0.5 < by_recording.high
    assert by_window.value > 0.95


def test_a_check_finds_what_is_wrong(data, tmp_path, capsys):
    for i in range(RECORDINGS):
        for label in LABELS:
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i:02}.wav").write_bytes((data / label / f"{i:02}.wav").read_bytes())
    # A copy of every buzz in another format, at another level: some of them are across the split.
    for i in range(RECORDINGS):
        wave, _ = soundfile.read(tmp_path / "buzz" / f"{i:02}.wav")
        soundfile.write(tmp_path / "buzz" / f"copy{i:02}.mp3", 0.5 * wave, RATE)
    (tmp_path / "Buzz ").mkdir()
    (tmp_path / "Buzz " / "x.wav").write_bytes(b"RIFF\xff\xff\xff\x7fWAVE")
    wave = make_clip(np.random.default_rng(9), ["buzz"], snr_db=5)
    soundfile.write(tmp_path / "Buzz " / "y.wav", wave, RATE)
    assert main(["fit", str(tmp_path), "--output", str(tmp_path / "p"), "--check"]) == 0
    said = capsys.readouterr().out
    assert "fold 1" in said.splitlines()[2], "one group with a label is too few to hold out"
    assert "Buzz: one recording (or group) only" in said
    assert "labels that differ by case or spaces alone: 'Buzz', 'buzz'" in said
    assert "x.wav" in said
    copies = [line for line in said.splitlines() if "near-duplicates across the split" in line]
    assert len(copies) >= RECORDINGS // 2
    for line in copies:
        one, other = re.findall(r"buzz/(?:copy)?(\d\d)\.\w+", line)
        assert one == other, "a copy and its original"


def test_a_copy_without_windows_is_not_across_the_split(data, tmp_path, capsys):
    """Nothing is known of the windows of the copy of a recording that is held out: it isn't used."""
    rows = ["file,start,end,label,decision,split"]
    for i, decision in enumerate(("present", "absent", "present", "absent")):
        wave, _ = soundfile.read(data / "buzz" / f"{i:02}.wav")
        soundfile.write(tmp_path / f"{i}.wav", wave, RATE)
        rows.append(f"{i}.wav,0,2,buzz,{decision},{'test' if i < 2 else 'train'}")
    wave, _ = soundfile.read(tmp_path / "0.wav")
    soundfile.write(tmp_path / "copy.wav", 0.5 * wave, RATE)
    for decision, reported in (("present", True), ("unsure", False)):
        last = f"copy.wav,0,2,buzz,{decision},train"
        (tmp_path / "reviews.csv").write_text("\n".join([*rows, last]) + "\n")
        assert main(["fit", str(tmp_path / "reviews.csv"), "--check"]) == 0
        assert ("near-duplicates across the split" in capsys.readouterr().out) is reported


def test_few_recordings_are_cross_validated_and_one_is_not_evaluated(data, cache, tmp_path, capsys):
    few = tmp_path / "few"
    for label in LABELS:
        (few / label).mkdir(parents=True)
        for i in range(3):
            (few / label / f"{i}.wav").write_bytes((data / label / f"{i:02}.wav").read_bytes())
    evaluation = fit_probe(FitRequest(few, tmp_path / "probe", cache=cache), print)
    assert (evaluation.evaluated, evaluation.recordings) == ("cross-validation", 6)
    assert any("missing" in problem for problem in evaluation.problems)

    (few / "buzz" / "again.wav").write_bytes((few / "buzz" / "0.wav").read_bytes())
    evaluation = fit_probe(FitRequest(few, tmp_path / "copied", cache=cache), print)
    [copy] = [problem for problem in evaluation.problems if "again.wav" in problem]
    assert copy.endswith("they stay together")

    one = tmp_path / "one"
    one.mkdir()
    soundfile.write(one / "a.wav", np.concatenate([soundfile.read(data / x / "00.wav")[0] for x in LABELS]), RATE)
    (one / "a.txt").write_text("0\t4\tbuzz\n4\t8\ttrill\n")
    capsys.readouterr()
    command = ["fit", str(one), "--output", str(tmp_path / "single"), "--cache", str(cache)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "nothing could be evaluated" in said
    assert "buzz: one recording (or group) only" in said
    assert (
        "buzz: too few labels to calibrate; missing: 8 windows with the sound, 8 windows without it, 2 rec" in said
    )
    assert load_probe(tmp_path / "single").labels == LABELS


def test_a_label_of_one_recording_is_not_evaluated(data, cache, tmp_path):
    for label, count in (("buzz", 4), ("trill", 1)):
        (tmp_path / label).mkdir()
        for i in range(count):
            (tmp_path / label / f"{i}.wav").write_bytes((data / label / f"{i:02}.wav").read_bytes())
    figures = fit_probe(FitRequest(tmp_path, tmp_path / "out" / "probe", cache=cache), print).labels["trill"]
    assert figures.average_precision.value is None
    assert figures.warning == "no windows with the sound could be evaluated: no figures"


def test_a_class_alone_is_refused(data, tmp_path, cache, capsys):
    """The folder above the classes was given, or the clips without the sound are missing."""
    (tmp_path / "mine" / "clips").mkdir(parents=True)
    for i in range(6):
        shutil.copy(data / LABELS[0] / f"{i:02}.wav", tmp_path / "mine" / "clips")
    assert main(["fit", str(tmp_path / "mine"), "--check"]) == 0
    assert "problem: clips: no window is without it, so nothing can be learned" in capsys.readouterr().out
    command = ["fit", str(tmp_path / "mine"), "--output", str(tmp_path / "probe"), "--cache", str(cache)]
    assert main(command) == 2
    assert "no label has both windows with it and windows without it; add recordings" in capsys.readouterr().err
    assert not (tmp_path / "probe").exists()


def test_a_split_of_the_data_is_used(data, cache, tmp_path):
    rows = [f"{label}/{i:02}.wav,{'test' if i % 3 == 0 else 'train'}" for label in LABELS for i in range(RECORDINGS)]
    rows += [f"noise/{i:02}.wav,{'test' if i % 3 == 0 else 'train'}" for i in range(RECORDINGS)]
    table = data / "splits.csv"
    table.write_text("file,split\n" + "\n".join(rows) + "\n")
    try:
        evaluation = fit_probe(FitRequest(data, tmp_path / "probe", cache=cache), print)
    finally:
        table.unlink()
    assert (evaluation.evaluated, evaluation.recordings) == ("split column", 27)


def test_what_can_not_be_fitted_is_refused(data, cache, tmp_path):
    with pytest.raises(NotFoundError, match="--model none"):
        check_data(FitRequest(data, tmp_path / "x", model="none", cache=cache))
    trained = tmp_path / "fine.yml"
    trained.write_text("probe_type: linear\ntarget_layers: [last_layer]\nfreeze_backbone: false\n")
    with pytest.raises(InputError, match="set freeze_backbone: true"):
        fit_probe(FitRequest(data, tmp_path / "x", probe=str(trained), cache=cache))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for refuses in (fit_probe, check_data):
        with pytest.raises(InputError, match=r"--output .* holds no probe\.yml"):
            refuses(FitRequest(data, tmp_path / "full", cache=cache))
        with pytest.raises(NotFoundError, match="expected one of attention_all"):
            refuses(FitRequest(data, tmp_path / "x", probe="linear_first", cache=cache))


def test_every_variant_is_found():
    assert {name: probe_config(name) for name in variants()}
