"""Assembling: from a recipe to a probe with its weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import avex_serve
from avex_export.graph import Assembly
from avex_export.lengths import ERRORS, check_clip, check_mask, shortest_clip
from avex_export.recipes import Recipe
from avex_serve.bundle import parse_labels
from avex_serve.errors import ExportError, NotFoundError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import fingerprint, read_state_dict
from avex_serve.models.files import resolve_file
from avex_serve.models.probes import Probe, build_probe_from_config
from avex_serve.models.probes.storage import (
    WEIGHTS,
    SavedProbe,
    backbone_of,
    check_backbone,
    load_head,
    read_labels,
    read_saved,
)
from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.models.utils.registry import ModelEntry

DEFAULT_MODEL = "avex_demo"
_DEMO_PROBES = Path(avex_serve.__file__).parent / "demo" / "probes"


@dataclass(frozen=True)
class Request:
    """What a user asked to export."""

    recipe: Recipe
    model: str | None = None  # a registered name or a YAML file; None: the saved probe's, else the demo model
    weights: Path | None = None  # of the head: a file, or a saved probe's folder
    labels: Path | None = None
    clip_seconds: float | None = None
    dynamic_length: bool = False  # a graph for clips of any length
    padding_mask: bool = False  # a graph that takes a padding mask too
    offline: bool = False
    input_dim: tuple[int, ...] | None = None  # (D,) or (T, D)
    allow_untrained: bool = False
    half: bool = False  # the TorchScript graph in float16
    int8: bool = False  # a graph in 8-bit integers too
    calibration: Path | None = None  # a folder of recordings for it; None: built-in sounds


def assemble(request: Request) -> Assembly:
    """Find the weights and labels, build the probe and load it.

    Raises:
        ExportError: weights or labels are missing, or don't fit.
        NotFoundError: a file that was named is not there.
    """
    recipe = request.recipe
    if request.model is not None:
        _find_model(request.model)
    source = _weights_folder(request)
    saved = read_saved(source) if source is not None and source.is_dir() else None
    if saved is not None and saved.probe_config.probe_type != recipe.config.probe_type:
        raise ExportError(
            f"{source} holds a {saved.probe_config.probe_type} probe, {recipe.name} is a {recipe.config.probe_type} "
            "probe; export the folder itself (--probe FOLDER)"
        )
    labels = _labels(request, source, saved)
    if saved is not None and len(labels) != saved.num_classes:
        raise ExportError(
            f"--labels {request.labels} has {len(labels)} labels, the probe {saved.num_classes} classes"
        )
    state_file = source / WEIGHTS if saved is not None and source is not None else source
    model, entry = _model(request, saved)
    try:
        if request.offline:
            probe, clip_samples, sample_rate = _offline_probe(request, saved, len(labels)), None, None
        else:
            probe, clip_samples, sample_rate = _online_probe(request, entry, saved, source, len(labels))
        if state_file is not None:
            load_head(probe, read_state_dict(resolve_file(str(state_file))), str(state_file))
    except ERRORS as error:
        raise ExportError(f"the probe {recipe.name} can't be built on {model}: {error}") from error
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ExportError(str(error)) from error
    probe.eval()
    shortest = None
    if clip_samples is not None:
        shortest = shortest_clip(probe, clip_samples) if request.dynamic_length else None
        if request.padding_mask:
            check_mask(probe, clip_samples)
    licence = entry.licence
    if request.offline and request.model is None and (saved is None or saved.model is None):
        model, licence = "unknown", "unknown"  # it may have been trained on the embeddings of any backbone
    return Assembly(
        name=recipe.name,
        probe=probe,
        labels=labels,
        trained=state_file is not None,
        model=model,
        checkpoint=_checkpoint(probe, saved),
        licence=licence,
        embedding_fingerprint=_embedding_fingerprint(probe, saved),
        clip_samples=clip_samples,
        sample_rate=sample_rate,
        half=request.half,
        shortest_samples=shortest,
        masked=request.padding_mask,
    )


def _weights_folder(request: Request) -> Path | None:
    """The file or folder with the head's weights, or None for random ones."""
    if request.weights is not None:
        if not request.weights.exists():
            raise NotFoundError(f"--weights {request.weights}: no such file or folder")
        return request.weights
    if request.recipe.folder is not None:
        return request.recipe.folder
    if request.allow_untrained:
        return None
    demo = _DEMO_PROBES / request.recipe.name
    if request.model in (None, DEFAULT_MODEL) and demo.is_dir():
        return demo
    raise ExportError(
        f"no trained weights for {request.recipe.name} on {request.model or DEFAULT_MODEL}. Train the probe and "
        "write it with save_probe(), then export that folder (--probe FOLDER); or give the head's state dict "
        "(--weights FILE.safetensors); or export random weights to try the way (--allow-untrained)"
    )


def _labels(request: Request, source: Path | None, saved: SavedProbe | None) -> tuple[str, ...]:
    if request.labels is not None:
        return read_label_file(request.labels)
    folder = source if saved is not None else None
    if folder is None and source is None and request.model in (None, DEFAULT_MODEL):
        folder = _DEMO_PROBES / "linear_last"  # random heads for the demo model name its sounds
        saved = read_saved(folder)
    labels = None if folder is None or saved is None else read_labels(folder, saved.num_classes)
    if labels is None:
        raise ExportError(
            "no labels: give --labels FILE, JSON {label: index}, or text with one label a line in the logits' order"
        )
    return labels


def read_label_file(path: Path) -> tuple[str, ...]:
    """Labels from JSON ``{label: index}``, or from text with one a line.

    Raises:
        NotFoundError: no such file.
        ExportError: no labels in it.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise NotFoundError(f"--labels {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ExportError(f"--labels {path} is not UTF-8 text: {error}") from None
    if path.suffix == ".json":
        return parse_labels(text, source=str(path))
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise ExportError(f"--labels {path} holds no labels; expected one a line")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ExportError(f"--labels {path} names labels more than once: {', '.join(twice[:5])}")
    return labels


def _model(request: Request, saved: SavedProbe | None) -> tuple[str, ModelEntry]:
    """The backbone's name and how to get it: as asked for, else the saved probe's, else the demo model."""
    if request.model is None and saved is not None:
        if (backbone := backbone_of(saved)) is not None:
            return backbone
        if not request.offline:
            raise ExportError(
                "the saved probe doesn't say which backbone it belongs to; give --model, or --offline to serve "
                "embeddings"
            )
    return _find_model(request.model or DEFAULT_MODEL)


def _find_model(name: str) -> tuple[str, ModelEntry]:
    try:
        return Path(name).stem if name.endswith((".yml", ".yaml")) else name, find_entry(name)
    except (ValueError, FileNotFoundError) as error:
        raise NotFoundError(f"--model {name}: {error}") from error


def _online_probe(
    request: Request, entry: ModelEntry, saved: SavedProbe | None, source: Path | None, classes: int
) -> tuple[Probe, int, int]:
    config = request.recipe.config
    if not config.freeze_backbone and saved is not None:  # the saved probe holds the backbone's weights
        base: ModelBase = build_model_from_spec(entry.spec, "cpu", return_features_only=True)
    else:
        base = load_model(entry.spec, "cpu", entry.checkpoint_path, return_features_only=True)
        if saved is not None and source is not None:
            check_backbone(saved, base, source)
    if base.audio_config is None:
        raise ExportError(f"model {entry.description} has no audio_config, so its sample rate is unknown; add one")
    rate = base.audio_config.sample_rate
    if request.clip_seconds is not None:
        samples = round(request.clip_seconds * rate)
    else:
        samples = (saved.target_length if saved is not None else None) or config.target_length or base.clip_samples
    if samples < 1:
        raise ExportError(f"--clip-seconds {request.clip_seconds} is less than one sample; give seconds")
    check_clip(base, samples, rate)
    probe = build_probe_from_config(config, classes, "cpu", base_model=base, target_length=samples)
    return probe, samples, rate


def _offline_probe(request: Request, saved: SavedProbe | None, classes: int) -> Probe:
    input_dim: Sequence[Sequence[int]] | None = [request.input_dim] if request.input_dim else None
    if input_dim is None and saved is not None:
        input_dim = saved.input_dim
    if input_dim is None:
        raise ExportError("--offline needs --input-dim D, or T,D: the shape of one embedding")
    if len(input_dim) > 1 or len(saved.layers or [] if saved is not None else []) > 1:
        raise ExportError(
            f"{request.recipe.name} merges several layers, but an embedding bundle takes one embedding; use a _last "
            "variant, or serve it from audio"
        )
    (shape,) = input_dim
    width = shape[0] if len(shape) == 1 else tuple(shape)
    return build_probe_from_config(request.recipe.config, classes, "cpu", input_dim=width)


def _checkpoint(probe: Probe, saved: SavedProbe | None) -> str | None:
    if probe.base_model is not None and probe.base_model.checkpoint_uri is not None:
        return probe.base_model.checkpoint_uri
    return saved.checkpoint if saved is not None else None


def _embedding_fingerprint(probe: Probe, saved: SavedProbe | None) -> str | None:
    """Digest of what makes the embedding: backbone, layers, aggregation and, of several layers, their weights."""
    backbone = fingerprint(probe.base_model) if probe.base_model is not None else None
    layers: Sequence[str] | None = probe.layers
    if probe.base_model is None:
        backbone = saved.backbone_fingerprint if saved is not None else None
        layers = saved.layers if saved is not None else None
    if backbone is None or layers is None:
        return None
    merging = {n: _digest(t) for n, t in probe.head_state().items() if n.startswith(("layer_w", "embedding_p"))}
    parts = [backbone, list(layers), probe.aggregation, probe.input_processing, merging]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
