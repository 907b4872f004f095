"""Probes: small heads on the embeddings of a backbone. Names and import paths are avex's."""

from avex_serve.models.probes.attention_probe import AttentionProbe
from avex_serve.models.probes.base import Probe, SequenceProbe
from avex_serve.models.probes.linear_probe import LinearProbe
from avex_serve.models.probes.lstm_probe import LSTMProbe
from avex_serve.models.probes.mlp_probe import MLPProbe
from avex_serve.models.probes.storage import load_probe, save_probe
from avex_serve.models.probes.transformer_probe import TransformerProbe
from avex_serve.models.probes.utils import (
    build_probe_from_config,
    get_probe_class,
    list_probe_classes,
    load_probe_config,
    register_probe_class,
)

__all__ = [
    "AttentionProbe",
    "LSTMProbe",
    "LinearProbe",
    "MLPProbe",
    "Probe",
    "SequenceProbe",
    "TransformerProbe",
    "build_probe_from_config",
    "get_probe_class",
    "list_probe_classes",
    "load_probe",
    "load_probe_config",
    "register_probe_class",
    "save_probe",
]
