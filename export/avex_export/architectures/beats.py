"""The passes of BEATs."""

from typing import Any

import torch
from torch import Tensor, nn

from avex_export.architectures.base import DEAD_LAYERS, NORMS, POOLING, PROJECTIONS, Architecture, Pass, Target
from avex_export.architectures.spectra import FRONT_ENDS
from avex_export.architectures.transformers import Blocks, MergedAttention, Pool, Then, rows_of
from avex_serve.models.beats_model import BEATsModel, Encoder, SelfAttention, relative_distances
from avex_serve.models.layers import BACKBONE, Taps

POSITIONS = Pass("position-bias", "bake the relative position bias and the positional convolution's norm")

_ENCODER = "backbone.encoder"
_BLOCKS = Blocks(
    path=f"{_ENCODER}.layers",
    attention="self_attn",
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attended="self_attn.out_proj",
    widening="fc1",
    fed="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
)
_OUTPUTS = {BACKBONE, _ENCODER}
_NORM = f"{_ENCODER}.layer_norm"  # before the blocks, or after them if they normalise first
_PATCHES = "backbone.patch_embedding"


def _drop_dead_layers(target: Target) -> bool:
    model = target.model_as(BEATsModel)
    model.classifier = model.backbone.predictor = None
    _BLOCKS.trim(target, {*_OUTPUTS, _NORM} if model.backbone.encoder.cfg.layer_norm_first else _OUTPUTS)
    return True


def _bake_positions(target: Target) -> bool:
    """Turn the relative position bias and the kernel of the positional convolution into constants."""
    backbone = target.model_as(BEATsModel).backbone
    encoder = backbone.encoder
    # Not by remove_parametrizations, which breaks the modules that this one was copied from.
    encoder.pos_conv[0] = _plain_convolution(encoder.pos_conv[0])
    encoder.baked_position_bias = BakedBias(encoder, None if target.any_length else backbone.tokens(target.samples))
    for block in _BLOCKS.of(target):
        block.self_attn.relative_attention_bias = None
    return True


def _plain_convolution(normed: nn.Module) -> nn.Conv1d:
    assert isinstance(normed, nn.Conv1d)
    assert normed.bias is not None
    (kernel,) = normed.kernel_size
    plain = nn.Conv1d(normed.in_channels, normed.out_channels, kernel, padding=kernel // 2, groups=normed.groups)
    plain.load_state_dict({"weight": normed.weight, "bias": normed.bias})
    return plain


class BakedBias(nn.Module):
    """The bias of the attention: a constant for clips of one length, else a table by the distance between tokens."""

    bias: Tensor | None  # (1, heads, T, T); or (heads, 2 * furthest + 1), from the most behind to the most ahead

    def __init__(self, encoder: Encoder, tokens: int | None) -> None:
        super().__init__()
        self.fixed, self.furthest = tokens is not None, encoder.cfg.max_distance  # larger distances share its bucket
        with torch.no_grad():
            if tokens is not None:
                bias = encoder.position_bias(torch.empty(1, tokens, 1))
            elif (bias := encoder.bias_of(torch.arange(-self.furthest, self.furthest + 1))) is not None:
                bias = bias.T
        self.register_buffer("bias", None if bias is None else bias.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, T, D) → (1, heads, T, T); None without positions."""
        if self.bias is None or self.fixed:
            return self.bias
        distances = relative_distances(x).clamp(-self.furthest, self.furthest) + self.furthest
        return self.bias[:, distances][None]


class BEATsAttention(MergedAttention):
    """BEATs' attention. Each gate is the sum of four outputs of a linear map that all heads share."""

    def __init__(self, attention: SelfAttention) -> None:
        query, key, value = rows_of(attention.q_proj), rows_of(attention.k_proj), rows_of(attention.v_proj)
        rows = [rows_of(attention.q_proj, attention.head_dim**-0.5), key, value]
        if attention.gated:
            weight, bias = rows_of(attention.grep_linear)
            weight, bias = weight.reshape(2, 4, -1).sum(dim=1), bias.reshape(2, 4).sum(dim=1)
            shape = (attention.heads, attention.head_dim)
            # (2, head_dim) with (heads, head_dim, D): the first gate of every head, then the second.
            gates = torch.einsum("gd,hdx->ghx", weight, query[0].reshape(*shape, -1)).flatten(0, 1)
            shifts = torch.einsum("gd,hd->gh", weight, query[1].reshape(shape)) + bias[:, None]
            rows.append((gates, shifts.flatten()))
        super().__init__(rows, attention.out_proj, attention.heads)
        self.relative_attention_bias = attention.relative_attention_bias
        self.gate = attention.grep_a if attention.gated else None  # (1, heads, 1, 1)

    def forward(
        self, x: Tensor, position_bias: Tensor | None, padding: Tensor | None, taps: Taps, name: str
    ) -> Tensor:
        """As `avex_serve.models.beats_model.SelfAttention.forward`."""
        query, key, value, gates = self.project(x)
        bias = position_bias
        if bias is not None and self.gate is not None:
            update, reset = gates.sigmoid().transpose(1, 2)[..., None].chunk(2, dim=1)  # (B, heads, T, 1)
            bias = (update * (reset * self.gate - 1.0) + 2.0) * bias
        if padding is not None:
            hidden = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
            hidden = hidden[:, None, None, :]
            bias = hidden if bias is None else bias + hidden
        output = self.out(self.attend(query, key, value, bias))
        taps(f"{name}.out_proj", output)
        taps(name, output)
        return output


def _fold_norms(target: Target) -> bool:
    """See `Blocks.fold_norms`; not for blocks that normalise first or have gated units."""
    encoder = target.model_as(BEATsModel).backbone.encoder
    if encoder.cfg.layer_norm_first or encoder.cfg.activation_fn == "glu":
        return False
    unchanged = {*_OUTPUTS, _PATCHES, "backbone.layer_norm", "backbone.post_extract_proj"}
    return _BLOCKS.fold_norms(target, encoder.layer_norm, unchanged)


def _pool(target: Target) -> bool:
    """See `Blocks.pool`: before ``fc2``, the first token even before ``fc1``."""

    def insert(block: Any, pool: Pool) -> None:
        if target.pooling == "mean":
            block.activation = Then(block.activation, pool)
        else:
            block.fc1 = Then(pool, block.fc1)

    tokens = None if target.any_length else target.model_as(BEATsModel).backbone.tokens(target.samples)
    outputs, others = {*_OUTPUTS, _NORM}, {_PATCHES, f"{_ENCODER}.pos_conv"}
    return _BLOCKS.pool(target, tokens, _BLOCKS.fed, outputs, others, insert)


BEATS = Architecture(
    name="BEATs",
    backbone=BEATsModel,
    passes={
        DEAD_LAYERS: _drop_dead_layers,
        **FRONT_ENDS,
        POSITIONS: _bake_positions,
        PROJECTIONS: lambda target: _BLOCKS.merge_projections(target, BEATsAttention),
        NORMS: _fold_norms,
        POOLING: _pool,
    },
    network=_PATCHES,
    blocks=_BLOCKS.path,
)
