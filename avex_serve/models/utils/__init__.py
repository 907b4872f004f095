"""Models by name: the registry, the factory and the loader."""

from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.load import list_model_layers, load_model
from avex_serve.models.utils.registry import (
    get_checkpoint_path,
    get_model_spec,
    list_models,
    register_model,
)

__all__ = [
    "build_model_from_spec",
    "get_checkpoint_path",
    "get_model_spec",
    "list_model_layers",
    "list_models",
    "load_model",
    "register_model",
]
