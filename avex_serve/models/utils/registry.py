"""Models by name: the YAML files in ``avex_serve/official_models``, and what a program registers.

Architectures are registered too. A model is built here from its spec, with random weights; `load_model` adds the
trained ones.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from torch import nn

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import Backbone, ModelBase, adapt
from avex_serve.models.beats_model import BEATsModel
from avex_serve.models.eat_hf import EATModel
from avex_serve.models.efficientnet import EfficientNetModel
from avex_serve.models.files import count_labels

logger = logging.getLogger(__name__)

OFFICIAL_MODELS = Path(__file__).parents[2] / "official_models"

ModelClass = Callable[..., nn.Module]
_Class = TypeVar("_Class", bound=ModelClass)

_ARCHITECTURES: dict[str, ModelClass] = {
    "beats": BEATsModel,
    "eat_hf": EATModel,
    "efficientnet": EfficientNetModel,
}

# Fields of ModelSpec that the constructor of a model class doesn't get from the spec's dump.
_NOT_FOR_THE_CLASS = {"name", "pretrained", "device", "audio_config"}


@dataclass(frozen=True)
class ModelEntry:
    """A registered model."""

    spec: ModelSpec
    description: str
    checkpoint_path: str | None  # path or URI
    licence: str
    class_mapping_path: str | None = None  # path or URI of the labels of the checkpoint's classifier
    sha256: str | None = None  # hex digest of the published checkpoint

    @property
    def name(self) -> str:
        """Name of the architecture, under which avex's registry has it too."""
        return self.spec.name


# Architectures by ModelSpec.name, and models by name. Both names are avex's. `initialize_registry` fills them.
_MODEL_CLASSES: dict[str, ModelClass] = {}
_MODEL_REGISTRY: dict[str, ModelEntry] = {}


def initialize_registry() -> None:
    """Register the official models and architectures, as importing this module does.

    They replace others of the same name. Models and architectures of other names stay.
    """
    _MODEL_CLASSES.update(_ARCHITECTURES)
    _MODEL_REGISTRY.update({path.stem: read_model_yaml(path) for path in sorted(OFFICIAL_MODELS.glob("*.yml"))})


# -- models ------------------------------------------------------------------------------------------------------


def get_entry(name: str) -> ModelEntry | None:
    """The registered model, or None."""
    return _MODEL_REGISTRY.get(name)


def get_model_spec(name: str) -> ModelSpec | None:
    """A copy of the registered model's spec, or None."""
    entry = get_entry(name)
    return None if entry is None else entry.spec.model_copy(deep=True)


def get_checkpoint_path(name: str) -> str | None:
    """Path or URI of the registered model's checkpoint, or None if the model names none. KeyError: no such model."""
    return _require_entry(name).checkpoint_path


def list_models() -> dict[str, dict[str, Any]]:
    """The registered models by name, without network.

    Each has ``description``, ``model_type`` (the architecture), ``checkpoint_path``, ``has_trained_classifier``,
    ``num_classes`` (None unless the label map is on this machine) and ``licence``.
    """
    return {name: _summary(entry) for name, entry in sorted(_MODEL_REGISTRY.items())}


def describe_model(name: str, verbose: bool = False) -> dict[str, Any]:
    """The fields of a registered model's spec, and further facts under ``_metadata``, without network.

    With `verbose`, also print a description. Raises KeyError if there is no such model.
    """
    entry = _require_entry(name)
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
            "classifier": _describe_classifier(metadata),
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
    """Register a model. An earlier model of that name is replaced, with a warning.

    Args:
        name: for `load_model`, `build_model` and the exporter.
        model_spec: how to build it.
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


def load_model_spec_from_yaml(yaml_path: str | Path) -> ModelSpec:
    """The spec in a YAML file. Format and errors as in `read_model_yaml`."""
    return read_model_yaml(Path(yaml_path)).spec


def read_model_yaml(path: Path) -> ModelEntry:
    """A model from a YAML file with the fields of `ModelSpec` at the top level or under ``model_spec:``.

    Next to ``model_spec:`` the file may have ``checkpoint_path:``, ``class_mapping_path:`` (the label map),
    ``sha256:`` (of the checkpoint), ``description:`` and ``licence:``. Relative paths are relative to the YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a mapping, or fields that don't fit ModelSpec.
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
        checkpoint_path=_relative_to(path, content.get("checkpoint_path")),
        licence=str(content.get("licence", "unknown")),
        class_mapping_path=_relative_to(path, content.get("class_mapping_path")),
        sha256=content.get("sha256"),
    )


def _relative_to(yaml_path: Path, uri: object) -> str | None:
    if uri is None:
        return None
    return str(uri) if "://" in str(uri) else str(yaml_path.resolve().parent / str(uri))


def _require_entry(name: str) -> ModelEntry:
    entry = get_entry(name)
    if entry is None:
        raise KeyError(f"Model '{name}' is not registered; list_models() has the names of registered models")
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


def _describe_classifier(summary: Mapping[str, Any]) -> str:
    if not summary["has_trained_classifier"]:
        return "none; embeddings only"
    return f"{summary['num_classes']} classes" if summary["num_classes"] else "trained"


# -- architectures -----------------------------------------------------------------------------------------------


def register_model_class(cls: _Class) -> _Class:
    """Register an architecture (a decorator) under its attribute ``name``, or its own name in lower case.

    Args:
        cls: a subclass of `ModelBase`, or of `torch.nn.Module` with the methods of
            `avex_serve.models.base_model.Backbone`. Its ``__init__`` may accept ``device``, ``audio_config``,
            ``num_classes``, ``return_features_only`` and fields of `ModelSpec`.

    Raises:
        TypeError: not a class of torch modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"{cls!r} is not a model class; derive it from avex_serve.models.base_model.ModelBase")
    name = getattr(cls, "name", cls.__name__.lower())
    if name in _MODEL_CLASSES:
        logger.warning("model class %r is registered already; it is replaced", name)
    _MODEL_CLASSES[name] = cls
    return cls


def get_model_class(name: str) -> ModelClass | None:
    """The class of that architecture, or None."""
    return _MODEL_CLASSES.get(name)


def list_model_classes() -> list[str]:
    """Names of the architectures."""
    return list(_MODEL_CLASSES)


def is_own_architecture(name: str) -> bool:
    """Whether that name means one of the three architectures here, and not a class that a program registered."""
    return name in _ARCHITECTURES and _MODEL_CLASSES.get(name) is _ARCHITECTURES[name]


def accepts(model_spec: ModelSpec, argument: str) -> bool:
    """Whether the spec's class has a parameter of that name; False for a class that is not registered."""
    cls = get_model_class(model_spec.name)
    return cls is not None and argument in inspect.signature(cls).parameters


# -- building ----------------------------------------------------------------------------------------------------


def build_model(model_name: str, device: str, **kwargs: Any) -> ModelBase:
    """Build a registered model with random weights, in eval mode; see `build_model_from_spec`.

    Raises:
        ValueError: no such model, or as `build_model_from_spec`.
    """
    spec = get_model_spec(model_name)
    if spec is None:
        raise ValueError(f"No ModelSpec found for '{model_name}'. Available models: {sorted(list_models())}")
    return build_model_from_spec(spec, device, **kwargs)


def build_model_from_spec(model_spec: ModelSpec, device: str | None = None, **kwargs: Any) -> ModelBase:
    """Build a backbone with random weights, in eval mode.

    Args:
        model_spec: architecture and geometry.
        device: where to put it; None: the spec's device.
        **kwargs: further arguments of the class. The architectures here accept ``num_classes`` (of the classifier;
            None: no classifier) and ``return_features_only`` (no classifier). A keyword that the class doesn't
            accept is ignored with a warning.

    Raises:
        KeyError: an unknown architecture.
        ValueError: fields that the class refuses, or an argument that it needs and that is missing.
    """
    cls = get_model_class(model_spec.name)
    if cls is None:
        raise KeyError(
            f"Model class '{model_spec.name}' is not registered. Available classes: {list_model_classes()}; "
            "register yours with register_model_class"
        )
    device = device or model_spec.device
    return adapt(cls(**_arguments(cls, model_spec, device, kwargs))).to(device).eval()


def list_model_layers(model: str | ModelBase | Backbone, device: str = "cpu") -> dict[str, list[str] | str]:
    """The layers that a probe can tap, of a model or a registered name, which is built on `device` without weights.

    Returns:
        ``layers`` and ``all``: the discoverable layers in order. ``last_layer``: the layer that this selector means.
        ``special_options``: the selectors.

    Raises:
        ValueError: no such model, or an object that isn't a model.
    """
    if isinstance(model, str):
        spec = get_model_spec(model)
        if spec is None:
            raise ValueError(f"Model '{model}' not found in registry. Available models: {sorted(list_models())}")
        model = build_model_from_spec(spec, device)
    backbone = adapt(model)
    layers = backbone.get_model_layers()
    return {
        "layers": layers,
        "last_layer": backbone.last_layer_name,
        "all": layers,
        "special_options": ["last_layer", "all"],
    }


def _arguments(cls: ModelClass, spec: ModelSpec, device: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """The fields of the spec and the keywords that the class accepts. The others are ignored, with a warning."""
    parameters = inspect.signature(cls).parameters
    fields = spec.model_dump(exclude=_NOT_FOR_THE_CLASS, exclude_none=True)
    for name in sorted(fields.keys() - parameters.keys()):
        # avex's specs carry the fields of every architecture, so a default value doesn't count as a choice.
        if fields[name] != ModelSpec.model_fields[name].default:
            logger.warning(
                "model class '%s' does not accept %s=%r, which is ignored; remove it from the ModelSpec",
                *(spec.name, name, fields[name]),
            )
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in sorted(keywords.keys() - parameters.keys()):
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"it accepts {sorted(parameters)}"
            logger.warning(
                "%s has no argument '%s', which is ignored; %s", getattr(cls, "__name__", cls), name, hint
            )
        keywords = {name: value for name, value in keywords.items() if name in parameters}
    from_spec = {"device": device, "audio_config": spec.audio_config, **fields}
    arguments = {name: value for name, value in from_spec.items() if name in parameters} | keywords
    for parameter in parameters.values():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(
                f"model class '{spec.name}' needs {parameter.name}; give build_model({parameter.name}=...), or give "
                "load_model a checkpoint that states it"
            )
    return arguments


initialize_registry()
