"""`LSTMProbe` under avex's import path."""

from avex_serve.models.probes.heads import LSTMProbe

__all__ = ["LSTMProbe"]
