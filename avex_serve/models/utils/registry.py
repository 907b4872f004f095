"""Which models there are: a YAML each in ``avex_serve/official_models``, and those that a program registers."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from torch import nn

from avex_serve.configs import ModelSpec
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.efficientnet import EfficientNetModel
from avex_serve.models.utils.labels import count_labels

logger = logging.getLogger(__name__)

OFFICIAL_MODELS = Path(__file__).parents[2] / "official_models"

ModelClass = Callable[..., nn.Module]
_Class = TypeVar("_Class", bound=ModelClass)

_ARCHITECTURES: dict[str, ModelClass] = {
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
    class_mapping_path: str | None = None  # path or URI of the labels of the checkpoint's classifier
    sha256: str | None = None  # hex, of the checkpoint as it was published

    @property
    def name(self) -> str:
        """Name of its architecture, as its spec has it."""
        return self.spec.name


# Architectures by ModelSpec.name, and models by name; both under avex's names, and filled by `initialize_registry`.
_MODEL_CLASSES: dict[str, ModelClass] = {}
_MODEL_REGISTRY: dict[str, ModelEntry] = {}


def initialize_registry() -> None:
    """Register the official models and the architectures again, over any others of their names; others stay.

    Importing this module has done it.
    """
    _MODEL_CLASSES.update(_ARCHITECTURES)
    _MODEL_REGISTRY.update({path.stem: read_model_yaml(path) for path in sorted(OFFICIAL_MODELS.glob("*.yml"))})


def is_own_architecture(name: str) -> bool:
    """Whether the architecture of that name is one of those here, and not one that a program registered."""
    return name in _ARCHITECTURES and _MODEL_CLASSES.get(name) is _ARCHITECTURES[name]


def get_model_spec(name: str) -> ModelSpec | None:
    """A copy of the registered model's spec, or None."""
    entry = get_entry(name)
    return None if entry is None else entry.spec.model_copy(deep=True)


def get_checkpoint_path(name: str) -> str | None:
    """Where the registered model's checkpoint is, or None if it names none.

    Raises:
        KeyError: no such model.
    """
    return _known_entry(name).checkpoint_path


def get_entry(name: str) -> ModelEntry | None:
    """The registered model, or None."""
    return _MODEL_REGISTRY.get(name)


def list_models() -> dict[str, dict[str, Any]]:
    """The registered models by name, without network.

    Each has ``description``, ``model_type`` (the architecture), ``checkpoint_path``, ``has_trained_classifier``,
    ``num_classes`` (None unless the label map is on this machine) and ``licence``.
    """
    return {name: _summary(entry) for name, entry in sorted(_MODEL_REGISTRY.items())}


def describe_model(name: str, verbose: bool = False) -> dict[str, Any]:
    """The fields of a registered model's spec, and under ``_metadata`` what else is known, without network.

    Args:
        name: of the model.
        verbose: print it too.

    Raises:
        KeyError: no such model.
    """
    entry = _known_entry(name)
    spec = entry.spec
    metadata = {
        "name": name,
        "pretrained": spec.pretrained,
        "device": spec.device,
        "has_audio_config": spec.audio_config is not None,
        "has_eat_config": spec.eat_cfg is not None,
        "has_text_model": spec.text_model_name is not None,
        "is_pretraining_mode": bool(spec.pretraining_mode),
        "class_mapping_path": entry.class_mapping_path,
        **_summary(entry),
    }
    if verbose:
        audio = spec.audio_config
        print(f"{name}: {entry.description}")
        for title, value in {
            "architecture": spec.name,
            "classifier": _told_classes(metadata),
            "checkpoint": entry.checkpoint_path,
            "label map": entry.class_mapping_path,
            "licence": entry.licence,
            "audio": audio and f"{audio.sample_rate} Hz, {audio.representation}, {audio.target_length_seconds} s",
        }.items():
            print(f"  {title:13} {value or 'none'}")
    return {**spec.model_dump(), "_metadata": metadata}


def register_model(
    name: str, model_spec: ModelSpec, checkpoint_path: str | None = None, class_mapping_path: str | None = None
) -> None:
    """Register a model under a name; an earlier one of that name is replaced, with a warning.

    Args:
        name: for `load_model`, `build_model` and the exporter.
        model_spec: copied, so later changes to it change nothing here.
        checkpoint_path: path or URI of its weights.
        class_mapping_path: path or URI of the labels of the checkpoint's classifier, JSON ``{label: index}``.
    """
    if get_entry(name) is not None:
        logger.warning("model %r is registered already; it is replaced", name)
    _MODEL_REGISTRY[name] = ModelEntry(
        model_spec.model_copy(deep=True),
        f"registered {model_spec.name} model",
        checkpoint_path,
        licence="unknown",
        class_mapping_path=class_mapping_path,
    )


def register_model_class(cls: _Class) -> _Class:
    """Register an architecture, as a decorator: under its attribute ``name``, or its own name in lower case.

    Args:
        cls: a subclass of `ModelBase`, or of `torch.nn.Module` with what `avex_serve.models.custom.Backbone` says.
            Its ``__init__`` may take ``device``, ``audio_config``, ``num_classes``, ``return_features_only`` and
            fields of `ModelSpec`.

    Raises:
        TypeError: no class of torch modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"{cls!r} is no model class; derive it from avex_serve.models.base_model.ModelBase")
    name = getattr(cls, "name", cls.__name__.lower())
    if name in _MODEL_CLASSES:
        logger.warning("model class %r is registered already; it is replaced", name)
    _MODEL_CLASSES[name] = cls
    return cls


def get_model_class(name: str) -> ModelClass | None:
    """The architecture of that name, or None."""
    return _MODEL_CLASSES.get(name)


def list_model_classes() -> list[str]:
    """Names of the architectures."""
    return list(_MODEL_CLASSES)


def load_model_spec_from_yaml(yaml_path: str | Path) -> ModelSpec:
    """The spec in a YAML file; see `read_model_yaml`, errors too."""
    return read_model_yaml(Path(yaml_path)).spec


def read_model_yaml(path: Path) -> ModelEntry:
    """A model from YAML: the fields of `ModelSpec` at the top, or under ``model_spec:``.

    Beside ``model_spec:`` there may be ``checkpoint_path:``, ``class_mapping_path:`` (the label map), ``sha256:``
    (of the checkpoint), ``description:`` and ``licence:``. Relative paths are relative to the YAML file.

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
        raise ValueError(f"YAML must define a mapping: {path} needs the fields of a model, or model_spec: with them")
    fields = content.get("model_spec", content)
    if not isinstance(fields, Mapping):
        raise ValueError(f"Invalid model specification structure: model_spec of {path} must be a mapping")
    try:
        spec = ModelSpec(**fields)
    except ValidationError as error:
        raise ValueError(f"Failed to build ModelSpec from {path}: {error}") from None
    return ModelEntry(
        spec=spec,
        description=str(content.get("description", f"{fields.get('name')} model from {path.name}")),
        checkpoint_path=_beside(path, content.get("checkpoint_path")),
        licence=str(content.get("licence", "unknown")),
        class_mapping_path=_beside(path, content.get("class_mapping_path")),
        sha256=content.get("sha256"),
    )


def _beside(path: Path, uri: object) -> str | None:
    if uri is None:
        return None
    return str(uri) if "://" in str(uri) else str(path.resolve().parent / str(uri))


def _known_entry(name: str) -> ModelEntry:
    entry = get_entry(name)
    if entry is None:
        raise KeyError(f"Model '{name}' is not registered; list_models() names those that are")
    return entry


def _summary(entry: ModelEntry) -> dict[str, Any]:
    return {
        "description": entry.description,
        "model_type": entry.spec.name,
        "checkpoint_path": entry.checkpoint_path,
        "has_trained_classifier": entry.checkpoint_path is not None and entry.class_mapping_path is not None,
        "num_classes": count_labels(entry.class_mapping_path),
        "licence": entry.licence,
    }


def _told_classes(summary: Mapping[str, Any]) -> str:
    if not summary["has_trained_classifier"]:
        return "none; embeddings only"
    return f"{summary['num_classes']} classes" if summary["num_classes"] else "trained"


def __getattr__(name: str) -> Any:
    # avex has it here. It builds models, and what builds them imports this module.
    if name == "list_model_layers":
        from avex_serve.models.utils.load import list_model_layers

        return list_model_layers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


initialize_registry()
