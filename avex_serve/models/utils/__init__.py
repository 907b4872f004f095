"""Models by name: the registry, the factory and the loader."""

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

__all__ = [
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
    "register_model",
    "register_model_class",
]
