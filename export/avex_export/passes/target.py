"""What the passes work on."""

from dataclasses import dataclass
from typing import Literal

from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import Probe


@dataclass(frozen=True)
class Target:
    """Copies of probes on one backbone, to be rewritten in place, for clips of so many samples."""

    probes: tuple[Probe, ...]
    samples: int

    @property
    def model(self) -> ModelBase:
        """The backbone of all of them."""
        model = self.probes[0].base_model
        assert model is not None
        return model

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that any of them taps, each once."""
        return tuple(dict.fromkeys(layer for probe in self.probes for layer in probe.layers))

    @property
    def pooling(self) -> Literal["mean", "cls_token"] | None:
        """How all of them reduce time before anything else, if they agree and leave no step out; else None."""
        if any(probe.exclude_padding for probe in self.probes) and self.model.fills_clips:
            return None
        ways = {_pooling(probe) for probe in self.probes}
        (way,) = ways if len(ways) == 1 else (None,)
        return way


def _pooling(probe: Probe) -> Literal["mean", "cls_token"] | None:
    if probe.aggregation == "none":
        return "mean" if probe.input_processing == "pooled" else None
    return probe.aggregation if probe.aggregation in ("mean", "cls_token") else None
