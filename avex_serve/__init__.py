"""From a trained avex probe to a service.

The public names below load on first use: importing the package imports neither torch nor onnxruntime, so a
serving process loads only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avex_serve.archive.frames import predict
    from avex_serve.audio.reader import decode
    from avex_serve.inference.backend import open_bundle
    from avex_serve.inference.engine import Engine
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

# In a file, since a bento carries the package's files without its metadata. A build writes it from the last tag.
try:
    from avex_serve._version import version as __version__
except ModuleNotFoundError:  # a checkout that was not installed
    __version__ = "0.0.0"

__all__ = [
    "Engine",
    "__version__",
    "build_model",
    "build_model_from_spec",
    "decode",
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
    "predict",
    "register_model",
    "register_model_class",
]

_REGISTRY = "avex_serve.models.utils.registry"
_ELSEWHERE = {
    "Engine": "avex_serve.inference.engine",
    "decode": "avex_serve.audio.reader",
    "open_bundle": "avex_serve.inference.backend",
    "predict": "avex_serve.archive.frames",
    "load_label_mapping": "avex_serve.models.utils.load",
    "load_model": "avex_serve.models.utils.load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, _REGISTRY)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
