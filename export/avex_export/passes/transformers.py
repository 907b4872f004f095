"""Passes over the transformers: BEATs and EAT, both with norms after the residuals."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avex_export.passes.target import Target
from avex_serve.models import beats, eat
from avex_serve.models.layers import BACKBONE, Taps

# Parts of a block that are merged into others, so they can't be tapped any more.
_PROJECTIONS = (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".attn.qkv")


def bake_position_bias(target: Target) -> bool:
    """Make constants of BEATs' relative position bias and of the kernel of its positional convolution."""
    model = target.model
    if not isinstance(model, beats.BEATsModel):
        return False
    encoder = model.backbone.encoder
    # Not by remove_parametrizations, which breaks the modules that this one was copied from.
    encoder.pos_conv[0] = _plain_convolution(encoder.pos_conv[0])
    with torch.no_grad():
        bias = encoder.position_bias(model.backbone.tokens(target.samples))
    del encoder.fixed_position_bias
    encoder.register_buffer("fixed_position_bias", None if bias is None else bias.contiguous(), persistent=False)
    for block in encoder.layers:
        assert isinstance(block, beats.Block)
        block.self_attn.relative_attention_bias = None
    return True


def merge_projections(target: Target) -> bool:
    """See `MergedAttention`; attention whose projections are tapped stays as it is."""
    model = target.model
    if isinstance(model, beats.BEATsModel):
        blocks, name = model.backbone.encoder.layers, "backbone.encoder.layers"
    elif isinstance(model, eat.EATModel):
        blocks, name = model.backbone.model.blocks, "backbone.model.blocks"
    else:
        return False
    inside = {f"{name}.{i}{part}" for i in range(len(blocks)) for part in _PROJECTIONS}
    merged = False
    for i, block in enumerate(blocks):
        if any(layer in inside and layer.startswith(f"{name}.{i}.") for layer in target.layers):
            continue
        if isinstance(block, beats.Block):
            block.self_attn = BEATsAttention(block.self_attn)  # type: ignore[assignment]
        elif isinstance(block, eat.Block):
            block.attn = EATAttention(block.attn)  # type: ignore[assignment]
        merged = True
    return merged


def fold_norms(target: Target) -> bool:
    """Fold DeepNorm's scale of the residuals, and the biases that are added to them, into the layer norms.

    A norm gives alpha * x + b instead of x, where b is the bias of the branch that is added to it; what else reads
    the norm, the first product of that branch, takes both back in its own weights. Layers whose values change by
    that, those between the products, must not be tapped. The bias of a tapped product stays where it is.
    """
    sublayers = list(_sublayers(target))
    for sublayer in sublayers:
        _fold(sublayer)
    return bool(sublayers)


class MergedAttention(nn.Module):
    """Self-attention with one product for queries, keys, values and, in BEATs, the gates of the position bias.

    Queries are scaled beforehand, and gates are linear in them, so their weights are a product of weights.
    """

    def __init__(self, rows: list["_Rows"], out: nn.Linear, heads: int) -> None:
        """Take over the weights.

        Args:
            rows: of queries, keys and values, D each, and 2 * heads of gates.
            out: D → D.
            heads: of the attention.
        """
        super().__init__()
        self.projection, self.out, self.heads = _linear(rows), out, heads
        self.fused = True  # one operator for the attention; ONNX is better off with its parts

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D) → queries, keys and values (B, heads, T, head_dim), and what comes after them (B, T, …)."""
        width = x.shape[-1]
        projected = self.projection(x)
        query, key, value = (
            projected[..., i * width : (i + 1) * width].reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for i in range(3)
        )
        return query, key, value, projected[..., 3 * width :]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of scaled queries, (B, heads, T, head_dim) each, to (B, T, heads * head_dim)."""
        if self.fused:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        else:
            scores = query @ key.transpose(-1, -2)
            attended = (scores if bias is None else scores + bias).softmax(dim=-1) @ value
        return attended.transpose(1, 2).flatten(2)


class BEATsAttention(MergedAttention):
    """BEATs' attention; its gates are sums over four outputs each of a map that all heads share."""

    def __init__(self, attention: beats.SelfAttention) -> None:
        query, key, value = (_double(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        rows = [_scaled(query, attention.head_dim**-0.5), key, value]
        if attention.gated:
            weight, bias = _double(attention.grep_linear)
            weight, bias = weight.reshape(2, 4, -1).sum(dim=1), bias.reshape(2, 4).sum(dim=1)
            shape = (attention.heads, attention.head_dim)
            # (2, head_dim) with (heads, head_dim, D): all first gates, then all second ones.
            gates = torch.einsum("gd,hdx->ghx", weight, query[0].reshape(*shape, -1)).flatten(0, 1)
            shifts = torch.einsum("gd,hd->gh", weight, query[1].reshape(shape)) + bias[:, None]
            rows.append((gates, shifts.flatten()))
        super().__init__(rows, attention.out_proj, attention.heads)
        self.relative_attention_bias = attention.relative_attention_bias
        self.gate = attention.grep_a if attention.gated else None  # (1, heads, 1, 1)

    def forward(
        self, x: Tensor, position_bias: Tensor | None, padding: Tensor | None, taps: Taps, name: str
    ) -> Tensor:
        """As `avex_serve.models.beats.SelfAttention.forward`."""
        query, key, value, gates = self.project(x)
        bias = position_bias
        if bias is not None and self.gate is not None:
            update, reset = gates.sigmoid().transpose(1, 2)[..., None].chunk(2, dim=1)  # (B, heads, T, 1)
            bias = (update * (reset * self.gate - 1.0) + 2.0) * bias
        if padding is not None:
            hidden = torch.zeros(padding.shape, dtype=x.dtype, device=x.device).masked_fill(padding, -torch.inf)
            hidden = hidden[:, None, None, :]
            bias = hidden if bias is None else bias + hidden
        output = self.out(self.attend(query, key, value, bias))
        taps(f"{name}.out_proj", output)
        taps(name, output)
        return output


class EATAttention(MergedAttention):
    """EAT's attention, which has one product already."""

    def __init__(self, attention: eat.SelfAttention) -> None:
        weight, bias = _double(attention.qkv)
        width = attention.qkv.in_features
        query = _scaled((weight[:width], bias[:width]), (width // attention.heads) ** -0.5)
        super().__init__([query, (weight[width:], bias[width:])], attention.proj, attention.heads)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """As `avex_serve.models.eat.SelfAttention.forward`."""
        query, key, value, _ = self.project(x)
        output = self.out(self.attend(query, key, value, None))
        taps(f"{name}.proj", output)
        taps(name, output)
        return output


@dataclass
class _Sublayer:
    """A branch with its residual: norm → readers … writer → + → next norm."""

    norm: nn.LayerNorm  # its output is the residual and goes into the branch
    readers: list[nn.Linear]
    writer: nn.Linear
    scale: float  # of the residual
    tapped: bool  # whether the writer's output is


def _sublayers(target: Target) -> Iterator[_Sublayer]:
    model, layers = target.model, set(target.layers)
    if isinstance(model, beats.BEATsModel) and not model.backbone.encoder.cfg.layer_norm_first:
        blocks, norm, name = model.backbone.encoder.layers, model.backbone.encoder.layer_norm, "backbone.encoder"
        harmless = {
            BACKBONE,
            name,
            *(f"backbone.{p}" for p in ("patch_embedding", "layer_norm", "post_extract_proj")),
        }
        branches = ["layers.{}.self_attn.out_proj", "layers.{}.self_attn"], ["layers.{}.fc2"]
    elif isinstance(model, eat.EATModel):
        blocks, norm, name = model.backbone.model.blocks, model.backbone.model.pre_norm, "backbone.model"
        harmless = {BACKBONE, name, f"{name}.local_encoder", f"{name}.local_encoder.proj"}
        branches = ["blocks.{}.attn.proj", "blocks.{}.attn"], ["blocks.{}.mlp.fc2", "blocks.{}.mlp"]
    else:
        return
    writers = [[{f"{name}.{part.format(i)}" for part in branch} for branch in branches] for i in range(len(blocks))]
    if not layers <= harmless.union(*itertools.chain(*writers)):
        return
    for block, (first, second) in zip(blocks, writers, strict=True):
        if isinstance(block, beats.Block):
            if not isinstance(block.fc1, nn.Linear):  # a gated unit
                return
            attention, scale = block.self_attn, block.residual_scale
            yield _Sublayer(norm, _readers(attention), _writer(attention), scale, bool(first & layers))
            yield _Sublayer(block.self_attn_layer_norm, [block.fc1], block.fc2, scale, bool(second & layers))
            block.residual_scale = 1.0
            norm = block.final_layer_norm
        elif isinstance(block, eat.Block):
            yield _Sublayer(norm, _readers(block.attn), _writer(block.attn), 1.0, bool(first & layers))
            if not isinstance(block.norm1, nn.LayerNorm):  # the pass ends with the attention
                return
            yield _Sublayer(block.norm1, [block.mlp.fc1], block.mlp.fc2, 1.0, bool(second & layers))
            norm = block.norm2


def _readers(attention: nn.Module) -> list[nn.Linear]:
    if isinstance(attention, MergedAttention):
        return [attention.projection]
    if isinstance(attention, eat.SelfAttention):
        return [attention.qkv]
    assert isinstance(attention, beats.SelfAttention)
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _writer(attention: nn.Module) -> nn.Linear:
    out = getattr(attention, "out", None) or getattr(attention, "out_proj", None) or getattr(attention, "proj", None)
    assert isinstance(out, nn.Linear)
    return out


@torch.no_grad()
def _fold(sublayer: _Sublayer) -> None:
    norm, writer, scale = sublayer.norm, sublayer.writer, sublayer.scale
    shift = torch.zeros_like(norm.bias) if sublayer.tapped else writer.bias.detach().clone()
    for reader in sublayer.readers:
        weight, bias = _double(reader)
        weight = weight / scale
        reader.weight.copy_(weight)
        reader.bias.copy_(bias - weight @ shift.double())
    norm.weight.mul_(scale)
    norm.bias.mul_(scale).add_(shift)
    if not sublayer.tapped:
        writer.register_parameter("bias", None)


_Rows = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,), float64


def _double(linear: nn.Linear) -> _Rows:
    return linear.weight.detach().double(), linear.bias.detach().double()


def _scaled(rows: _Rows, factor: float) -> _Rows:
    return rows[0] * factor, rows[1] * factor


def _linear(rows: list[_Rows]) -> nn.Linear:
    weight, bias = (torch.cat([part[i] for part in rows]) for i in (0, 1))
    merged = nn.Linear(weight.shape[1], weight.shape[0])
    merged.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return merged.requires_grad_(False)


def _plain_convolution(normed: nn.Module) -> nn.Conv1d:
    assert isinstance(normed, nn.Conv1d)
    assert normed.bias is not None
    (kernel,) = normed.kernel_size
    plain = nn.Conv1d(normed.in_channels, normed.out_channels, kernel, padding=kernel // 2, groups=normed.groups)
    plain.load_state_dict({"weight": normed.weight, "bias": normed.bias})
    return plain
