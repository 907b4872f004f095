"""Train a probe on a folder of labelled clips, save it, and use it to label the windows of a recording.

    python train_probe.py --clips my_clips --recording my_recording.wav

The folder has a folder of WAV, FLAC, OGG or MP3 files for each label::

    my_clips/bat/001.wav
    my_clips/bat/002.wav
    my_clips/bee/001.wav

Give a label such as ``background`` to clips without a call, because the probe chooses one label for every window.
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
    labels, waves, targets = read_clips(clips, base)
    config = ProbeConfig(probe_type="linear", target_layers=["last_layer"], aggregation="mean")
    embeddings = embed(base, waves, config)  # (N, D)

    # Hold out every fourth clip of each label, train on the others.
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(len(labels)):
        test[(targets == label).nonzero()[3::4]] = True
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
    print(f"{len(targets)} clips of {len(labels)} labels; {right} of {int(test.sum())} held-out clips are right")

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


def read_clips(folder: Path, base: ModelBase) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The labels, the clips (N, S) in [-1, 1] at the model's length and rate, and the label of each (N,)."""
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in AUDIO)
    labels = sorted({path.parent.name for path in files})
    if len(labels) < 2:
        raise SystemExit(f"{folder} must hold a folder of audio files for each of two labels or more")
    waves = torch.zeros(len(files), base.clip_samples)
    for i, path in enumerate(files):
        wave = read(path, base)[0][: base.clip_samples]  # longer clips are cut, shorter ones padded with zeros
        waves[i, : wave.size] = torch.from_numpy(wave)
    return labels, waves, torch.tensor([labels.index(path.parent.name) for path in files])


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
