"""Heads by name, and probe configurations from YAML."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from avex_serve.configs import ProbeConfig
from avex_serve.models.probes.attention_probe import AttentionProbe
from avex_serve.models.probes.base import Probe
from avex_serve.models.probes.linear_probe import LinearProbe
from avex_serve.models.probes.lstm_probe import LSTMProbe
from avex_serve.models.probes.mlp_probe import MLPProbe
from avex_serve.models.probes.transformer_probe import TransformerProbe

_PROBE_CLASSES: dict[str, type[Probe]] = {
    "linear": LinearProbe,
    "mlp": MLPProbe,
    "lstm": LSTMProbe,
    "attention": AttentionProbe,
    "transformer": TransformerProbe,
}
HEAD_OPTIONS = {option for cls in _PROBE_CLASSES.values() for option in cls.options}


def get_probe_class(name: str) -> type[Probe] | None:
    """The probe class of that name (in upper or lower case), or None."""
    return _PROBE_CLASSES.get(name.lower())


def list_probe_classes() -> list[str]:
    """Names of the probe classes."""
    return list(_PROBE_CLASSES)


def register_probe_class(name: str, cls: type[Probe]) -> None:
    """Make ``probe_type=name``, one of `ProbeConfig`'s types, build your own subclass of `Probe`, else TypeError."""
    if not (isinstance(cls, type) and issubclass(cls, Probe)):
        raise TypeError(f"{cls!r} is not a probe class; derive it from avex_serve.models.probes.Probe")
    _PROBE_CLASSES[name.lower()] = cls


def load_probe_config(yaml_path: str | Path) -> ProbeConfig:
    """A probe configuration from YAML, with its fields at the top level or under ``probe_config:``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such mapping, or fields that don't fit ProbeConfig.
    """
    path = Path(yaml_path)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    fields = content.get("probe_config", content) if isinstance(content, Mapping) else None
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path} must hold a mapping with the fields of a probe, or probe_config: with them")
    return ProbeConfig(**fields)
