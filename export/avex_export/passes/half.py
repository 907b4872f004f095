"""Half precision, for TorchScript on CUDA: the network in float16, front end and answers in float32."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avex_serve.models.base_model import ModelBase
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.efficientnet import EfficientNetModel
from avex_serve.models.frontends import KaldiFbank, Spectrogram
from avex_serve.models.probes import Probe


class _Cast(nn.Module):
    """A module of another precision, for inputs in float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """The module's output for the cast input."""
        return self.module(x.to(self.dtype), *others)


def halve(probes: Sequence[Probe], dtype: torch.dtype = torch.float16) -> None:
    """Bring rewritten copies of probes on one backbone to half precision, in place.

    The features of the front end, whose range is that of 16-bit integers squared, stay in float32.

    Raises:
        ValueError: a backbone whose front end is not known.
    """
    model = probes[0].base_model
    if model is None or not isinstance(model, BEATsModel | EATModel | EfficientNetModel):
        raise ValueError(
            "half precision is for BEATs, EAT and EfficientNet, whose front ends are known to need float32; export "
            "this model without --half"
        )
    front_ends = [part for part in model.modules() if isinstance(part, KaldiFbank | Spectrogram)]
    kept = {name: t.clone() for part in front_ends for name, t in _tensors(part)}
    for probe in probes:
        probe.to(dtype)
    for part in front_ends:
        part.float()
        for name, tensor in _tensors(part):
            tensor.copy_(kept[name])
    _cast_first_layer(model, dtype)


def _tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{id(part)}.{name}", tensor) for name, tensor in part.named_buffers()]


def _cast_first_layer(model: ModelBase, dtype: torch.dtype) -> None:
    if isinstance(model, BEATsModel):
        model.backbone.patch_embedding = _Cast(model.backbone.patch_embedding, dtype)  # type: ignore[assignment]
    elif isinstance(model, EATModel):
        encoder = model.backbone.model.local_encoder
        encoder.proj = _Cast(encoder.proj, dtype)  # type: ignore[assignment]
    elif isinstance(model, EfficientNetModel):
        model.model.features[0] = _Cast(model.model.features[0], dtype)
