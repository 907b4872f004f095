"""TorchScript: a traced module, free of devices, so that one file runs on CPU and CUDA."""

from pathlib import Path

import torch
from torch import Tensor

from avex_export.assemble import Graph
from avex_export.tracing import quiet_tracing


def write_torchscript(graph: Graph, example: Tensor, path: Path) -> None:
    """Trace the graph on an example batch (B, …) and write it; the batch stays dynamic."""
    with quiet_tracing():
        # The trace is not checked here: verification compares it on more inputs than the example.
        traced = torch.jit.trace(graph, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path))


def meta_shapes(path: Path, example: Tensor) -> list[tuple[int, ...]]:
    """Output shapes of the traced module when it runs on the meta device.

    Raises:
        RuntimeError: it doesn't run there, so a device is baked in.
    """
    with quiet_tracing():
        module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        # Loading onto meta at once fails in torch itself, which compares constants by value.
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                setattr(part, name, tensor.to("meta"))
        return [tuple(output.shape) for output in module(example.to("meta"))]
