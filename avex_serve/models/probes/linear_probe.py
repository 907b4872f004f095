"""`LinearProbe` under avex's import path."""

from avex_serve.models.probes.heads import LinearProbe

__all__ = ["LinearProbe"]
