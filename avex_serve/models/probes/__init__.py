"""Probes: small heads on the embeddings of a backbone. Names and import paths are avex's."""

from avex_serve.models.probes.base import Probe
from avex_serve.models.probes.heads import AttentionProbe, LinearProbe, LSTMProbe, MLPProbe, TransformerProbe
from avex_serve.models.probes.storage import load_probe, save_probe
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
    "TransformerProbe",
    "build_probe_from_config",
    "get_probe_class",
    "list_probe_classes",
    "load_probe",
    "load_probe_config",
    "register_probe_class",
    "save_probe",
]
