"""From a trained avex probe to a service.

The public names below load on first use: importing the package imports neither torch nor onnxruntime, so a
serving process never pays for what it doesn't need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avex_serve.version import __version__

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine
    from avex_serve.inference.opening import open_bundle
    from avex_serve.models.utils.factory import build_model, build_model_from_spec
    from avex_serve.models.utils.load import list_model_layers, load_label_mapping, load_model
    from avex_serve.models.utils.registry import (
        describe_model,
        get_checkpoint_path,
        get_model_class,
        get_model_spec,
        list_model_classes,
        list_models,
        register_model,
        register_model_class,
    )

_HOME = {
    "Engine": "avex_serve.inference.engine",
    "open_bundle": "avex_serve.inference.opening",
    "build_model": "avex_serve.models.utils.factory",
    "build_model_from_spec": "avex_serve.models.utils.factory",
    "list_model_layers": "avex_serve.models.utils.load",
    "load_label_mapping": "avex_serve.models.utils.load",
    "load_model": "avex_serve.models.utils.load",
    "describe_model": "avex_serve.models.utils.registry",
    "get_checkpoint_path": "avex_serve.models.utils.registry",
    "get_model_class": "avex_serve.models.utils.registry",
    "get_model_spec": "avex_serve.models.utils.registry",
    "list_model_classes": "avex_serve.models.utils.registry",
    "list_models": "avex_serve.models.utils.registry",
    "register_model": "avex_serve.models.utils.registry",
    "register_model_class": "avex_serve.models.utils.registry",
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
