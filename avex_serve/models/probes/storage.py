"""A probe as a folder: ``probe.yml``, ``model.safetensors``, ``labels.json``.

The weights are the head's if the backbone was frozen, else those of head and backbone. The folder records the
fingerprint of a frozen backbone, which is checked when the head is put on a backbone again.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file

from avex_serve.bundles.manifest import LABELS
from avex_serve.bundles.reading import parse_labels
from avex_serve.bundles.sealing import atomic_directory, dump_labels
from avex_serve.configs import ModelSpec, ProbeConfig
from avex_serve.models.base_model import Backbone, ModelBase, adapt
from avex_serve.models.checkpoints import (
    StateDict,
    brought_to,
    differing,
    fingerprint,
    load_strictly,
    read_state_dict,
    some,
)
from avex_serve.models.probes.base import Probe, Shape
from avex_serve.models.probes.utils.factory import build_probe_from_config
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.models.utils.registry import ModelEntry, build_model_from_spec, get_entry

logger = logging.getLogger(__name__)

PROBE = "probe.yml"
WEIGHTS = "model.safetensors"
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
    model: str | ModelSource | None = None  # a registered name, or how to build it; None: unknown
    backbone_fingerprint: str | None = None  # None: trained offline
    checkpoint: str | None = None  # URI of the backbone's weights, with revision; None: local or unknown
    layers: list[str] | None = None  # online: the names for target_layers
    input_dim: list[Shape] | None = None  # offline only
    target_length: int | None = None  # online only, in samples


def save_probe(
    probe: Probe,
    directory: str | os.PathLike[str],
    labels: Sequence[str] | Mapping[str, int] | None = None,
    model: str | Path | ModelSpec | None = None,
) -> None:
    """Write a probe to a folder, completely or not at all. A probe that is there is replaced.

    Args:
        probe: made by `build_probe_from_config`.
        directory: the folder.
        labels: names of the classes in the order of the logits, or ``{label: index}``; None: the probe's own.
        model: the argument with which its backbone was loaded, so that `load_probe` and the exporter can load it.

    Raises:
        ValueError: a probe without its configuration, or another number of labels than of classes.
        FileExistsError: the folder holds something other than a probe.
    """
    if probe.config is None:
        raise ValueError("this probe has no configuration; build it with build_probe_from_config()")
    names = probe.labels if labels is None else _in_order(labels)
    if names is not None and len(names) != probe.num_classes:
        raise ValueError(f"{len(names)} labels for a probe with {probe.num_classes} classes; give one per class")
    saved = SavedProbe(format=1, probe_config=probe.config, num_classes=probe.num_classes, model=_source(model))
    if probe.base_model is None:
        saved.input_dim = probe.input_dim
    else:
        saved.backbone_fingerprint = fingerprint(probe.base_model)
        saved.checkpoint = probe.base_model.checkpoint_uri if probe.freeze_backbone else None
        saved.layers, saved.target_length = probe.layers, probe.target_length
    state = probe.head_state() if probe.freeze_backbone else probe.state_dict()
    # Cloned, since safetensors refuses tensors that share memory, as BEATs' position tables do.
    tensors = {n: t.detach().cpu().clone() for n, t in state.items() if not n.startswith(_UNUSED)}
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
    """Read a probe from a folder, in eval mode, with its ``labels`` if it has them.

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
    must equal the probe's. Raises ValueError for these, and for names or shapes that don't fit.
    """
    state = brought_to(probe.state_dict(), state)
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


def _in_order(labels: Sequence[str] | Mapping[str, int]) -> tuple[str, ...]:
    if isinstance(labels, Mapping):
        if sorted(labels.values()) != list(range(len(labels))):
            raise ValueError(
                f"label indices must be 0 to {len(labels) - 1}, each once; got {sorted(labels.values())}"
            )
        return tuple(sorted(labels, key=labels.__getitem__))
    return tuple(labels)
