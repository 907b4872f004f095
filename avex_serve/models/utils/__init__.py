"""Models by name: register, build and load them."""

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
