"""The passes of BEATs."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from avex_export.architectures.base import DEAD_LAYERS, NORMS, POOLING, PROJECTIONS, Architecture, Pass, Target
from avex_export.architectures.spectra import FRONT_ENDS
from avex_export.architectures.transformers import Blocks, MergedAttention, Pool, Then, rows_of
from avex_serve.models.beats_model import BEATsModel, Encoder, SelfAttention, relative_distances
from avex_serve.models.layers import BACKBONE, Taps

POSITIONS = Pass("position-bias", "bake the relative position bias and the positional convolution's norm")
CONVOLUTION = Pass("position-conv", "compute the positional convolution with half of the products")

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


def _halve_products(target: Target) -> bool:
    """Replace the positional convolution, if its lengths are multiples of what `FastConvolution` needs."""
    backbone = target.model_as(BEATsModel).backbone
    encoder, cfg = backbone.encoder, backbone.cfg
    bands = cfg.num_mel_bins // cfg.input_patch_size  # tokens of a time step
    if bands % FastConvolution.WAYS or cfg.conv_pos % (2 * FastConvolution.WAYS):
        return False
    convolution, _, activation = encoder.pos_conv
    if type(convolution) is not nn.Conv1d:  # its norm was not baked
        convolution = _plain_convolution(convolution)
    encoder.pos_conv = nn.Sequential(FastConvolution(convolution), activation)
    return True


class FastConvolution(nn.Module):
    """A convolution that keeps the length, with 9 products of a quarter of its size each instead of 16.

    Two neighbouring steps of a convolution by a kernel of two parts, y0 = w0 x0 + w1 x1 and y1 = w0 x1 + w1 x2, need
    three products instead of four: m = (w0 + w1) x1, y0 = w0 (x0 - x1) + m and y1 = w1 (x2 - x1) + m. Here parts are
    every other step of kernel and input, twice. Source: Winograd, "Arithmetic Complexity of Computations" (1980).
    """

    WAYS: ClassVar = 4  # steps that are computed together; the input's length and half the kernel's are multiples
    weight: Tensor  # (9 * D, D / groups, kernel / 4)
    bias: Tensor  # (4 * D,)

    def __init__(self, convolution: nn.Conv1d) -> None:
        super().__init__()
        (kernel,) = convolution.kernel_size
        assert convolution.bias is not None
        self.padding = kernel // 2
        weight = convolution.weight.detach().double()
        sums = _sums([weight[..., i :: self.WAYS] for i in range(self.WAYS)])
        self.groups = len(sums) * convolution.groups
        self.register_buffer("weight", torch.cat(sums).float())
        self.register_buffer("bias", convolution.bias.detach().repeat(self.WAYS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T) → (B, D, T)."""
        width, ways = x.shape[1], self.WAYS
        padded = nn.functional.pad(x.transpose(1, 2), (0, 0, self.padding, self.padding))
        steps = padded.reshape(x.shape[0], -1, ways * width)
        # The input from 7 successive steps on, side by side.
        steps = torch.cat([steps[:, :-1], steps[:, 1:, : (ways - 1) * width]], dim=-1)
        inputs = torch.cat(_differences(steps, ways), dim=-1).transpose(1, 2)
        products = nn.functional.conv1d(inputs, self.weight, groups=self.groups).transpose(1, 2)
        outputs = _merged(products, ways) + self.bias  # (B, T / 4, 4 * D)
        return outputs.reshape(x.shape[0], -1, width).transpose(1, 2)


def _sums(parts: list[Tensor]) -> list[Tensor]:
    """The kernels of the products, see `FastConvolution`, from the parts of the kernel."""
    if len(parts) == 1:
        return parts
    first, last = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    return [*_sums(first), *_sums(last), *_sums([a + b for a, b in zip(first, last, strict=True)])]


def _differences(steps: Tensor, ways: int) -> list[Tensor]:
    """The inputs of the products, see `FastConvolution`, from 2 * ways - 1 steps (…, (2 * ways - 1) * D)."""
    if ways == 1:
        return [steps]
    width = steps.shape[-1] // (2 * ways - 1)
    first, middle, last = (steps[..., i * width : (i + ways - 1) * width] for i in (0, ways // 2, ways))
    return [part for each in (first - middle, last - middle, middle) for part in _differences(each, ways // 2)]


def _merged(products: Tensor, ways: int) -> Tensor:
    """The outputs of so many steps, see `FastConvolution`, from the products."""
    if ways == 1:
        return products
    first, last, both = (_merged(part, ways // 2) for part in products.chunk(3, dim=-1))
    return torch.cat([first + both, last + both], dim=-1)


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

    gate: Tensor | None  # (heads,)

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
        self.register_buffer("gate", attention.grep_a.detach().flatten() if attention.gated else None)

    def forward(
        self, x: Tensor, position_bias: Tensor | None, padding: Tensor | None, taps: Taps, name: str
    ) -> Tensor:
        """As `avex_serve.models.beats_model.SelfAttention.forward`."""
        projected, gate = self.projection(x), None
        if self.gate is not None:
            update, reset = projected[..., -2 * self.heads :].sigmoid().chunk(2, dim=-1)  # (B, T, heads)
            gate = update * (reset * self.gate - 1.0) + 2.0
        output = self.out(self.attend(projected, position_bias, gate, padding))
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
        CONVOLUTION: _halve_products,
        PROJECTIONS: lambda target: _BLOCKS.merge_projections(target, BEATsAttention),
        NORMS: _fold_norms,
        POOLING: _pool,
    },
    network=_PATCHES,
    blocks=_BLOCKS.path,
)
