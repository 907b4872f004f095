"""PT2: the graph as torch.export writes it, to be compiled ahead of time (AOTInductor) or loaded by torch."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avex_export.graph import EmbeddingGraph, Graph
from avex_export.tracing import dynamic_axes, quiet_tracing

# What torch notes with each node of where in which file it comes from.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def write_pt2(graph: Graph, example: Sequence[Tensor], path: Path) -> None:
    """Export the graph on example inputs, (B, …) each, and write it.

    The batch stays dynamic; the time of embeddings does where torch.export sees no reason to fix it.
    """
    axes = dynamic_axes(graph, example)
    if isinstance(graph, EmbeddingGraph):
        axes = tuple(
            {axis: torch.export.Dim.AUTO if axis == 1 else how for axis, how in each.items()} for each in axes
        )
    with quiet_tracing():
        program = torch.export.export(graph, tuple(example), dynamic_shapes=axes, strict=False)
        for node in program.graph.nodes:
            for key in _PROVENANCE:
                node.meta.pop(key, None)
        archive = io.BytesIO()
        torch.export.save(program, archive)
    path.write_bytes(archive.getvalue())


class Pt2Backend:
    """Runs an exported program as it was written, to be verified; see `avex_serve.inference.backend.Backend`."""

    device = "cpu"
    format = "pt2"
    max_batch = 1

    def __init__(self, path: Path, output_names: list[str]) -> None:
        """Load the program."""
        with quiet_tracing():
            self._module = torch.export.load(path).module()
        self._output_names = output_names

    @torch.inference_mode()
    def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for the inputs, (B, …) each."""
        outputs = self._module(*map(torch.from_numpy, inputs))
        return {name: tensor.numpy() for name, tensor in zip(self._output_names, outputs, strict=True)}
