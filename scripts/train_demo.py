"""Train the demo model: synthesise sounds, train the backbone, train ten probes on it, and print their accuracy.

``python scripts/train_demo.py`` takes minutes on two CPU cores. It writes ``official_models/avex_demo.safetensors``
and ``demo/probes/<name>`` into the package. The model is for trying the software, not for the field.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from avex_serve import build_model_from_spec, get_model_spec, load_model
from avex_serve.models.aggregation import concatenate
from avex_serve.models.base_model import ModelBase
from avex_serve.models.beats_model import BEATsModel
from avex_serve.models.probes import Probe, build_probe_from_config, load_probe_config, save_probe
from avex_serve.models.probes.storage import load_head
from avex_serve.synthetic import LABELS, WINDOW_SECONDS, Event, make_clip_with_events

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "avex_serve"
RECIPES = ROOT / "export" / "avex_export" / "recipes"
MODEL = "avex_demo"

SAMPLE_RATE = 16000  # Hz
CLASSES = len(LABELS)
SOUNDS_IN_A_CLIP = (0.1, 0.7, 0.2)  # probability of none, one, two
SNR_DB = (-5.0, 25.0)
# Some clips are shorter and padded with zeros, like the last window of a recording.
SHORTER, SHORTEST_SECONDS = 0.15, 0.8
# Some are digital silence, some of them after a few samples of noise, as a window has them behind a recording's end.
SILENT, SILENT_AFTER_SECONDS = 0.05, 0.1

BACKBONE_CLIPS, PROBE_CLIPS, TEST_CLIPS = 16000, 4000, 1200
BATCH = 16
BACKBONE_EPOCHS = 5
# A head on the mean over time is cheap. One on the sequence costs as much as a block of the backbone.
POOLED_EPOCHS, SEQUENCE_EPOCHS = 20, 2
BACKBONE_RATE, PROBE_RATE = 1e-3, 3e-3
THREADS = 2

# A token covers 16 frames of 10 ms and 16 of the 128 mel bins; tokens are ordered by time, then by frequency.
STEP_SECONDS, BANDS, PATCH = 0.16, 8, 16
STEPS = int(WINDOW_SECONDS / STEP_SECONDS)


@dataclass(frozen=True)
class Clips:
    """Clips and the sounds in them."""

    waves: Tensor  # (N, S) float32 in [-1, 1]
    targets: Tensor  # (N, classes) 1 if the clip has the sound
    step_targets: Tensor  # (N, STEPS, classes) 1 if the time step has the sound
    snr_db: NDArray[np.float64]  # (N,)

    @property
    def single(self) -> NDArray[np.bool_]:
        """(N,) whether a clip has exactly one sound."""
        return self.targets.sum(dim=1).numpy() == 1


def main() -> None:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PACKAGE, help="folder for what is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probes", action="store_true", help="train the probes again, on the package's backbone")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    clock = Clock()

    weights = (PACKAGE if args.probes else args.output) / "official_models" / f"{MODEL}.safetensors"
    if not args.probes:
        train = synthesise(np.random.default_rng([args.seed, 0]), BACKBONE_CLIPS)
        clock.say(f"synthesised {BACKBONE_CLIPS} clips to train the backbone with")
        save_backbone(train_backbone(train, clock), weights)
    probe_train, test = (
        synthesise(np.random.default_rng([args.seed, i]), count)
        for i, count in enumerate((PROBE_CLIPS, TEST_CLIPS), 1)
    )
    clock.say(f"synthesised {PROBE_CLIPS} clips to train the probes with and {TEST_CLIPS} to test with")
    base = load_model(MODEL, checkpoint_path=str(weights), return_features_only=True)
    clock.say(f"loaded {weights}, {weights.stat().st_size / 1e6:.2f} MB")

    layers = base.get_model_layers()
    embeddings, test_embeddings = (tap_all(base, clips.waves, layers) for clips in (probe_train, test))
    clock.say(f"computed {len(layers)} layers of {PROBE_CLIPS + TEST_CLIPS} clips")

    table = [HEADER]
    for recipe in sorted(RECIPES.glob("*.yml")):
        probe = build_probe_from_config(load_probe_config(recipe), CLASSES, "cpu", base_model=base)
        head = train_head(probe, embeddings, probe_train.targets, recipe.stem, clock)
        load_head(probe, head.state_dict(), f"the head trained as {recipe.stem}")
        logits = predict(head, input_of(probe, test_embeddings))
        check_agreement(probe.eval(), logits, test.waves)
        save_probe(
            probe, args.output / "demo" / "probes" / recipe.stem, labels=LABELS, model=MODEL, activation="sigmoid"
        )
        table.append(evaluate(recipe.stem, logits, test))
    clock.say("done\n")
    print("\n".join(table))


class Clock:
    """Prints the finished steps with the time."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, what: str) -> None:
        """Print a step with the seconds since the start."""
        print(f"{time.monotonic() - self._start:5.0f} s  {what}", flush=True)


# -- sounds -----------------------------------------------------------------------------------------------------


def synthesise(rng: Generator, count: int) -> Clips:
    """`count` clips of a window's length, with none, one or two sounds each."""
    waves = torch.zeros(count, int(WINDOW_SECONDS * SAMPLE_RATE))
    step_targets = torch.zeros(count, STEPS, CLASSES)
    snr_db = rng.uniform(*SNR_DB, size=count)
    for i in range(count):
        if rng.random() < SILENT:
            seconds = max(0.0, rng.uniform(-SILENT_AFTER_SECONDS, SILENT_AFTER_SECONDS))  # half of them: no sample
            clip, _ = make_clip_with_events(
                rng, [], snr_db=snr_db[i], seconds=WINDOW_SECONDS, sample_rate=SAMPLE_RATE
            )
            waves[i, : int(seconds * SAMPLE_RATE)] = torch.from_numpy(clip[: int(seconds * SAMPLE_RATE)])
            continue
        labels = rng.choice(LABELS, size=rng.choice(3, p=SOUNDS_IN_A_CLIP), replace=False).tolist()
        seconds = rng.uniform(SHORTEST_SECONDS, WINDOW_SECONDS) if rng.random() < SHORTER else WINDOW_SECONDS
        clip, events = make_clip_with_events(rng, labels, snr_db=snr_db[i], seconds=seconds, sample_rate=SAMPLE_RATE)
        waves[i, : clip.size] = torch.from_numpy(clip)
        for event in events:
            step_targets[i, _steps(event), LABELS.index(event.label)] = 1
    return Clips(waves, step_targets.amax(dim=1), step_targets, snr_db)


def _steps(event: Event) -> slice:
    return slice(int(event.start / STEP_SECONDS), int(np.ceil(event.end / STEP_SECONDS)))


# -- the backbone -----------------------------------------------------------------------------------------------


def train_backbone(clips: Clips, clock: Clock) -> ModelBase:
    """Train the backbone end to end, with three linear heads that are discarded afterwards.

    One head is on the mean of the last layer that probes tap, one on the mean of the output, and one on the output
    of each time step. The last head learns when a sound occurs, which halves the number of clips needed.
    """
    spec = get_model_spec(MODEL)
    assert spec is not None
    base = build_model_from_spec(spec, "cpu", return_features_only=True).train()
    assert isinstance(base, BEATsModel)
    start_with_cosines(base.backbone.patch_embedding)
    width = base.backbone.cfg.encoder_embed_dim
    layer_head, clip_head, step_head = (nn.Linear(width, CLASSES) for _ in range(3))

    def loss(batch: Tensor) -> Tensor:
        taps = base.taps(clips.waves[batch], [base.last_layer_name, "backbone"])
        steps = taps["backbone"].unflatten(1, (STEPS, BANDS)).mean(dim=2)  # (B, STEPS, D)
        layer_logits, clip_logits = layer_head(taps[base.last_layer_name].mean(dim=1)), clip_head(steps.mean(dim=1))
        return (
            F.binary_cross_entropy_with_logits(layer_logits, clips.targets[batch])
            + F.binary_cross_entropy_with_logits(clip_logits, clips.targets[batch])
            + 3 * F.binary_cross_entropy_with_logits(step_head(steps), clips.step_targets[batch])
        )

    modules = nn.ModuleList([base, layer_head, clip_head, step_head])
    fit(modules, loss, len(clips.waves), BACKBONE_EPOCHS, BACKBONE_RATE, "backbone", clock)
    return base.eval()


def start_with_cosines(patch_embedding: nn.Conv2d) -> None:
    """Start with the slowest two-dimensional cosines as filters, without the constant one.

    Then the patch embedding ignores the level from the start, and training needs fewer clips.
    """
    place = (np.arange(PATCH) + 0.5) / PATCH
    cosines = np.cos(np.pi * np.arange(PATCH)[:, None] * place)  # (order, place)
    orders = sorted(np.ndindex(PATCH, PATCH), key=sum)[1 : patch_embedding.out_channels + 1]
    filters = np.stack([np.outer(cosines[i], cosines[j]) for i, j in orders])  # (E, PATCH, PATCH)
    filters /= np.linalg.norm(filters, axis=(1, 2), keepdims=True)
    with torch.no_grad():
        patch_embedding.weight.copy_(torch.from_numpy(filters)[:, None])


def save_backbone(base: ModelBase, path: Path) -> None:
    """Write the backbone's weights, cloned: the blocks share a table, and safetensors refuses shared memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in base.state_dict().items()}
    about = {"format": "pt", "description": "backbone of avex_demo, made by scripts/train_demo.py", "licence": "MIT"}
    save_file(state, path, metadata=about)


# -- the probes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def tap_all(base: ModelBase, waves: Tensor, layers: list[str]) -> dict[str, Tensor]:
    """(N, T, D) of each layer."""
    batches = [base.taps(batch, layers) for batch in waves.split(BATCH)]
    return {layer: torch.cat([found[layer] for found in batches]) for layer in layers}


def input_of(probe: Probe, embeddings: dict[str, Tensor]) -> list[Tensor]:
    """The inputs (N, ...) of the probe's offline copy: its layers, aggregated as by the probe."""
    assert probe.config is not None
    merged = concatenate([embeddings[layer] for layer in probe.layers], probe.config.aggregation)
    return merged if isinstance(merged, list) else [merged]


def train_head(probe: Probe, embeddings: dict[str, Tensor], targets: Tensor, name: str, clock: Clock) -> Probe:
    """Train an offline copy of the probe on stored embeddings, without running the backbone."""
    assert probe.config is not None
    twin = build_probe_from_config(probe.config, CLASSES, "cpu", input_dim=probe.input_dim).train()
    stored = input_of(probe, embeddings)

    def loss(batch: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(twin([e[batch] for e in stored]), targets[batch])

    epochs = SEQUENCE_EPOCHS if twin.takes_sequence else POOLED_EPOCHS
    fit(twin, loss, len(targets), epochs, PROBE_RATE, name, clock)
    return twin.eval()


@torch.no_grad()
def predict(head: Probe, embeddings: list[Tensor]) -> Tensor:
    """Logits (N, classes) of stored embeddings."""
    batches = zip(*(e.split(BATCH) for e in embeddings), strict=True)
    return torch.cat([head(list(batch)) for batch in batches])


@torch.no_grad()
def check_agreement(probe: Probe, logits: Tensor, waves: Tensor) -> None:
    """Raise AssertionError if the logits of a probe on its backbone and on stored embeddings differ."""
    torch.testing.assert_close(probe(waves[:BATCH]), logits[:BATCH], rtol=1e-4, atol=1e-4)


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    rate: float,
    name: str,
    clock: Clock,
) -> None:
    """Minimise the loss of batches, given as indices (B,) of clips."""
    steps = epochs * (count // BATCH)
    # The default of 0.999 averages squared gradients over a thousand steps, which is as long as a run.
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        order = torch.randperm(count)[: count // BATCH * BATCH]
        total = 0.0
        for batch in order.split(BATCH):
            value = loss(batch)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += value.item()
        if (epoch + 1) % max(1, epochs // 2) == 0:
            clock.say(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / (count // BATCH):.4f}")


# -- accuracy ---------------------------------------------------------------------------------------------------

HEADER = f"""{"":16} |  top-1 of one sound, by SNR in dB  | named | false | macro
{"probe":16} |   all    below 0   0-10  above 10 | >= .5 | alarm |  AP"""


def evaluate(name: str, logits: Tensor, clips: Clips) -> str:
    """A row of the table.

    The columns: top-1 accuracy on clips with one sound. Among those above 10 dB, the share whose sound has a score
    of at least 0.5. Among all clips, the share in which an absent sound has such a score. Average precision on all
    clips, averaged over the classes.
    """
    scores, targets = logits.sigmoid().numpy(), clips.targets.numpy()
    right = scores.argmax(axis=1) == targets.argmax(axis=1)
    bands = (clips.snr_db < 100, clips.snr_db < 0, (clips.snr_db >= 0) & (clips.snr_db <= 10), clips.snr_db > 10)
    accuracies = [right[clips.single & band].mean() for band in bands]
    audible = clips.single & bands[-1]
    named = (scores[audible][targets[audible] == 1] >= 0.5).mean()
    alarm = ((scores >= 0.5) & (targets == 0)).any(axis=1).mean()
    precision = np.mean([average_precision(scores[:, i], targets[:, i]) for i in range(CLASSES)])
    cells = "".join(f"{accuracy:9.3f}" for accuracy in accuracies)
    return f"{name:16} |{cells} | {named:.3f} | {alarm:.3f} | {precision:.3f}"


def average_precision(scores: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Mean, over the clips (N,) with the sound, of the precision among those with at least the same score."""
    ranked = targets[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, ranked.size + 1)
    return float(precision[ranked == 1].mean())


if __name__ == "__main__":
    main()
