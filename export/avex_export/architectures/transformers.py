"""Passes that transformers share: merged attention, folded norms, and the mean before the last operator."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avex_export.architectures.base import Target


@dataclass(frozen=True)
class Blocks:
    """Path of a transformer's blocks, and of their parts within a block.

    A block is two residual branches, attention and feed-forward, each with a norm after its residual.
    """

    path: str  # of the list of blocks in the model
    attention: str
    projections: tuple[str, ...]  # the first linear maps of the attention
    attended: str  # the last linear map of the attention
    widening: str  # the first linear map of the feed-forward layers
    fed: str  # their last linear map
    norms: tuple[str, str]  # after each residual

    def of(self, target: Target) -> Any:
        """The list of blocks, whose class the architecture knows."""
        return target.model.get_submodule(self.path)

    def tapped(self, target: Target) -> dict[int, set[str]]:
        """The tapped parts of each block by its number; the block's own output is the empty part."""
        found = defaultdict(set)
        for layer in target.layers:
            if layer.startswith(f"{self.path}."):
                number, _, part = layer.removeprefix(f"{self.path}.").partition(".")
                found[int(number)].add(part)
        return dict(found)

    def trim(self, target: Target, outputs: Collection[str]) -> None:
        """Drop the blocks after the last tapped one, unless one of the layers that follow all blocks is tapped."""
        if set(target.layers).isdisjoint(outputs):
            needed = max(self.tapped(target), default=-1) + 1
            target.model.set_submodule(self.path, self.of(target)[:needed])

    def merge_projections(self, target: Target, merged: Callable[[Any], "MergedAttention"]) -> bool:
        """Replace each attention by a `MergedAttention`, unless one of its projections is tapped."""
        tapped, replaced = self.tapped(target), False
        for i, block in enumerate(self.of(target)):
            if tapped.get(i, set()).isdisjoint(self.projections):
                setattr(block, self.attention, merged(getattr(block, self.attention)))
                replaced = True
        return replaced

    def linears(self, block: nn.Module) -> tuple[tuple[str, ...], str]:
        """The first linear maps of the attention, merged or not, and the last one."""
        if isinstance(block.get_submodule(self.attention), MergedAttention):
            return (f"{self.attention}.projection",), f"{self.attention}.out"
        return self.projections, self.attended

    def fold_norms(self, target: Target, norm: nn.Module, unchanged: Collection[str]) -> bool:
        """Fold DeepNorm's scale of the residuals, and the biases that are added to them, into the layer norms.

        A norm then returns scale * x + b instead of x, where b is the bias of the branch that is added to it. The
        weights of the linear maps after the norm undo both. The layers between these maps change their values and
        must not be tapped; layers outside of blocks don't change if they are in `unchanged`. The bias of a tapped
        branch stays where it is. `norm` is the norm before the first block.
        """
        tapped = self.tapped(target)
        outside = {layer for layer in target.layers if not layer.startswith(f"{self.path}.")}
        inside = set[str]().union(*tapped.values())
        if not outside <= set(unchanged) or not all(_ends(part, self.attended, self.fed) for part in inside):
            return False
        for i, block in enumerate(self.of(target)):
            scale = getattr(block, "residual_scale", 1.0)  # DeepNorm's
            attended, fed = (
                any(_ends(part, end) for part in tapped.get(i, ())) for end in (self.attended, self.fed)
            )
            _fold(block, norm, *self.linears(block), scale, attended)
            norm = block.get_submodule(self.norms[0])
            if isinstance(norm, nn.LayerNorm):  # else nothing follows the attention
                _fold(block, norm, (self.widening,), self.fed, scale, fed)
                norm = block.get_submodule(self.norms[1])
            if scale != 1.0:
                block.residual_scale = 1.0
        return len(self.of(target)) > 0

    def pool(
        self,
        target: Target,
        tokens: int | None,
        part: str,
        outputs: Collection[str],
        others: Collection[str],
        insert: Callable[[Any, "Pool"], None],
    ) -> bool:
        """Take the mean or first token before a linear map if it is the last layer, and the mean of other layers.

        The mean of its outputs is its output for the mean, and the first token commutes with any map of single
        tokens. The layer then has one time step.

        Args:
            target: what is rewritten.
            tokens: of a clip; None: clips may have any length.
            part: of a block, the linear map.
            outputs: layers after all blocks; if one of them is tapped, no block has the last layer.
            others: layers that are not sequences of all tokens.
            insert: puts the pooling into the block.
        """
        if target.pooling is None:
            return False
        tapped, pooled = self.tapped(target), None
        last = max(tapped, default=-1)
        if tapped.get(last) == {part} and set(target.layers).isdisjoint(outputs):
            pooled = f"{self.path}.{last}.{part}"
            insert(self.of(target)[last], MeanOverTime(tokens) if target.pooling == "mean" else _first_token)
        sequences = [layer for layer in target.layers if layer != pooled and layer not in others]
        if target.pooling == "mean" and sequences:
            target.model.tap_pooling = PooledTaps(tokens, sequences)
            return True
        return pooled is not None


def _ends(part: str, *outputs: str) -> bool:
    """Whether a part of a block is one of the linear maps, or ends with it."""
    return part != "" and any(f"{output}.".startswith(f"{part}.") for output in outputs)


@torch.no_grad()
def _fold(block: Any, norm: Any, readers: Sequence[str], output: str, scale: float, tapped: bool) -> None:
    """Fold a residual's scale, and the bias of the branch that leads from the norm through readers to an output."""
    end = block.get_submodule(output)
    shift = torch.zeros_like(norm.bias) if tapped else end.bias.detach().clone()
    for name in readers:
        reader = block.get_submodule(name)
        weight, bias = rows_of(reader)
        weight = weight / scale
        reader.weight.copy_(weight)
        reader.bias.copy_(bias - weight @ shift.double())
    norm.weight.mul_(scale)
    norm.bias.mul_(scale).add_(shift)
    if not tapped:
        end.register_parameter("bias", None)


class MergedAttention(nn.Module):
    """Self-attention with one product for queries, keys, values and, in BEATs, the gates of the position bias.

    Queries are scaled beforehand. Gates are linear in the queries, so their weights are a product of weights.
    """

    def __init__(self, rows: list["Rows"], out: nn.Linear, heads: int) -> None:
        """Merge the rows of queries, keys and values, D each, and 2 * heads of gates; `out` is D → D."""
        super().__init__()
        self.projection, self.out, self.heads = _linear(rows), out, heads

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D) → queries, keys and values (B, heads, T, head_dim), and the remaining rows (B, T, …)."""
        width = x.shape[-1]
        projected = self.projection(x)
        query, key, value = (
            projected[..., i * width : (i + 1) * width].reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for i in range(3)
        )
        return query, key, value, projected[..., 3 * width :]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of scaled queries, (B, heads, T, head_dim) each, to (B, T, heads * head_dim)."""
        if torch.onnx.is_in_onnx_export():  # onnxruntime is faster with the parts than with one operator
            scores = query @ key.transpose(-1, -2)
            attended = (scores if bias is None else scores + bias).softmax(dim=-1) @ value
        else:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return attended.transpose(1, 2).flatten(2)


Rows = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,) of a linear map, float64


def rows_of(linear: nn.Linear, factor: float = 1.0) -> Rows:
    """The rows of a linear map, scaled."""
    return linear.weight.detach().double() * factor, linear.bias.detach().double() * factor


def _linear(rows: list[Rows]) -> nn.Linear:
    weight, bias = (torch.cat([part[i] for part in rows]) for i in (0, 1))
    merged = nn.Linear(weight.shape[1], weight.shape[0])
    merged.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return merged.requires_grad_(False)


class MeanOverTime(nn.Module):
    """(B, T, D) → (B, 1, D) as a product, which is faster than a mean along an inner axis."""

    share: Tensor | None  # (1, T), or None for clips of any length

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.register_buffer("share", None if tokens is None else torch.full((1, tokens), 1.0 / tokens))

    def forward(self, x: Tensor) -> Tensor:
        """The mean over time; the axis stays."""
        if self.share is not None:
            return self.share @ x
        # Shares, not a sum that is divided: that would overflow in half precision.
        return (torch.ones_like(x[:1, :, 0]) / x.shape[1]) @ x


def _first_token(x: Tensor) -> Tensor:
    """(B, T, D) → (B, 1, D)."""
    return x[:, :1]


Pool = Callable[[Tensor], Tensor]  # `MeanOverTime` or the first token


class Then(nn.Module):
    """Two modules or functions in sequence."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """The second's output for the first's output."""
        return self.second(self.first(x))


class PooledTaps(nn.Module):
    """Tapped sequences by name (B, T, D), some of them reduced to their mean (B, 1, D)."""

    def __init__(self, tokens: int | None, layers: Collection[str]) -> None:
        super().__init__()
        self.mean, self.layers = MeanOverTime(tokens), tuple(layers)

    def forward(self, tapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same names."""
        return {name: self.mean(x) if name in self.layers else x for name, x in tapped.items()}
