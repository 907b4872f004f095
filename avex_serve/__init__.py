"""From a trained avex probe to a service.

The public names below load on first use: importing the package imports neither torch nor onnxruntime, so a
serving process never pays for what it doesn't need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avex_serve.version import __version__

if TYPE_CHECKING:
    from avex_serve.models.utils.factory import build_model_from_spec
    from avex_serve.models.utils.load import list_model_layers, load_model
    from avex_serve.models.utils.registry import (
        get_checkpoint_path,
        get_model_spec,
        list_models,
        register_model,
    )
    from avex_serve.runtime.engine import Engine, open_bundle

_HOME = {
    "Engine": "avex_serve.runtime.engine",
    "open_bundle": "avex_serve.runtime.engine",
    "build_model_from_spec": "avex_serve.models.utils.factory",
    "load_model": "avex_serve.models.utils.load",
    "get_checkpoint_path": "avex_serve.models.utils.registry",
    "get_model_spec": "avex_serve.models.utils.registry",
    "list_model_layers": "avex_serve.models.utils.load",
    "list_models": "avex_serve.models.utils.registry",
    "register_model": "avex_serve.models.utils.registry",
}

__all__ = [
    "Engine",
    "__version__",
    "build_model_from_spec",
    "get_checkpoint_path",
    "get_model_spec",
    "list_model_layers",
    "list_models",
    "load_model",
    "open_bundle",
    "register_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
