"""BEATs under avex's import path and name."""

from avex_serve.models.beats import BEATsModel as Model

__all__ = ["Model"]
