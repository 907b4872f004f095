"""`build_model` and `build_model_from_spec` under avex's import path."""

from avex_serve.models.utils.registry import build_model, build_model_from_spec

__all__ = ["build_model", "build_model_from_spec"]
