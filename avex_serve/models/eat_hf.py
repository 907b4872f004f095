"""EAT under avex's import path and names."""

from avex_serve.models.eat import EATModel as EATHFModel
from avex_serve.models.eat import EATModel as Model

__all__ = ["EATHFModel", "Model"]
