"""Use a backbone of your own: a small convolutional network, trained with its probe from random weights.

    python own_backbone.py

docs/own-backbone.md describes what a backbone must have, and how to register, save and export it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avex_serve import list_model_layers
from avex_serve.configs import AudioConfig, ProbeConfig
from avex_serve.models.probes import Probe, build_probe_from_config, load_probe, save_probe
from avex_serve.synthetic import make_clip

LABELS = ["whistle", "click_train", "buzz", "hoot"]
BATCH = 16


class SmallNetwork(nn.Module):
    """Three convolutions on a log spectrogram: waveforms (B, S) to features (B, T, 32)."""

    audio_config = AudioConfig(sample_rate=16000, representation="raw", target_length_seconds=2)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(512))
        self.low = nn.Conv1d(257, 64, kernel_size=5, stride=2)
        self.high = nn.Conv1d(64, 64, kernel_size=5, stride=2)
        self.mix = nn.Linear(64, 32)

    def get_model_layers(self) -> list[str]:
        """The layers that ``all`` and indices in ``target_layers`` mean."""
        return ["low", "high", "mix"]

    def forward(self, wave: Tensor) -> Tensor:
        """(B, S) to (B, T, 32)."""
        spectrum = torch.stft(wave, 512, hop_length=160, window=self.window, return_complex=True)  # (B, 257, T)
        features = (spectrum.abs() + 1e-4).log()
        features = features - features.mean(dim=(1, 2), keepdim=True)  # ignore the level of a clip
        features = self.high(self.low(features).relu()).relu()  # (B, 64, T)
        return self.mix(features.transpose(1, 2))


def main() -> None:
    """Build, train, test, save, load."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    waves, targets = make_clips(rng, args.clips)
    test_waves, test_targets = make_clips(rng, 80)

    network = SmallNetwork()
    print("layers:", ", ".join(list_model_layers(network)["layers"]))
    # freeze_backbone=False: its weights are random, so it is trained together with the head.
    config = ProbeConfig(probe_type="linear", target_layers=["mix"], aggregation="max", freeze_backbone=False)
    probe = build_probe_from_config(config, len(LABELS), "cpu", base_model=network)
    print(f"accuracy before training {accuracy_of(probe, test_waves, test_targets):.2f}")
    optimiser = torch.optim.AdamW(probe.train().parameters(), lr=2e-3)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(targets)).split(BATCH):
            loss = F.cross_entropy(probe(waves[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    print(f"accuracy after training  {accuracy_of(probe, test_waves, test_targets):.2f}")

    # The folder holds the backbone's weights too, since they were trained. To load it, give the module.
    save_probe(probe, args.output, labels=LABELS, activation="softmax")
    loaded = load_probe(args.output, base_model=SmallNetwork())
    print(f"accuracy of {args.output}, loaded: {accuracy_of(loaded, test_waves, test_targets):.2f}")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train a probe on a backbone of your own.")
    parser.add_argument("--clips", type=int, default=240, help="synthetic clips to train with")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("my_probe"), help="where the probe is saved")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_clips(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Clips (N, S) with one sound each, and the index of its label (N,)."""
    targets = np.arange(count) % len(LABELS)
    waves = np.stack([make_clip(rng, [LABELS[i]], snr_db=rng.uniform(5, 20)) for i in targets])
    return torch.from_numpy(waves), torch.from_numpy(targets)


@torch.no_grad()
def accuracy_of(probe: Probe, waves: Tensor, targets: Tensor) -> float:
    """The share of clips whose highest logit is that of their label."""
    return (probe.eval()(waves).argmax(dim=1) == targets).float().mean().item()


if __name__ == "__main__":
    main()
