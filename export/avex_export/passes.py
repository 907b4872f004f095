"""Rewrites copies of probes before the export: what every graph needs, the passes, and half precision.

A pass makes the graph faster, changes the numbers by rounding only, and can be left out. The architecture of the
backbone has its passes in the order in which they are applied: later ones build on the results of earlier ones.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from avex_export.architectures import ARCHITECTURES, architecture_of, names
from avex_export.architectures.base import Architecture, Pass, Target
from avex_export.architectures.spectra import front_ends, use_products
from avex_serve.errors import ExportError
from avex_serve.models.layers import input_lengths


def in_order(architectures: Iterable[Architecture]) -> tuple[Pass, ...]:
    """The passes of all architectures, each once, in an order that agrees with the order of each architecture."""
    found: list[Pass] = []
    for architecture in architectures:
        place = 0
        for each in architecture.passes:
            if each not in found:
                found.insert(place, each)
            place = found.index(each) + 1
    return tuple(found)


PASSES = in_order(ARCHITECTURES)

# These passes don't rewrite modules, but the ONNX graph that is made from them.
CONSTANTS = "constants"
EXTERNAL_DATA = "external-data"
SUMMARIES = {each.name: each.summary for each in PASSES} | {
    CONSTANTS: "compute all values that depend on no input, such as transposed weights, before the graph is written",
    EXTERNAL_DATA: "write large weights of the ONNX graph to a separate file, which is mapped instead of read",
}


def rewrite(target: Target, without: Collection[str] = ()) -> list[str]:
    """Prepare copies of probes in eval mode for the export, in place; they can't be trained or saved afterwards.

    This fixes the sizes that a traced graph can't measure, except those that depend on the length of clips of any
    length. It computes spectra as products. Then it applies the passes, except `without`, and returns the names of
    those that changed anything.
    """
    target.model.fix_batch_axes(target.samples, target.layers)
    parts = front_ends(target.model)
    # All probes share the front end, so the first one shows the lengths for all.
    lengths = input_lengths(target.probes[0], torch.zeros(1, target.samples), parts)
    for part, length in zip(parts, lengths, strict=True):
        part.fixed_samples = None if target.any_length else length
        use_products(part)
    passes = architecture_of(target.model).passes
    return [each.name for each, apply in passes.items() if each.name not in without and apply(target)]


class _Half(nn.Module):
    """A module in float16 for inputs in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        """The module's output for the cast input."""
        return self.module(x.half(), *others)


def halve(target: Target) -> None:
    """Convert rewritten copies of probes to float16, in place, for TorchScript on CUDA.

    Front ends stay in float32: their features have the range of 16-bit integers squared.

    Raises:
        ExportError: a backbone whose front end is not known.
    """
    model, network = target.model, architecture_of(target.model).network
    if network is None:
        raise ExportError(
            f"--half: half precision is for {names(lambda each: each.network)}, whose front ends are known to need "
            "float32; export this model without --half"
        )
    kept = [(part, {name: tensor.clone() for name, tensor in part.named_buffers()}) for part in front_ends(model)]
    for probe in target.probes:
        probe.half()
    for part, tensors in kept:
        part.float()
        for name, tensor in part.named_buffers():
            tensor.copy_(tensors[name])
    model.set_submodule(network, _Half(model.get_submodule(network)))
