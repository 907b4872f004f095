"""A report of made-up logits on real files, as `fit` and `evaluate` write it."""

import numpy as np
import soundfile

from avex_serve.calibration.fit import calibrate
from avex_serve.training.dataset import Recording
from avex_serve.training.embed import Windows
from avex_serve.training.files import write_report
from avex_serve.training.report import Predictions, report

RATE = 8000
EACH = 6  # windows of a recording, 1 s each


def make_windows(folder, labels, recordings=14, seed=0, name="{:02}.wav"):
    """Recordings of noise on disk, and their windows with targets."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(recordings):
        path = folder / name.format(i)
        soundfile.write(path, rng.uniform(-0.5, 0.5, EACH * RATE), RATE, format="WAV")
        found.append(Recording(path, path.name, digest=f"{i:064}", seconds=EACH, group=path.name))
    count = recordings * EACH
    starts = np.tile(np.arange(EACH, dtype=float), recordings)
    targets = (rng.random((count, len(labels))) < 0.4).astype(np.int8)
    targets[0, 0] = -1
    return Windows(
        [], targets, np.stack([starts, starts + 1], 1), np.repeat(np.arange(recordings), EACH), tuple(found)
    )


def write(folder, windows, labels, seed=0, skill=1.0, noise=None, page=False, **fields):
    """Write a report of logits that are better with more skill; returns it and the logits."""
    rng = np.random.default_rng(seed)
    logits = skill * (2 * windows.targets - 1) + rng.normal(size=windows.targets.shape)
    calibration = calibrate(logits, windows.targets, windows.groups, labels, source="made up")
    predictions = [
        Predictions.of(rows, logits[rows], calibration) for rows in np.array_split(np.arange(len(logits)), 3)
    ]
    options = {"model": "m", "probe": "p", "chosen": {"C": 1.0}, "evaluated": "hold-out", "problems": [], **fields}
    evaluation = report(windows, labels, predictions, calibration=calibration, noise=noise or {}, seed=0, **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, evaluation, windows, predictions, page=page)
    return evaluation, logits
