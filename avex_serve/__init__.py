"""From a trained avex probe to a service.

The public names below load on first use: importing the package imports neither torch nor onnxruntime, so a
serving process loads only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avex_serve.version import __version__

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine
    from avex_serve.inference.opening import open_bundle
    from avex_serve.models.utils.load import load_label_mapping, load_model
    from avex_serve.models.utils.registry import (
        build_model,
        build_model_from_spec,
        describe_model,
        get_checkpoint_path,
        get_model_class,
        get_model_spec,
        list_model_classes,
        list_model_layers,
        list_models,
        register_model,
        register_model_class,
    )

_LOADING = "avex_serve.models.utils.load"
_REGISTRY = "avex_serve.models.utils.registry"
_HOME = {
    "Engine": "avex_serve.inference.engine",
    "open_bundle": "avex_serve.inference.opening",
    "load_label_mapping": _LOADING,
    "load_model": _LOADING,
    "build_model": _REGISTRY,
    "build_model_from_spec": _REGISTRY,
    "describe_model": _REGISTRY,
    "get_checkpoint_path": _REGISTRY,
    "get_model_class": _REGISTRY,
    "get_model_spec": _REGISTRY,
    "list_model_classes": _REGISTRY,
    "list_model_layers": _REGISTRY,
    "list_models": _REGISTRY,
    "register_model": _REGISTRY,
    "register_model_class": _REGISTRY,
}

__all__ = [
    "Engine",
    "__version__",
    "build_model",
    "build_model_from_spec",
    "describe_model",
    "get_checkpoint_path",
    "get_model_class",
    "get_model_spec",
    "list_model_classes",
    "list_model_layers",
    "list_models",
    "load_label_mapping",
    "load_model",
    "open_bundle",
    "register_model",
    "register_model_class",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
