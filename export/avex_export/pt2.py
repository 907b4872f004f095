"""PT2: the graph as torch.export writes it, to be compiled ahead of time (AOTInductor) or loaded by torch."""

import io
from pathlib import Path

import torch
from torch import Tensor

from avex_export.assemble import Graph
from avex_export.tracing import dynamic_axes, quiet_tracing

# What torch notes with each node of where in which file it comes from.
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def write_pt2(graph: Graph, example: Tensor, path: Path) -> None:
    """Export the graph on an example batch (B, …) and write it; the batch stays dynamic, as in ONNX."""
    with quiet_tracing():
        program = torch.export.export(
            graph, (example,), dynamic_shapes=(dynamic_axes(graph, example),), strict=False
        )
        for node in program.graph.nodes:
            for key in _PROVENANCE:
                node.meta.pop(key, None)
        archive = io.BytesIO()
        torch.export.save(program, archive)
    path.write_bytes(archive.getvalue())
