"""Compare the probe types: train each on the same stored embeddings, and print its size and accuracy.

    python compare_probes.py --probes linear_last attention_all --clips 400

The probes are named variants, see ``avex-export --list``. For each, the program prints the parameters of the head,
the numbers stored for a clip, and the accuracy on test clips. The sounds are synthetic, and the demo model was
trained on similar ones. So this shows how to compare, not which probe is best for your sounds.
"""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avex_export.recipes import find_recipe, variants
from avex_serve import load_model
from avex_serve.configs import ProbeConfig
from avex_serve.models.aggregation import concatenate
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import Probe, build_probe_from_config
from avex_serve.synthetic import LABELS, make_clip

BATCH = 16
DEFAULT = ["linear_last", "linear_all", "mlp_last", "lstm_last", "attention_last", "transformer_last"]


def main() -> None:
    """Embed once, then train and test each probe."""
    args = parse_arguments()
    base = load_model("avex_demo", return_features_only=True)
    rng = np.random.default_rng(args.seed)
    train_waves, train_targets = make_clips(rng, args.clips)
    test_waves, test_targets = make_clips(rng, args.clips)
    train, test = embed_all(base, train_waves), embed_all(base, test_waves)

    print(f"{args.clips} clips to train with and {args.clips} to test with, of {len(LABELS)} labels")
    print(f"{'probe':18}{'parameters':>12}{'stored a clip':>16}{'accuracy':>10}")
    for name in args.probes:
        torch.manual_seed(args.seed)
        config = find_recipe(name).config
        stored = inputs(base, config, train)
        shapes = [tuple(embedding.shape[1:]) for embedding in stored]  # of one clip, one per layer
        head = build_probe_from_config(config, len(LABELS), "cpu", input_dim=shapes)
        fit(head, stored, train_targets, args.epochs)
        accuracy = accuracy_of(head.eval(), inputs(base, config, test), test_targets)
        parameters = sum(parameter.numel() for parameter in head.parameters())
        values = sum(math.prod(shape) for shape in shapes)
        print(f"{name:18}{parameters:12}{values:16}{accuracy:10.3f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Compare the probe types on stored embeddings.")
    parser.add_argument("--probes", nargs="+", default=DEFAULT, choices=list(variants()), metavar="NAME")
    parser.add_argument(
        "--clips", type=int, default=160, help="number of clips to train with, and the same number to test with"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_clips(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Clips (N, S) with one sound each, some of them faint, and the index of its label (N,)."""
    targets = np.arange(count) % len(LABELS)
    waves = np.stack([make_clip(rng, [LABELS[i]], snr_db=rng.uniform(-15, 5)) for i in targets])
    return torch.from_numpy(waves), torch.from_numpy(targets)


@torch.no_grad()
def embed_all(base: ModelBase, waves: Tensor) -> dict[str, Tensor]:
    """The embeddings (N, T, D) of every layer."""
    layers = base.get_model_layers()
    batches = [base.taps(batch, layers) for batch in waves.split(BATCH)]
    return {layer: torch.cat([found[layer] for found in batches]) for layer in layers}


def inputs(base: ModelBase, config: ProbeConfig, embeddings: dict[str, Tensor]) -> list[Tensor]:
    """The inputs (N, ...) of a head: the layers of its configuration, aggregated as for a probe on the backbone."""
    layers = base.resolve_layers(config.target_layers)
    merged = concatenate([embeddings[layer] for layer in layers], config.aggregation)
    return merged if isinstance(merged, list) else [merged]


def fit(head: Probe, stored: list[Tensor], targets: Tensor, epochs: int) -> None:
    """Train the head on stored embeddings."""
    optimiser = torch.optim.AdamW(head.train().parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(targets)).split(BATCH):
            loss = F.cross_entropy(head([embedding[batch] for embedding in stored]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def accuracy_of(head: Probe, stored: list[Tensor], targets: Tensor) -> float:
    """The share of clips whose highest logit is that of their label."""
    batches = zip(*(embedding.split(BATCH) for embedding in stored), strict=True)
    logits = torch.cat([head(list(batch)) for batch in batches])
    return (logits.argmax(dim=1) == targets).float().mean().item()


if __name__ == "__main__":
    main()
