"""`TransformerProbe` under avex's import path."""

from avex_serve.models.probes.heads import TransformerProbe

__all__ = ["TransformerProbe"]
