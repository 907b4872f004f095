"""The architectures that the exporter knows, one file each. To add one, add its file and its name in the list."""

from collections.abc import Callable

from avex_export.architectures.base import Architecture
from avex_export.architectures.beats import BEATS
from avex_export.architectures.eat import EAT
from avex_export.architectures.efficientnet import EFFICIENTNET
from avex_export.architectures.spectra import FRONT_ENDS
from avex_serve.models.base_model import ModelBase

ARCHITECTURES: tuple[Architecture, ...] = (BEATS, EAT, EFFICIENTNET)

# Any other backbone: only its front end is known, if it is one of ours.
_UNKNOWN = Architecture("other backbones", ModelBase, FRONT_ENDS)


def architecture_of(model: ModelBase) -> Architecture:
    """The architecture of a backbone; for an unknown class, one that only rewrites front ends."""
    return next(each for each in (*ARCHITECTURES, _UNKNOWN) if isinstance(model, each.backbone))


def names(which: Callable[[Architecture], object]) -> str:
    """Names of the architectures for which `which` is true, as text: "A, B and C"."""
    *others, last = [each.name for each in ARCHITECTURES if which(each)]
    return " and ".join([", ".join(others), last] if others else [last])
