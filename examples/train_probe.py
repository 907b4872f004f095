"""Train a probe on labelled recordings, read its report, and use it on a recording.

    python train_probe.py --data my_recordings --recording my_recording.wav

The data is a folder of WAV, FLAC, OGG or MP3 files for each label::

    my_recordings/bat/001.wav
    my_recordings/bat/002.wav
    my_recordings/noise/001.wav

or a folder with annotation tables (Raven, Audacity, CSV), or such a table. Recordings stay whole: those that
evaluate the probe did not train it. If several files were cut from one recording, give a table with a column that
says so, and name it by ``--group-by``. Clips without a call belong into a folder ``noise``.

Without ``--data`` the program writes a folder of synthetic sounds and uses it. It needs the extra `export`.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch

from avex_serve import decode
from avex_serve.audio.reader import resample
from avex_serve.audio.windows import plan_windows
from avex_serve.calibration.scales import Calibrator, read_calibration
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import load_probe
from avex_serve.synthetic import LABELS, make_clip, make_recording
from avex_serve.training import FitRequest, check_data, fit_probe


def main() -> None:
    """Check, train, report, use."""
    args = parse_arguments()
    if args.data is None:
        args.data = Path("synthetic_recordings")
        write_recordings(args.data, args.seed)
    if args.recording is None:
        args.recording = Path("synthetic_recording.wav")
        wave, _ = make_recording(args.seed, seconds=20.0)
        soundfile.write(args.recording, wave, 16000)

    request = FitRequest(
        args.data, args.output, model=args.model, probe=args.probe, seed=args.seed, group_by=args.group_by
    )
    print(check_data(request))
    evaluation = fit_probe(request)
    for name, figures in evaluation.labels.items():
        found = figures.average_precision  # with its interval of 95 % over recordings, None where it has no value
        print(
            f"{name}: average precision {found.value} ({found.low} to {found.high}), {found.recordings} recordings"
        )
    print(f"wrote {args.output}; export it: avex-export --probe {args.output}")

    # Probabilities (N, C) of the windows of a recording; NaN where a label had too few recordings to be calibrated.
    probe, calibration = load_probe(args.output).eval(), read_calibration(args.output)
    assert calibration is not None
    windows, spans = cut(args.recording, probe.base_model)
    with torch.no_grad():
        logits = np.concatenate([probe(torch.from_numpy(window)[None]).numpy() for window in windows])  # (N, C)
    probabilities = Calibrator.of(calibration, "none").probabilities(logits)  # "none": of raw logits
    detected = logits >= calibration.thresholds()  # where a label has no threshold, from a score of 0.5 on
    for (start, end), row, found in zip(spans, probabilities, detected, strict=True):
        names = [f"{label} {row[i]:.2f}" for i, label in enumerate(probe.labels) if found[i]]
        print(f"{start:6.1f} – {end:5.1f} s  {', '.join(names) or '-'}")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train a probe on labelled recordings and use it on another one.")
    parser.add_argument("--data", type=Path, help="labelled recordings (default: synthetic)")
    parser.add_argument("--group-by", metavar="COLUMN", help="keep recordings with the same value together")
    parser.add_argument("--recording", type=Path, help="the recording to label (default: a synthetic one)")
    parser.add_argument("--model", default="avex_demo", help="the backbone, a registered name or a YAML file")
    parser.add_argument("--probe", default="linear_last", help="a named variant or a YAML file")
    parser.add_argument("--output", type=Path, default=Path("my_probe"), help="where the probe is saved")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_recordings(folder: Path, seed: int) -> None:
    """Write twelve synthetic recordings of 4 s of each sound, and of the background alone."""
    rng = np.random.default_rng(seed)
    sounds: dict[str, list[str]] = {**{label: [label] for label in LABELS}, "noise": []}
    for label, parts in sounds.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            clips = [make_clip(rng, parts, snr_db=rng.uniform(0, 20)) for _ in range(2)]
            soundfile.write(folder / label / f"{i:03}.wav", np.concatenate(clips), 16000)


def cut(path: Path, base: ModelBase) -> tuple[list[np.ndarray], np.ndarray]:
    """The N windows (S,) of a recording at the model's rate, and where they are (N, 2), in seconds."""
    assert base.audio_config is not None
    wave, rate = decode(path)
    wave = resample(wave, rate, base.audio_config.sample_rate)
    plan = plan_windows(wave.size, base.clip_samples, base.audio_config.sample_rate, overlap=0.0)
    return list(plan.cut(wave)), plan.spans


if __name__ == "__main__":
    main()
