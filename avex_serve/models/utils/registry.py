"""Which models there are: a YAML each in ``avex_serve/official_models``, and those that a program registers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.efficientnet import EfficientNetModel

OFFICIAL_MODELS = Path(__file__).parents[2] / "official_models"

# Architectures by ModelSpec.name.
_MODEL_CLASSES: dict[str, type[ModelBase]] = {
    "beats": BEATsModel,
    "eat_hf": EATModel,
    "efficientnet": EfficientNetModel,
}


@dataclass(frozen=True)
class ModelEntry:
    """A registered model."""

    spec: ModelSpec
    description: str
    checkpoint_path: str | None  # path or URI
    licence: str


_REGISTERED: dict[str, ModelEntry] = {}


def get_model_spec(name: str) -> ModelSpec | None:
    """A copy of the registered model's spec, or None."""
    entry = get_entry(name)
    return None if entry is None else entry.spec.model_copy(deep=True)


def get_checkpoint_path(name: str) -> str | None:
    """Where the registered model's checkpoint is, or None if it names none.

    Raises:
        KeyError: no such model.
    """
    entry = get_entry(name)
    if entry is None:
        raise KeyError(f"Model '{name}' is not registered; list_models() names those that are")
    return entry.checkpoint_path


def get_entry(name: str) -> ModelEntry | None:
    """The registered model, or None."""
    return _REGISTERED.get(name) or _official().get(name)


def list_models() -> dict[str, dict[str, Any]]:
    """The registered models: description, architecture and checkpoint by name."""
    entries = {**_official(), **_REGISTERED}
    return {
        name: {
            "description": entry.description,
            "model_type": entry.spec.name,
            "checkpoint_path": entry.checkpoint_path,
            "licence": entry.licence,
        }
        for name, entry in sorted(entries.items())
    }


def register_model(name: str, model_spec: ModelSpec, checkpoint_path: str | None = None) -> None:
    """Register a model under a name; an earlier one of that name is replaced."""
    _REGISTERED[name] = ModelEntry(
        model_spec.model_copy(deep=True), f"registered {model_spec.name} model", checkpoint_path, licence="unknown"
    )


def get_model_class(name: str) -> Callable[..., ModelBase]:
    """The architecture of that name.

    Raises:
        ValueError: no such architecture.
    """
    if name not in _MODEL_CLASSES:
        raise ValueError(f"model class {name!r} is not known; expected one of {sorted(_MODEL_CLASSES)}")
    return _MODEL_CLASSES[name]


def read_model_yaml(path: Path) -> ModelEntry:
    """A model from YAML: the fields of `ModelSpec` at the top, or under ``model_spec:`` beside ``checkpoint_path:``.

    A relative checkpoint path is relative to the YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a mapping, or fields that make no ModelSpec.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Model config file not found: {path}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a mapping with the fields of a model, or model_spec: with them")
    fields = content.get("model_spec", content)
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path}: model_spec must be a mapping")
    checkpoint = content.get("checkpoint_path")
    if checkpoint is not None and "://" not in str(checkpoint):
        checkpoint = str(path.resolve().parent / str(checkpoint))
    return ModelEntry(
        spec=ModelSpec(**fields),
        description=str(content.get("description", f"{fields.get('name')} model from {path.name}")),
        checkpoint_path=checkpoint,
        licence=str(content.get("licence", "unknown")),
    )


@cache
def _official() -> dict[str, ModelEntry]:
    return {path.stem: read_model_yaml(path) for path in sorted(OFFICIAL_MODELS.glob("*.yml"))}
