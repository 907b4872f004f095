"""Any torch module as a backbone: what it must have, and how it is adapted to `ModelBase`."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from avex_serve.configs import AudioConfig
from avex_serve.models.base_model import ModelBase


@runtime_checkable
class Backbone(Protocol):
    """What a torch module must have to carry a probe. avex's models have it.

    Two attributes are optional. ``audio_config`` (`AudioConfig`, or a mapping of its fields) has the sample rate and
    the length of a clip. Without it, a probe needs ``target_length`` and can't be exported. ``audio_processor`` has
    the same in avex's models (``sr`` or ``sample_rate``, ``target_length_seconds``).
    """

    def __call__(self, wave: Tensor, padding_mask: Tensor | None = None, /) -> Any:
        """A forward pass on (B, S) in [-1, 1], with or without a mask (B, S) bool, True where padded."""

    def get_model_layers(self) -> list[str]:
        """Names of submodules, in the order that ``all`` and indices in ``target_layers`` refer to."""


class AdaptedBackbone(ModelBase):
    """Wraps a torch module that isn't a `ModelBase`. The module itself isn't changed; see `ModelBase.taps`.

    Attributes:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        """Wrap a module that fulfils `Backbone`."""
        parameter = next(module.parameters(), None)
        device = "cpu" if parameter is None else str(parameter.device)
        super().__init__(device=device, audio_config=_audio_config(module))
        self.module = module
        self.training = module.training

    @property
    def called_module(self) -> nn.Module:
        """The adapted module."""
        return self.module

    def get_model_layers(self) -> list[str]:
        """See `ModelBase.get_model_layers`."""
        assert isinstance(self.module, Backbone)
        return list(self.module.get_model_layers())

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Any:
        """The module's output for waveforms (B, S)."""
        return self.module(x) if padding_mask is None else self.module(x, padding_mask)


def adapt(model: object) -> ModelBase:
    """The model itself if it is a `ModelBase`, else an `AdaptedBackbone`.

    Raises:
        ValueError: neither a `ModelBase` nor a torch module that fulfils `Backbone`.
    """
    if isinstance(model, ModelBase):
        return model
    if not (isinstance(model, nn.Module) and isinstance(model, Backbone)):
        raise ValueError(
            f"Model must be an instance of ModelBase, got {type(model)}; or a torch module that names its layers in "
            "get_model_layers()"
        )
    return AdaptedBackbone(model)


def _audio_config(module: nn.Module) -> AudioConfig | None:
    config = getattr(module, "audio_config", None)
    if isinstance(config, AudioConfig):
        return config
    if isinstance(config, Mapping):
        return AudioConfig(**config)
    processor = getattr(module, "audio_processor", None)
    rate = getattr(processor, "sr", None) or getattr(processor, "sample_rate", None)
    if rate is None:
        return None
    seconds = getattr(processor, "target_length_seconds", None)
    fields = {"sample_rate": rate, "representation": "raw", "target_length_seconds": seconds}
    return AudioConfig.model_validate(fields)
