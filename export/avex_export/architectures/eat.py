"""The passes of EAT."""

from torch import Tensor, nn

from avex_export.architectures.base import DEAD_LAYERS, NORMS, POOLING, PROJECTIONS, Architecture, Target
from avex_export.architectures.spectra import FRONT_ENDS
from avex_export.architectures.transformers import Blocks, MergedAttention, Pool, Then, rows_of
from avex_serve.models.eat_hf import EATModel, SelfAttention
from avex_serve.models.layers import BACKBONE, Taps

_NETWORK = "backbone.model"
_BLOCKS = Blocks(
    path=f"{_NETWORK}.blocks",
    attention="attn",
    projections=("attn.qkv",),
    attended="attn.proj",
    widening="mlp.fc1",
    fed="mlp.fc2",
    norms=("norm1", "norm2"),
)
_OUTPUTS = {BACKBONE, _NETWORK}
_PATCHES = {f"{_NETWORK}.local_encoder", f"{_NETWORK}.local_encoder.proj"}


def _drop_dead_layers(target: Target) -> bool:
    model = target.model_as(EATModel)
    model.classifier = None
    network = model.backbone.model
    table = network.fixed_positional_encoder
    table.positions = nn.Parameter(table(network.patches).detach().clone(), requires_grad=False)
    _BLOCKS.trim(target, _OUTPUTS)
    tapped = _BLOCKS.tapped(target)
    if tapped and _OUTPUTS.isdisjoint(target.layers):
        last = max(tapped)
        if all(part.startswith("attn") for part in tapped[last]):  # nothing follows the attention
            for name in ("mlp", *_BLOCKS.norms):
                setattr(network.blocks[last], name, nn.Identity())
    return True


class EATAttention(MergedAttention):
    """EAT's attention. It already has one product; its queries are scaled beforehand."""

    def __init__(self, attention: SelfAttention) -> None:
        weight, bias = rows_of(attention.qkv)
        width = attention.qkv.in_features
        factor = (width // attention.heads) ** -0.5
        query, others = (weight[:width] * factor, bias[:width] * factor), (weight[width:], bias[width:])
        super().__init__([query, others], attention.proj, attention.heads)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """As `avex_serve.models.eat_hf.SelfAttention.forward`."""
        query, key, value, _ = self.project(x)
        output = self.out(self.attend(query, key, value, None))
        taps(f"{name}.proj", output)
        taps(name, output)
        return output


def _fold_norms(target: Target) -> bool:
    """See `Blocks.fold_norms`."""
    return _BLOCKS.fold_norms(target, target.model_as(EATModel).backbone.model.pre_norm, _OUTPUTS | _PATCHES)


def _pool(target: Target) -> bool:
    """See `Blocks.pool`: before ``attn.proj``."""

    def insert(block: nn.Module, pool: Pool) -> None:
        _, output = _BLOCKS.linears(block)
        block.set_submodule(output, Then(pool, block.get_submodule(output)))

    tokens = target.model_as(EATModel).cfg.patches + 1
    return _BLOCKS.pool(target, tokens, _BLOCKS.attended, _OUTPUTS, _PATCHES, insert)


EAT = Architecture(
    name="EAT",
    backbone=EATModel,
    passes={
        DEAD_LAYERS: _drop_dead_layers,
        **FRONT_ENDS,
        PROJECTIONS: lambda target: _BLOCKS.merge_projections(target, EATAttention),
        NORMS: _fold_norms,
        POOLING: _pool,
    },
    network=f"{_NETWORK}.local_encoder.proj",
    blocks=_BLOCKS.path,
)
