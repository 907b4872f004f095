"""`AttentionProbe` under avex's import path."""

from avex_serve.models.probes.heads import AttentionProbe

__all__ = ["AttentionProbe"]
