"""From a configuration to a probe."""

import difflib
import logging
from typing import Any

from avex_serve.configs import ProbeConfig
from avex_serve.models.base_model import Backbone, ModelBase, adapt
from avex_serve.models.probes.base import InputDim, Probe
from avex_serve.models.probes.utils.registry import HEAD_OPTIONS, get_probe_class, list_probe_classes

logger = logging.getLogger(__name__)

_EXTRA_FIELDS = ("exclude_padding",)


def build_probe_from_config(
    probe_config: ProbeConfig,
    num_classes: int,
    device: str,
    base_model: ModelBase | Backbone | None = None,
    input_dim: InputDim | None = None,
    target_length: int | None = None,
    **kwargs: Any,
) -> Probe:
    """Build a probe with a random head: online on a backbone, or offline on stored embeddings.

    Args:
        probe_config: what to build.
        num_classes: width of the logits.
        device: where to put it, such as ``cpu`` or ``cuda``.
        base_model: the backbone, for online mode. The configuration determines whether it is frozen. A model that
            isn't a `ModelBase`, such as one of avex, is adapted (`avex_serve.models.base_model`).
        input_dim: for offline mode, the shape of a clip's embedding: its width, a shape without the batch, or a list
            with one shape per layer.
        target_length: samples of a clip; overrides the configuration's, which overrides the backbone's.
        **kwargs: options of the head that the configuration doesn't set.

    Raises:
        ValueError: both or neither of `base_model` and `input_dim`, a `base_model` that isn't a backbone, unknown
            layers, or incompatible shapes or processing.
        TypeError: an unknown keyword.
        RuntimeError: a clip too short for the backbone.
    """
    if base_model is not None and input_dim is not None:
        raise ValueError(
            "Cannot specify both 'base_model' and 'input_dim'. "
            "Use 'base_model' for online mode or 'input_dim' for offline mode."
        )
    if base_model is None and input_dim is None:
        raise ValueError("Must specify either 'base_model' (for online mode) or 'input_dim' (for offline mode).")
    kind = probe_config.probe_type
    cls = get_probe_class(kind)
    if cls is None:
        raise ValueError(f"Probe class '{kind}' is not registered. Available classes: {list_probe_classes()}")
    backbone = None if base_model is None else adapt(base_model)
    _refuse_unknown(kwargs, kind, cls)
    _warn_of_unused(probe_config, kwargs, cls, online=backbone is not None)
    # The keywords fill unset fields, so that a saved probe is built the same again.
    given = {n: v for n, v in kwargs.items() if n not in probe_config.model_fields_set and v is not None}
    if fields := {n: v for n, v in given.items() if n in ProbeConfig.model_fields}:
        probe_config = ProbeConfig(**probe_config.model_dump(exclude_unset=True), **fields)
    options = given | probe_config.model_dump(include=set(cls.options), exclude_none=True)
    processing = probe_config.input_processing if "input_processing" in probe_config.model_fields_set else None
    selectors = probe_config.target_layers
    probe = cls(
        base_model=backbone,
        layers=[str(s) for s in selectors] if backbone is None else backbone.resolve_layers(selectors),
        num_classes=num_classes,
        device=device,
        feature_mode=backbone is None,
        input_dim=input_dim,
        aggregation=probe_config.aggregation,
        target_length=probe_config.target_length if target_length is None else target_length,
        freeze_backbone=probe_config.freeze_backbone or backbone is None,
        input_processing=processing,
        exclude_padding=bool((probe_config.extra_config or {}).get("exclude_padding", False)),
        **options,
    )
    probe.config = probe_config
    return probe


def _refuse_unknown(kwargs: dict[str, Any], kind: str, cls: type[Probe]) -> None:
    for name in kwargs.keys() - cls.options.keys():
        if name in ProbeConfig.model_fields:
            hint = "set it in the ProbeConfig"
        elif close := difflib.get_close_matches(name, [*cls.options, *ProbeConfig.model_fields], n=1):
            hint = f"did you mean '{close[0]}'?"
        else:
            hint = f"it accepts {sorted(cls.options) or 'no options'}"
        raise TypeError(f"build_probe_from_config() got an unexpected keyword '{name}' for a {kind} probe; {hint}")


def _warn_of_unused(config: ProbeConfig, kwargs: dict[str, Any], cls: type[Probe], *, online: bool) -> None:
    unused = HEAD_OPTIONS - (cls.options.keys() - cls.without_effect)
    for name, value in config.model_dump(include=unused, exclude_unset=True, exclude_none=True).items():
        logger.warning("%s=%r has no effect on probe_type=%r", name, value, config.probe_type)
    for name in sorted(kwargs.keys() & config.model_fields_set):
        logger.warning(
            "keyword %s=%r is ignored: the configuration sets %r", name, kwargs[name], getattr(config, name)
        )
    for name in (config.extra_config or {}).keys() - set(_EXTRA_FIELDS):
        logger.warning("extra_config[%r] has no effect; known: %s", name, ", ".join(_EXTRA_FIELDS))
    if config.online_training is not None and config.online_training != online:
        mode = "online, on a base_model" if online else "offline, on stored embeddings"
        logger.warning("online_training=%s, but the probe is built %s", config.online_training, mode)
