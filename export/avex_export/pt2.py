"""PT2: the graph as torch.export writes it, to be compiled ahead of time (AOTInductor) or loaded by torch."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avex_export.graph import Graph
from avex_export.tracing import dynamic_axes, quiet_tracing

# What torch notes with each node of where in which file it comes from.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def write_pt2(graph: Graph, example: Tensor, path: Path) -> None:
    """Export the graph on an example batch (B, …) and write it.

    The batch stays dynamic; the time of embeddings does where torch.export sees no reason to fix it.
    """
    axes = dynamic_axes(graph, example)
    if 1 in axes:
        axes[1] = torch.export.Dim.AUTO
    with quiet_tracing():
        program = torch.export.export(graph, (example,), dynamic_shapes=(axes,), strict=False)
        for node in program.graph.nodes:
            for key in _PROVENANCE:
                node.meta.pop(key, None)
        archive = io.BytesIO()
        torch.export.save(program, archive)
    path.write_bytes(archive.getvalue())


class Pt2Backend:
    """Runs an exported program as it was written, to be verified; see `avex_serve.runtime.backend.Backend`."""

    device = "cpu"
    format = "pt2"
    max_batch = 1

    def __init__(self, path: Path, output_names: list[str]) -> None:
        """Load the program."""
        with quiet_tracing():
            self._module = torch.export.load(path).module()
        self._output_names = output_names

    @torch.inference_mode()
    def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name for one input batch (B, …) float32."""
        outputs = self._module(torch.from_numpy(batch))
        return {name: tensor.numpy() for name, tensor in zip(self._output_names, outputs, strict=True)}
