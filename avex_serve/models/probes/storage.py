"""A probe as a folder: ``probe.yml``, ``model.safetensors``, ``labels.json``.

The weights are the head's if the backbone was frozen, else those of head and backbone. The folder records the
fingerprint of a frozen backbone, which is checked when the head is put on a backbone again.
"""

import copy
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import nn

from avex_serve.bundles.manifest import LABELS, PROBE, Activation
from avex_serve.bundles.reading import check_labels, parse_labels
from avex_serve.bundles.sealing import dump_labels
from avex_serve.configs import ModelSpec, ProbeConfig
from avex_serve.models.base_model import Backbone, ModelBase, adapt
from avex_serve.models.checkpoints import (
    StateDict,
    brought_to,
    differing,
    fingerprint,
    load_strictly,
    plain_names,
    read_state_dict,
    some,
)
from avex_serve.models.probes.base import Probe, Shape
from avex_serve.models.probes.utils.factory import build_probe_from_config
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.models.utils.registry import ModelEntry, build_model_from_spec, get_entry
from avex_serve.writing import atomic_directory

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# What turns logits into the scores that a loss trains, by the names of torch's losses.
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "softmax": "softmax",
    "cross_entropy": "softmax",
    "CrossEntropyLoss": "softmax",
    "sigmoid": "sigmoid",
    "binary_cross_entropy_with_logits": "sigmoid",
    "BCEWithLogitsLoss": "sigmoid",
    "none": "none",
}
# A probe doesn't include the backbone's own classifier.
_UNUSED = ("base_model.classifier.", "base_model.model.classifier.")


class ModelSource(BaseModel):
    """A backbone that is not registered: how to build it, and where its weights are."""

    model_config = ConfigDict(extra="forbid")

    name: str
    licence: str
    model_spec: ModelSpec
    checkpoint_path: str | None = None


class SavedProbe(BaseModel):
    """The content of ``probe.yml``."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    probe_config: ProbeConfig
    num_classes: int
    activation: Activation | None = None  # turns logits into scores, as in the training; None: unknown
    model: str | ModelSource | None = None  # a registered name, or how to build it; None: unknown
    backbone_fingerprint: str | None = None  # None: trained offline
    backbone_dtype: str | None = None  # of the weights with that fingerprint; None: float32
    checkpoint: str | None = None  # URI of the backbone's weights, with revision; None: local or unknown
    layers: list[str] | None = None  # online: the names for target_layers
    input_dim: list[Shape] | None = None  # offline only
    target_length: int | None = None  # online only, in samples


def save_probe(
    probe: Probe | nn.Module,
    directory: str | os.PathLike[str],
    labels: Sequence[str] | Mapping[str, int] | None = None,
    model: str | Path | ModelSpec | None = None,
    activation: str | None = None,
) -> None:
    """Write a probe to a folder, completely or not at all. A probe that is there is replaced.

    Args:
        probe: made by `build_probe_from_config`; torch.compile and DataParallel may have wrapped it.
        directory: the folder.
        labels: names of the classes in the order of the logits, or ``{label: index}``; None: the probe's own.
        model: the argument with which its backbone was loaded, so that `load_probe` and the exporter can load it.
        activation: what turns logits into scores, by the loss of the training: ``softmax`` after cross entropy (one
            label a clip), ``sigmoid`` after binary cross entropy (any number of labels), ``none`` for raw logits, or
            the name of torch's loss, in any case. None: the probe's own; the exporter
            asks for it if that is None too.

    Raises:
        ValueError: a probe without its configuration; a head of zeros, or with values that are not finite; another
            number of labels than of classes, an empty label or one that is there twice; an unknown activation.
        TypeError: something other than a probe, or labels without an order.
        FileExistsError: the folder holds something other than a probe.
    """
    probe = _unwrapped(probe)
    if probe.config is None:
        raise ValueError("this probe has no configuration; build it with build_probe_from_config()")
    names = probe.labels if labels is None else _in_order(labels)
    if names is not None and len(names) != probe.num_classes:
        raise ValueError(f"{len(names)} labels for a probe with {probe.num_classes} classes; give one per class")
    if names is not None:
        check_labels(names, "labels")
    saved = SavedProbe(format=1, probe_config=probe.config, num_classes=probe.num_classes, model=_source(model))
    saved.activation = probe.output_activation if activation is None else _activation(activation)
    if saved.activation is None:
        logger.warning(
            "the activation is not saved with the probe, and the exporter will ask for it: give save_probe "
            "activation='softmax' after training with cross entropy, or 'sigmoid' after binary cross entropy"
        )
    if probe.base_model is None:
        saved.input_dim = probe.input_dim
    else:
        saved.backbone_fingerprint = fingerprint(probe.base_model)
        saved.backbone_dtype = _cast_to(probe.base_model)
        saved.checkpoint = probe.base_model.checkpoint_uri if probe.freeze_backbone else None
        saved.layers, saved.target_length = probe.layers, probe.target_length
    state = plain_names(probe.head_state() if probe.freeze_backbone else probe.state_dict())
    _refuse_untrained(state, probe.num_classes, "the probe")
    # Cloned, since safetensors refuses tensors that share memory, as BEATs' position tables do. In float32, in which
    # probes are built when they are loaded.
    tensors = {
        n: t.detach().cpu().to(torch.float32 if t.dtype in _LOW_PRECISIONS else t.dtype, copy=True)
        for n, t in state.items()
        if not n.startswith(_UNUSED)
    }
    with atomic_directory(Path(directory), marker=PROBE) as folder:
        document = saved.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        (folder / PROBE).write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
        save_file(tensors, folder / WEIGHTS)
        if names is not None:
            (folder / LABELS).write_text(dump_labels(names), "utf-8")


def load_probe(
    directory: str | os.PathLike[str],
    base_model: ModelBase | Backbone | None = None,
    device: str = "cpu",
    checkpoint_path: str | None = None,
) -> Probe:
    """Read a probe from a folder, in eval mode, with its ``labels`` and ``output_activation`` if it has them.

    Args:
        directory: written by `save_probe`.
        base_model: the backbone, see `build_probe_from_config`; None: the one that the folder names is loaded.
        device: where to put the probe and the backbone.
        checkpoint_path: the backbone's weights, instead of those that its model names.

    Raises:
        FileNotFoundError: no probe in the folder, or the backbone's weights are missing.
        ValueError: a damaged folder, weights that don't fit, or another backbone than the head was trained on.
    """
    folder = Path(directory)
    saved = read_saved(folder)
    state = read_state_dict(folder / WEIGHTS)
    backbone = None
    if saved.input_dim is None:
        if base_model is None:
            base_model = _load_backbone(saved, folder, device, checkpoint_path)
        backbone = adapt(base_model)
        if saved.probe_config.freeze_backbone:
            check_backbone(saved, backbone, folder)
    probe = build_probe_from_config(
        saved.probe_config,
        saved.num_classes,
        device,
        base_model=backbone,
        input_dim=saved.input_dim,
        target_length=saved.target_length,
    )
    load_head(probe, state, str(folder / WEIGHTS))
    probe.labels = read_labels(folder, saved.num_classes)
    probe.output_activation = saved.activation
    return probe.eval()


def read_saved(folder: Path) -> SavedProbe:
    """The content of ``probe.yml``. Raises FileNotFoundError without a probe, ValueError for a damaged file."""
    if not (folder / PROBE).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no probe ({PROBE} and {WEIGHTS}); make one with save_probe()")
    try:
        return SavedProbe.model_validate(yaml.safe_load((folder / PROBE).read_text("utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{folder / PROBE} is damaged: {error}") from None


def backbone_of(saved: SavedProbe) -> tuple[str, ModelEntry] | None:
    """Name of the backbone, and its model with the checkpoint of the training; None if the probe names none."""
    if saved.model is None:
        return None
    if isinstance(saved.model, str):
        name, entry = saved.model, find_entry(saved.model)
    else:
        source = saved.model
        name, entry = source.name, ModelEntry(source.model_spec, source.name, source.checkpoint_path, source.licence)
    return name, replace(entry, checkpoint_path=saved.checkpoint or entry.checkpoint_path)


def read_labels(folder: Path, num_classes: int) -> tuple[str, ...] | None:
    """The labels of a saved probe, or None if it has none. ValueError if their number isn't `num_classes`."""
    path = folder / LABELS
    if not path.is_file():
        return None
    labels = parse_labels(path.read_text("utf-8"), source=str(path))
    if len(labels) != num_classes:
        raise ValueError(f"{path} has {len(labels)} labels for {num_classes} classes")
    return labels


def load_head(probe: Probe, state: StateDict, source: str) -> None:
    """Load weights into a probe, strictly: the head's if its backbone is frozen, else all.

    A state dict saved by avex has the backbone's weights too (``base_model.…``). If the backbone is frozen, they
    must equal the probe's. Raises ValueError for these, for names or shapes that don't fit, and for a head of zeros
    or with values that are not finite.
    """
    state = brought_to(probe.state_dict(), state)
    _refuse_other_classes(probe, state, source)
    _refuse_untrained(state, probe.num_classes, source)
    if not probe.freeze_backbone:
        state = {**{n: t for n, t in probe.state_dict().items() if n.startswith(_UNUSED)}, **state}
    elif probe.base_model is not None:
        own = {n: t for n, t in probe.state_dict().items() if n.startswith("base_model.")}
        if others := [name for name in differing(own, state) if not name.startswith(_UNUSED)]:
            raise ValueError(
                f"{source} was trained on another backbone than the probe's: {len(others)} of its tensors differ: "
                f"{some(others)}; load the backbone with the weights of the training, or set freeze_backbone=False "
                "in the probe's configuration to use the backbone in this file (in avex, training changes the batch "
                "statistics of a frozen EfficientNet)"
            )
        state = {**{n: t for n, t in state.items() if not n.startswith("base_model.")}, **own}
    load_strictly(probe, state, source)


def check_backbone(saved: SavedProbe, base_model: ModelBase, folder: Path) -> None:
    """Raise ValueError if the head was trained on another backbone than `base_model`."""
    if saved.backbone_fingerprint is None:
        return
    found = fingerprint(base_model)
    if found != saved.backbone_fingerprint and saved.backbone_dtype is not None:
        cast = fingerprint(copy.deepcopy(base_model).to(getattr(torch, saved.backbone_dtype)))
        found = cast if cast == saved.backbone_fingerprint else found
    if found != saved.backbone_fingerprint:
        raise ValueError(
            f"{folder} was trained on a backbone with fingerprint {saved.backbone_fingerprint[:12]}…, this one has "
            f"{found[:12]}…, so its logits would be meaningless; load the backbone with the weights of the training"
        )


def _load_backbone(saved: SavedProbe, folder: Path, device: str, checkpoint_path: str | None) -> ModelBase:
    backbone = backbone_of(saved)
    if backbone is None:
        raise ValueError(f"{folder / PROBE} doesn't name its backbone; give base_model")
    _, entry = backbone
    if not saved.probe_config.freeze_backbone:  # the probe's own file has the backbone's weights
        return build_model_from_spec(entry.spec, device, return_features_only=True)
    return load_model(entry.spec, device, checkpoint_path or entry.checkpoint_path, return_features_only=True)


def _source(model: str | Path | ModelSpec | None) -> str | ModelSource | None:
    if model is None:
        return None
    if isinstance(model, str) and get_entry(model) is not None:
        return model
    entry = find_entry(model)
    name = model.name if isinstance(model, ModelSpec) else Path(model).stem
    return ModelSource(
        name=name, licence=entry.licence, model_spec=entry.spec, checkpoint_path=entry.checkpoint_path
    )


def _unwrapped(probe: nn.Module) -> Probe:
    """The probe itself, without what torch.compile and DataParallel put around it."""
    found: Any = probe
    while not isinstance(found, Probe):
        inner = (
            [vars(found)["_modules"].get(name) for name in ("_orig_mod", "module")]
            if isinstance(found, nn.Module)
            else []
        )
        found = next((module for module in inner if module is not None), None)
        if found is None:
            raise TypeError(
                f"a {type(probe).__name__} is no probe; expected what build_probe_from_config() returned"
            )
    return found


def _activation(name: str) -> Activation:
    names = {known.casefold(): activation for known, activation in ACTIVATIONS.items()}
    if (found := names.get(str(name).casefold())) is None:
        raise ValueError(f"activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return found


_LOW_PRECISIONS = (torch.float16, torch.bfloat16)


def _cast_to(module: nn.Module) -> str | None:
    """The type of the module's weights if all have the same, and not float32."""
    found = {parameter.dtype for parameter in module.parameters()}
    return str(found.pop()).removeprefix("torch.") if len(found) == 1 and torch.float32 not in found else None


def _refuse_other_classes(probe: Probe, state: StateDict, source: str) -> None:
    """Raise ValueError for a head that fits but for its number of classes."""
    for name, own in probe.head_state().items():
        shape = state[name].shape if name in state else own.shape
        if own.ndim == 2 and shape[1:] == own.shape[1:] and own.shape[0] == probe.num_classes != shape[0]:
            raise ValueError(
                f"{source} holds a head of {shape[0]} classes, and the probe was built for {probe.num_classes} "
                f"labels; give the {shape[0]} labels of the training"
            )


def _refuse_untrained(state: StateDict, classes: int, source: str) -> None:
    """Raise ValueError for weights that no training leaves: not finite, or a last layer of zeros."""
    head = {n: t for n, t in state.items() if t.is_floating_point() and not n.startswith("base_model.")}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(
            f"{source} has NaN or infinite values in {some(broken)}: its training diverged. Train it again, with a "
            "lower learning rate"
        )
    last = [name for name, tensor in head.items() if tensor.ndim == 2 and len(tensor) == classes]
    zeros = [name for name in last or head if not head[name].any()]
    if zeros and (last or len(zeros) == len(head)):
        raise ValueError(
            f"{source} has nothing but zeros in {some(zeros)}: this head was not trained, and every label would get "
            "the same score for any sound. Give the weights of after the training"
        )


def _in_order(labels: Sequence[str] | Mapping[str, int]) -> tuple[str, ...]:
    if isinstance(labels, Counter):
        raise TypeError("labels is a Counter, whose numbers are counts; give a list in the order of the logits")
    if isinstance(labels, Mapping):
        if sorted(labels.values()) != list(range(len(labels))):
            raise ValueError(
                f"label indices must be 0 to {len(labels) - 1}, each once; got {sorted(labels.values())}"
            )
        return tuple(sorted(labels, key=labels.__getitem__))
    if isinstance(labels, str | bytes) or not (hasattr(labels, "__getitem__") and hasattr(labels, "__len__")):
        raise TypeError(
            f"labels is a {type(labels).__name__}, which has no order that is that of the logits; give a list, or "
            "{label: index}"
        )
    if other := [label for label in labels if not isinstance(label, str)]:
        raise TypeError(f"labels has {other[0]!r}, a {type(other[0]).__name__}; expected text")
    return tuple(map(str, labels))
