"""Trimming: leaving out what the tapped layers don't need."""

from collections.abc import Iterable, Sequence

from torch import nn

from avex_export.passes.target import Target
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.efficientnet import Bottleneck, ConvNorm, EfficientNetModel
from avex_serve.models.layers import BACKBONE


def drop_dead_layers(target: Target) -> bool:
    """Drop, in place, classifiers and what comes after the deepest tapped layer."""
    model, layers = target.model, target.layers
    if isinstance(model, BEATsModel):
        _drop_from_beats(model, layers)
    elif isinstance(model, EATModel):
        _drop_from_eat(model, layers)
    elif isinstance(model, EfficientNetModel):
        model.model.classifier = None
        if not {"model.avgpool", BACKBONE} & set(layers):  # else the last feature map is needed
            _cut(model.model.features, "model.features", layers)
    else:
        return False
    return True


def blocks_needed(blocks: Sequence[str], layers: Iterable[str], outputs: Iterable[str]) -> int:
    """How many of the blocks, which run one after another, the layers need: up to the last one tapped.

    Args:
        blocks: names of the blocks in order.
        layers: names of the layers that are tapped.
        outputs: those names that mean what comes after all blocks.
    """
    layers = set(layers)
    if layers & set(outputs):
        return len(blocks)
    tapped = [i for i, block in enumerate(blocks) if any(f"{name}.".startswith(f"{block}.") for name in layers)]
    return max(tapped, default=-1) + 1


def _drop_from_beats(model: BEATsModel, layers: Sequence[str]) -> None:
    model.classifier = model.backbone.predictor = None
    encoder = model.backbone.encoder
    outputs = {BACKBONE, "backbone.encoder"}
    if encoder.cfg.layer_norm_first:
        outputs.add("backbone.encoder.layer_norm")
    names = [f"backbone.encoder.layers.{i}" for i in range(len(encoder.layers))]
    encoder.layers = encoder.layers[: blocks_needed(names, layers, outputs)]


def _drop_from_eat(model: EATModel, layers: Sequence[str]) -> None:
    model.classifier = None
    network = model.backbone.model
    table = network.fixed_positional_encoder
    table.positions = nn.Parameter(table(network.patches).detach().clone(), requires_grad=False)
    names = [f"backbone.model.blocks.{i}" for i in range(len(network.blocks))]
    outputs = {BACKBONE, "backbone.model"}
    network.blocks = network.blocks[: blocks_needed(names, layers, outputs)]
    if not network.blocks or outputs & set(layers):
        return
    last = network.blocks[-1]
    name = names[len(network.blocks) - 1]
    tapped = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
    if all(layer.startswith(f"{name}.attn") for layer in tapped):
        # The pass ends with the attention.
        for part in ("norm1", "mlp", "norm2"):
            setattr(last, part, nn.Identity())


def _cut(chain: nn.ModuleList, name: str, layers: Iterable[str]) -> None:
    """Drop what comes after the deepest of the layers, in place."""
    inside = [layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")]
    if name in layers or not inside:
        return
    deepest = max(int(layer.partition(".")[0]) for layer in inside)
    if isinstance(chain, ConvNorm) and deepest > 0:  # norm and activation go together
        return
    del chain[deepest + 1 :]
    part, part_name = chain[deepest], f"{name}.{deepest}"
    if isinstance(part, Bottleneck):
        if {part_name, f"{part_name}.stochastic_depth"}.isdisjoint(layers):
            _cut(part.block, f"{part_name}.block", layers)
    elif isinstance(part, nn.ModuleList):
        _cut(part, part_name, layers)
