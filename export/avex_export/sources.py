"""What a user asked to export, and where it is: the head's weights and labels."""

from dataclasses import dataclass
from pathlib import Path

import avex_serve
from avex_export.recipes import Recipe
from avex_serve.bundles.reading import parse_labels
from avex_serve.errors import BundleError, ExportError, InputError, NotFoundError
from avex_serve.models.probes.storage import WEIGHTS, SavedProbe, read_labels, read_saved

DEFAULT_MODEL = "avex_demo"
_DEMO_PROBES = Path(avex_serve.__file__).parent / "demo" / "probes"


@dataclass(frozen=True)
class Request:
    """What a user asked to export."""

    recipes: tuple[Recipe, ...]  # of one backbone
    model: str | None = None  # a registered name or a YAML file; None: the saved probes', else the demo model
    weights: Path | None = None  # of the one head: a file, or a saved probe's folder
    labels: Path | None = None
    clip_seconds: float | None = None
    dynamic_length: bool = False  # a graph for clips of any length
    padding_mask: bool = False  # a graph that takes a padding mask too
    offline: bool = False
    input_dim: tuple[int, ...] | None = None  # (D,) or (T, D)
    allow_untrained: bool = False
    headless: bool = False  # the embeddings that the heads read, without the heads
    half: bool = False  # the TorchScript graph in float16
    int8: bool = False  # a graph in 8-bit integers too
    calibration: Path | None = None  # a folder of recordings for it; None: built-in sounds
    name: str | None = None  # of the bundle; None: the probe's, or after the backbone
    version: str = "1"  # of the bundle


@dataclass(frozen=True)
class Source:
    """A recipe, its weights and its labels."""

    recipe: Recipe
    path: Path | None  # a file or a saved probe's folder; None: random weights
    saved: SavedProbe | None  # what the folder says
    labels: tuple[str, ...]

    @property
    def weights(self) -> Path | None:
        """The file with the head's weights."""
        return self.path if self.saved is None or self.path is None else self.path / WEIGHTS


def find_source(request: Request, recipe: Recipe) -> Source:
    """Where a recipe's weights and labels are.

    Raises:
        ExportError: weights or labels are missing, or don't fit.
        InputError: a file holds no labels.
        NotFoundError: a file that was named is not there.
    """
    path = _weights(request, recipe)
    saved = read_saved(path) if path is not None and path.is_dir() else None
    if saved is not None and saved.probe_config.probe_type != recipe.config.probe_type:
        raise ExportError(
            f"{path} holds a {saved.probe_config.probe_type} probe, {recipe.name} is a {recipe.config.probe_type} "
            "probe; export the folder itself (--probe FOLDER)"
        )
    if request.headless:
        # Of the head nothing is exported, but it is built to see what it reads: one class will do.
        return Source(recipe, path, saved, ("",))
    labels = _labels(request, recipe, path, saved)
    if saved is not None and len(labels) != saved.num_classes:
        raise ExportError(
            f"--labels {request.labels} has {len(labels)} labels, the probe {recipe.name} has {saved.num_classes} "
            "classes"
        )
    return Source(recipe, path, saved, labels)


def _weights(request: Request, recipe: Recipe) -> Path | None:
    """The file or folder with the head's weights, or None for random ones."""
    if request.weights is not None:
        if not request.weights.exists():
            raise NotFoundError(f"--weights {request.weights}: no such file or folder")
        return request.weights
    if recipe.folder is not None:
        return recipe.folder
    if request.allow_untrained:
        return None
    demo = _DEMO_PROBES / recipe.name
    if request.model in (None, DEFAULT_MODEL) and demo.is_dir():
        return demo
    if request.headless:
        return None
    raise ExportError(
        f"no trained weights for {recipe.name} on {request.model or DEFAULT_MODEL}. Train the probe and "
        "write it with save_probe(), then export that folder (--probe FOLDER); or give the head's state dict "
        "(--weights FILE.safetensors); or export random weights to try the way (--allow-untrained)"
    )


def _labels(request: Request, recipe: Recipe, source: Path | None, saved: SavedProbe | None) -> tuple[str, ...]:
    if request.labels is not None:
        return read_label_file(request.labels)
    folder = source if saved is not None else None
    if folder is None and source is None and request.model in (None, DEFAULT_MODEL):
        folder = _DEMO_PROBES / "linear_last"  # random heads for the demo model name its sounds
        saved = read_saved(folder)
    labels = None if folder is None or saved is None else read_labels(folder, saved.num_classes)
    if labels is None and len(request.recipes) > 1 and any(each.saved is not None for each in request.recipes):
        raise ExportError(
            f"no labels for {recipe.name}, and beside saved probes --labels can't give them; write it with "
            "save_probe() and its labels and give that folder, or export it by itself"
        )
    if labels is None:
        raise ExportError(
            "no labels: give --labels FILE, JSON {label: index}, or text with one label a line in the logits' order"
        )
    return labels


def read_label_file(path: Path) -> tuple[str, ...]:
    """Labels from JSON ``{label: index}``, or from text with one a line.

    Raises:
        NotFoundError: no such file.
        InputError: it can't be read, or holds no labels.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"--labels {path}: no such file") from None
    except OSError as error:
        raise InputError(f"--labels {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--labels {path} is not UTF-8 text: {error}") from None
    if path.suffix == ".json":
        try:
            return parse_labels(text, source=str(path))
        except BundleError as error:
            raise InputError(f"--labels {error}") from None
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise InputError(f"--labels {path} holds no labels; expected one a line")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"--labels {path} names labels more than once: {', '.join(twice[:5])}")
    return labels
