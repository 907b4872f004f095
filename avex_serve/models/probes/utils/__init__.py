"""Probes by name and from configurations."""

from avex_serve.models.probes.utils.factory import build_probe_from_config
from avex_serve.models.probes.utils.registry import (
    get_probe_class,
    list_probe_classes,
    load_probe_config,
    register_probe_class,
)

__all__ = [
    "build_probe_from_config",
    "get_probe_class",
    "list_probe_classes",
    "load_probe_config",
    "register_probe_class",
]
