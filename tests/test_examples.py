"""Each example runs as a user starts it, and its output is what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve import list_model_layers
from avex_serve.models.probes import load_probe
from avex_serve.synthetic import LABELS, make_clip, make_recording

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in an empty folder, without network; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def start(name, *arguments, code=0):
        paths = [str(ROOT), str(ROOT / "export"), os.environ.get("PYTHONPATH", "")]
        # One thread: on a busy machine several wait for one another.
        settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return start


def test_every_example_is_run_here():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in tests


def test_train_probe_on_synthetic_recordings(run):
    printed = run("train_probe.py")
    found = dict(re.findall(r"^(\w+): average precision ([\d.]+) \(", printed, re.MULTILINE))
    assert set(found) == set(LABELS)
    assert np.mean([float(value) for value in found.values()]) > 0.8
    assert "evaluation: cross-validation" in printed
    probe = load_probe("my_probe")
    assert set(probe.labels) == set(LABELS)
    # The recording has one sound in each window but every fourth.
    _, events = make_recording(0, seconds=20.0)
    played = {2.0 * (event.start // 2): event.label for event in events}
    rows = re.findall(r"^ +([\d.]+) – +[\d.]+ s  (.+)$", printed, re.MULTILINE)
    assert len(rows) == 10
    right = sum(played.get(float(start), "-") in re.sub(r" [\d.]+", "", found).split(", ") for start, found in rows)
    assert right >= 7


def test_train_probe_on_a_folder_and_a_recording(run):
    rng = np.random.default_rng(5)
    for label in ("hoot", "whistle"):
        Path("mine", label).mkdir(parents=True)
        for i in range(4):  # of another rate than the model's, in stereo, shorter and longer than its clips
            clip = make_clip(rng, [label], snr_db=20, seconds=2.0 if i % 2 else 2.5, sample_rate=22050)
            soundfile.write(Path("mine", label, f"{i}.flac"), np.stack([clip, clip], axis=1), 22050)
    hoot, whistle = (make_clip(rng, [label], snr_db=20) for label in ("hoot", "whistle"))
    soundfile.write("field.wav", np.concatenate([hoot, whistle, hoot[:9000]]), 16000)
    Path("mine", "hoot", "empty.wav").write_bytes(b"")
    printed = run("train_probe.py", "--data", "mine", "--recording", "field.wav", "--output", "trained")
    assert "empty.wav is empty" in printed
    assert "evaluation: cross-validation" in printed
    rows = printed.splitlines()[-3:]
    assert ["hoot" in rows[0], "whistle" in rows[1]] == [True, True]
    assert "4.0 –   4.6 s" in rows[2]
    assert load_probe("trained").labels == ("hoot", "whistle")
    assert not Path("synthetic_recordings").exists()


def test_extract_embeddings(run):
    run("extract_embeddings.py")
    layers = list_model_layers("avex_demo")["layers"]
    with np.load("embeddings.npz") as stored:
        assert set(stored) == {"recordings", "recording", "spans", *layers}
        assert stored["recording"].tolist() == [0] * 5 + [1] * 3
        np.testing.assert_allclose(stored["spans"][[0, 4, 5, 7]], [[0, 2], [8, 9], [0, 2], [4, 5]])
        assert all(stored[layer].shape == (8, 128) for layer in layers)
        means = stored["backbone.encoder.layers.3.fc2"], stored["backbone.encoder.layers.2.fc2"]
    arguments = ("--layers", "last_layer", "-2", "--aggregation", "none", "--overlap", "1", "--output", "some.npz")
    run("extract_embeddings.py", "synthetic_1.wav", *arguments)
    with np.load("some.npz") as stored:
        assert stored["spans"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        for layer, mean in zip(layers[:-3:-1], means, strict=True):
            assert stored[layer].shape == (4, 96, 128)
            # Every second window is one of those before.
            np.testing.assert_allclose(stored[layer][::2].mean(axis=1), mean[5:7], atol=1e-5)


def test_compare_probes(run):
    rows = {name: rest for name, *rest in map(str.split, run("compare_probes.py").splitlines()[2:])}
    assert list(rows) == ["linear_last", "linear_all", "mlp_last", "lstm_last", "attention_last", "transformer_last"]
    assert rows["linear_last"][:2] == ["1290", "128"]
    assert rows["linear_all"][:2] == ["1295", str(5 * 96 * 128)]
    assert rows["transformer_last"][:2] == ["133770", str(96 * 128)]
    for _, _, accuracy in rows.values():
        assert 0.6 < float(accuracy) <= 1  # chance is 0.1


def test_own_backbone(run):
    printed = run("own_backbone.py")
    assert "layers: low, high, mix" in printed
    before, after, loaded = (float(value) for value in re.findall(r"(\d\.\d\d)$", printed, re.MULTILINE))
    assert before < 0.5
    assert after > 0.8
    assert loaded == after
