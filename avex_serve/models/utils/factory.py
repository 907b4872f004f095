"""From a name or a spec to a backbone with random weights."""

import difflib
import inspect
import logging
from typing import Any

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.custom import adapt
from avex_serve.models.utils.registry import (
    ModelClass,
    get_model_class,
    get_model_spec,
    list_model_classes,
    list_models,
)

logger = logging.getLogger(__name__)

# Fields of ModelSpec that say what to build and load, not how.
_NOT_FOR_THE_MODEL = {"name", "pretrained", "device", "audio_config"}


def build_model(model_name: str, device: str, **kwargs: Any) -> ModelBase:
    """Build a registered model with random weights, in eval mode.

    Args:
        model_name: its name.
        device: where to put it.
        **kwargs: further arguments of its class, such as ``num_classes``; others are left out with a warning.

    Raises:
        ValueError: no such model, or fields of its spec that its class can't take.
        KeyError: no such class.
    """
    spec = get_model_spec(model_name)
    if spec is None:
        raise ValueError(f"No ModelSpec found for '{model_name}'. Available models: {sorted(list_models())}")
    return build_model_from_spec(spec, device, **kwargs)


def build_model_from_spec(model_spec: ModelSpec, device: str | None = None, **kwargs: Any) -> ModelBase:
    """Build a backbone with random weights, in eval mode.

    Args:
        model_spec: architecture and geometry.
        device: where to put it; None: the spec's.
        **kwargs: further arguments of its class; of the architectures here ``num_classes`` (of the classifier; None:
            no classifier) and ``return_features_only`` (leave the classifier out). Others are left out with a
            warning.

    Raises:
        KeyError: an unknown architecture.
        ValueError: fields of the spec that it can't take, or that it needs more than is given.
    """
    cls = get_model_class(model_spec.name)
    if cls is None:
        raise KeyError(
            f"Model class '{model_spec.name}' is not registered. Available classes: {list_model_classes()}; "
            "register yours with register_model_class"
        )
    place = device or model_spec.device
    common = {"device": place, "audio_config": model_spec.audio_config}
    arguments = {name: value for name, value in common.items() if name in inspect.signature(cls).parameters}
    arguments |= {**_options(model_spec, cls), **_known(kwargs, cls)}
    _check_needed(arguments, cls, model_spec.name)
    return adapt(cls(**arguments)).to(place).eval()


def takes(model_spec: ModelSpec, argument: str) -> bool:
    """Whether the spec's class takes an argument of that name; False for a class that is not registered."""
    cls = get_model_class(model_spec.name)
    return cls is not None and argument in inspect.signature(cls).parameters


def _options(spec: ModelSpec, cls: ModelClass) -> dict[str, Any]:
    """The spec's own fields that the class takes; a warning for each other one that says something."""
    fields = spec.model_dump(exclude=_NOT_FOR_THE_MODEL, exclude_none=True)
    taken = inspect.signature(cls).parameters
    # A default says nothing: avex's specs carry the fields of every architecture.
    spoken = {name for name, value in fields.items() if value != ModelSpec.model_fields[name].default}
    for name in sorted(spoken - taken.keys()):
        logger.warning(
            "%s=%r is nothing that model class '%s' takes, and is left out; leave it out of the ModelSpec too",
            *(name, fields[name], spec.name),
        )
    return {name: value for name, value in fields.items() if name in taken}


def _known(kwargs: dict[str, Any], cls: ModelClass) -> dict[str, Any]:
    """The keywords that the class takes; a warning for each other one, which avex leaves out in silence."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    for name in sorted(kwargs.keys() - parameters.keys()):
        close = difflib.get_close_matches(name, parameters, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it takes {sorted(parameters)}"
        logger.warning("%s has no argument '%s', which is left out; %s", getattr(cls, "__name__", cls), name, hint)
    return {name: value for name, value in kwargs.items() if name in parameters}


def _check_needed(arguments: dict[str, Any], cls: ModelClass, name: str) -> None:
    for parameter in inspect.signature(cls).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in arguments:
            raise ValueError(
                f"model class '{name}' needs {parameter.name}; give build_model({parameter.name}=...), or give "
                "load_model a checkpoint that tells it"
            )
