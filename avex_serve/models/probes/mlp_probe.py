"""`MLPProbe` under avex's import path."""

from avex_serve.models.probes.heads import MLPProbe

__all__ = ["MLPProbe"]
