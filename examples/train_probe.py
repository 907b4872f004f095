"""Train a probe on a folder of labelled clips, save it, and use it to label the windows of a recording.

    python train_probe.py --clips my_clips --recording my_recording.wav

The folder has a folder of WAV, FLAC, OGG or MP3 files for each label::

    my_clips/bat/001.wav
    my_clips/bat/002.wav
    my_clips/bee/001.wav

Each clip is cut into windows of the model's length, which all get the clip's label, so cut away what is something
else. Give a label such as ``background`` to clips without a call, because the probe chooses one label for every
window.
Without ``--clips`` the program writes a folder of synthetic sounds and uses it.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from avex_serve import load_model
from avex_serve.audio.reader import decode, resample
from avex_serve.audio.windows import plan_windows
from avex_serve.configs import ProbeConfig
from avex_serve.errors import AudioError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import build_probe_from_config, save_probe
from avex_serve.models.probes.storage import load_head
from avex_serve.synthetic import LABELS, make_clip, make_recording

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
BATCH = 16


def main() -> None:
    """Read, embed, train, test, save, use."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    clips, recording = args.clips, args.recording
    if clips is None:
        clips = Path("synthetic_clips")
        write_clips(clips, args.seed)
    if recording is None:
        recording = Path("synthetic_recording.wav")
        wave, _ = make_recording(args.seed, seconds=20.0)
        soundfile.write(recording, wave, 16000)

    # Embed every clip once: the backbone is frozen, so its embeddings never change.
    base = load_model(args.model, return_features_only=True)
    labels, waves, targets, origins = read_clips(clips, base)
    config = ProbeConfig(probe_type="linear", target_layers=["last_layer"], aggregation="mean")
    embeddings = embed(base, waves, config)  # (N, D)

    # Hold out every fourth clip of each label with all its windows, train on the others.
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(len(labels)):
        test |= torch.isin(origins, origins[targets == label].unique()[3::4])
    head = build_probe_from_config(config, len(labels), "cpu", input_dim=embeddings.shape[1]).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(args.epochs):
        for batch in (~test).nonzero()[:, 0][torch.randperm(int((~test).sum()))].split(BATCH):
            loss = F.cross_entropy(head(embeddings[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        right = (head.eval()(embeddings[test]).argmax(dim=1) == targets[test]).sum().item()
    print(f"{len(origins.unique())} clips of {len(labels)} labels make {len(targets)} windows", end="; ")
    print(f"{right} of {int(test.sum())} held-out windows are right")

    # Put the head on the backbone, and save it.
    probe = build_probe_from_config(config, len(labels), "cpu", base_model=base).eval()
    load_head(probe, head.state_dict(), "the trained head")
    save_probe(probe, args.output, labels=labels, model=args.model, activation="softmax")
    print(f"wrote {args.output}; export it: avex-export --probe {args.output}")

    # Label the recording, window by window.
    wave, rate = read(recording, base)
    plan = plan_windows(wave.size, base.clip_samples, rate, overlap=0.0)
    with torch.no_grad():
        logits = [probe(torch.from_numpy(window)[None]) for window in plan.cut(wave)]
    scores = torch.cat(logits).softmax(dim=1)  # (windows, labels)
    for (start, end), row in zip(plan.spans, scores, strict=True):
        print(f"{start:6.1f} – {end:5.1f} s  {row.max():.2f}  {labels[row.argmax()]}")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train a probe on labelled clips and use it on a recording.")
    parser.add_argument(
        "--clips", type=Path, help="a folder with one folder of clips per label (default: synthetic)"
    )
    parser.add_argument("--recording", type=Path, help="the recording to label (default: a synthetic one)")
    parser.add_argument("--model", default="avex_demo", help="the backbone, a registered name or a YAML file")
    parser.add_argument("--output", type=Path, default=Path("my_probe"), help="where the probe is saved")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_clips(folder: Path, seed: int) -> None:
    """Write twelve synthetic clips of each sound, and of the background alone."""
    rng = np.random.default_rng(seed)
    sounds: dict[str, list[str]] = {**{label: [label] for label in LABELS}, "background": []}
    for label, parts in sounds.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            clip = make_clip(rng, parts, snr_db=rng.uniform(0, 20))
            soundfile.write(folder / label / f"{i:03}.wav", clip, 16000)


def read_clips(folder: Path, base: ModelBase) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The labels, the windows (N, S) in [-1, 1] of all clips, and the label and the clip of each window (N,)."""
    files = sorted(
        path for path in folder.glob("*/*") if path.suffix.lower() in AUDIO and not path.name.startswith(".")
    )
    windows: list[tuple[np.ndarray, str, int]] = []
    for i, path in enumerate(files):
        try:
            wave, rate = read(path, base)
        except AudioError as error:
            print(f"left out: {error}")
            continue
        plan = plan_windows(wave.size, base.clip_samples, rate, overlap=0.0)
        for (start, end), window in zip(plan.spans, plan.cut(wave), strict=True):
            # Less than half a window at the end of a clip is mostly padding.
            if start == 0 or (end - start) * rate >= base.clip_samples / 2:
                windows.append((window, path.parent.name, i))
    labels = sorted({label for _, label, _ in windows})
    if len(labels) < 2:
        raise SystemExit(f"{folder} must hold a folder of audio files for each of two labels or more")
    return (
        labels,
        torch.from_numpy(np.stack([window for window, _, _ in windows])),
        torch.tensor([labels.index(label) for _, label, _ in windows]),
        torch.tensor([clip for _, _, clip in windows]),
    )


def read(path: Path, base: ModelBase) -> tuple[np.ndarray, int]:
    """A recording, mono (S,) at the model's rate, and that rate in Hz."""
    assert base.audio_config is not None
    wave, rate = decode(path)
    return resample(wave, rate, base.audio_config.sample_rate), base.audio_config.sample_rate


def embed(base: ModelBase, waves: torch.Tensor, config: ProbeConfig) -> torch.Tensor:
    """The embeddings (N, D) of clips (N, S), of the layers and with the aggregation of a configuration."""
    base.register_hooks_for_layers(config.target_layers)
    return torch.cat([base.extract_embeddings(b, aggregation=config.aggregation) for b in waves.split(BATCH)])


if __name__ == "__main__":
    main()
