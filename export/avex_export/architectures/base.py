"""What the exporter can do with a backbone: passes, half precision, int8; and the object that passes rewrite."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import Probe

_Backbone = TypeVar("_Backbone", bound=ModelBase)


@dataclass(frozen=True)
class Target:
    """Copies of probes on one backbone, to be rewritten in place, and the clips that they will process."""

    probes: tuple[Probe, ...]
    samples: int  # of a clip; if clips may have any length, of a typical one
    any_length: bool = False
    takes_padding_mask: bool = False

    @property
    def model(self) -> ModelBase:
        """The backbone that all probes share."""
        model = self.probes[0].base_model
        assert model is not None
        return model

    def model_as(self, backbone: type[_Backbone]) -> _Backbone:
        """The backbone, which the caller knows to be of this class."""
        assert isinstance(self.model, backbone)
        return self.model

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that any of the probes taps, each once."""
        return tuple(dict.fromkeys(layer for probe in self.probes for layer in probe.layers))

    @property
    def pooling(self) -> Literal["mean", "cls_token"] | None:
        """How every probe reduces time first; None if they differ, or if one of them excludes padding."""
        pads = self.model.fills_clips or self.takes_padding_mask
        if pads and any(probe.exclude_padding for probe in self.probes):
            return None
        ways = {_pooling(probe) for probe in self.probes}
        return ways.pop() if len(ways) == 1 else None


def _pooling(probe: Probe) -> Literal["mean", "cls_token"] | None:
    if probe.aggregation == "none":
        return "mean" if probe.input_processing == "pooled" else None
    return probe.aggregation if probe.aggregation in ("mean", "cls_token") else None


@dataclass(frozen=True)
class Pass:
    """A rewriting, by its name in ``--without`` and ``--explain``; each architecture has its own code for it."""

    name: str
    summary: str


Rewrite = Callable[[Target], bool]  # rewrites the copies in place; returns whether it changed anything

DEAD_LAYERS = Pass("dead-layers", "leave out what comes after the tapped layers, and classifiers")
PROJECTIONS = Pass("projections", "one product for queries, keys, values and gates, with their scale")
NORMS = Pass("norms", "fold the residual's scale and the biases into the layer norms")
POOLING = Pass("pooling", "take the mean, or the first token, before tapped operators")


@dataclass(frozen=True)
class Architecture:
    """What the exporter can do with backbones of one class.

    Paths name a submodule of the backbone, as `torch.nn.Module.get_submodule` takes them.

    Attributes:
        name: in messages.
        backbone: the class.
        passes: in the order in which they are applied.
        network: path of the module whose input is the front end's features. With ``--half`` the front end stays in
            float32, and the cast to float16 is here. None: there is no half precision.
        blocks: path of the blocks whose linear maps ``--quantize int8`` turns into integers. None: there is no int8.
        refusals: by option, the reason why these backbones refuse it, where the usual message doesn't suffice.
    """

    name: str
    backbone: type[ModelBase]
    passes: Mapping[Pass, Rewrite]
    network: str | None = None
    blocks: str | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
