"""Pooling before tapped operators: they are linear, so the mean of their outputs is their output for the mean."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avex_export.passes.efficientnet import pool_before_convolutions
from avex_export.passes.target import Target
from avex_export.passes.transformers import MergedAttention
from avex_serve.models import beats, eat, efficientnet
from avex_serve.models.base_model import ModelBase
from avex_serve.models.layers import BACKBONE

# Tapped layers that are no sequences of all tokens.
_OTHERS = (
    "backbone.patch_embedding",
    "backbone.encoder.pos_conv",
    "backbone.model.local_encoder.proj",
    "backbone.model.local_encoder",
)


class MeanOverTime(nn.Module):
    """(B, T, D) → (B, 1, D) as a product, which is faster than a mean along an inner axis."""

    share: Tensor | None  # (1, T), or None of clips of any length

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.register_buffer("share", None if tokens is None else torch.full((1, tokens), 1.0 / tokens))

    def forward(self, x: Tensor) -> Tensor:
        """The mean over time, whose axis stays."""
        if self.share is not None:
            return self.share @ x
        # Shares, not a sum that is divided: that would overflow in half precision.
        return (torch.ones_like(x[:1, :, 0]) / x.shape[1]) @ x


class PooledTaps(nn.Module):
    """Tapped sequences by name (B, T, D), some of them reduced to their mean (B, 1, D)."""

    def __init__(self, tokens: int | None, layers: Sequence[str]) -> None:
        super().__init__()
        self.mean, self.layers = MeanOverTime(tokens), tuple(layers)

    def forward(self, tapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same names."""
        return {name: self.mean(x) if name in self.layers else x for name, x in tapped.items()}


class FirstToken(nn.Module):
    """(B, T, D) → (B, 1, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """The first token, as a sequence of one."""
        return x[:, :1]


def pool_before_tapped_operators(target: Target) -> bool:
    """Aggregate, in place, before the operator of the deepest tapped layer, where the pass ends, and others at once.

    That is BEATs' ``fc2``, EAT's ``attn.proj`` or EfficientNet's last convolution, 1 x 1, and there those that end
    bottlenecks and the first one, too. The layer that is tapped then has one step of time. A mean commutes with any
    linear operator, the first token with any that looks at tokens one by one.
    """
    model, layers, how = target.model, target.layers, target.pooling
    if how is None:
        return False
    if isinstance(model, beats.BEATsModel):
        tokens = None if target.any_length else model.backbone.tokens(target.samples)
        return _pool_taps(model, layers, how, tokens, _pool_beats(model, layers, how, tokens))
    if isinstance(model, eat.EATModel):
        tokens = model.cfg.patches + 1
        return _pool_taps(model, layers, how, tokens, _pool_eat(model, layers, how, tokens))
    if isinstance(model, efficientnet.EfficientNetModel) and how == "mean":
        return pool_before_convolutions(target, model)
    return False


class _Then(nn.Module):
    """One thing after the other; the first may be a function."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(self.first(x))


def _pool_taps(model: ModelBase, layers: Sequence[str], how: str, tokens: int | None, pooled: str | None) -> bool:
    """Take the means of the sequences among the layers, but for the one that is pooled already, as products."""
    sequences = [layer for layer in layers if layer != pooled and layer not in _OTHERS]
    if how == "mean" and sequences:
        model.tap_pooling = PooledTaps(tokens, sequences)
        return True
    return pooled is not None


def _pool_beats(model: beats.BEATsModel, layers: Sequence[str], how: str, tokens: int | None) -> str | None:
    """Pool before the last tapped layer, and return its name; None if it can't be."""
    name, block = _last_block(model.backbone.encoder.layers, "backbone.encoder.layers", layers, {"fc2"})
    if block is None or {BACKBONE, "backbone.encoder", "backbone.encoder.layer_norm"} & set(layers):
        return None
    if how == "mean":
        block.activation = _Then(block.activation, MeanOverTime(tokens))
    else:
        block.fc1 = _Then(FirstToken(), block.fc1)
    return name


def _pool_eat(model: eat.EATModel, layers: Sequence[str], how: str, tokens: int) -> str | None:
    """As `_pool_beats`."""
    name, block = _last_block(model.backbone.model.blocks, "backbone.model.blocks", layers, {"attn.proj"})
    if block is None or {BACKBONE, "backbone.model"} & set(layers):
        return None
    attention = block.attn
    writer = "out" if isinstance(attention, MergedAttention) else "proj"
    pool = MeanOverTime(tokens) if how == "mean" else FirstToken()
    setattr(attention, writer, _Then(pool, getattr(attention, writer)))
    return name


def _last_block(blocks: nn.ModuleList, name: str, layers: Sequence[str], parts: set[str]) -> tuple[str | None, Any]:
    """The tapped layer of the deepest tapped block and the block, if nothing of it is tapped but that; else None."""
    inside = [layer.removeprefix(f"{name}.").partition(".") for layer in layers if layer.startswith(f"{name}.")]
    deepest = max((int(number) for number, _, _ in inside), default=-1)
    tapped = {part for number, _, part in inside if int(number) == deepest}
    if len(tapped) != 1 or not tapped <= parts:
        return None, None
    return f"{name}.{deepest}.{tapped.pop()}", blocks[deepest]
