"""TorchScript: a traced module, free of devices, so that one file runs on CPU and CUDA."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from avex_export.graph import Graph
from avex_export.tracing import quiet_tracing


def write_torchscript(graph: Graph, example: Sequence[Tensor], path: Path) -> None:
    """Trace the graph on example inputs, (B, …) each, and write it; the batch stays dynamic."""
    with quiet_tracing():
        # The trace is not checked here: verification compares it on more inputs than the example.
        traced = torch.jit.trace(graph, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
        archive = io.BytesIO()
        torch.jit.save(traced, archive)
    _copy_without_sources(archive, path)


def meta_shapes(path: Path, example: Sequence[Tensor]) -> list[tuple[int, ...]]:
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
        return [tuple(output.shape) for output in module(*(each.to("meta") for each in example))]


def _copy_without_sources(archive: io.BytesIO, path: Path) -> None:
    # The archive is a zip that says for each operation in which file of the exporting machine it stands: nobody
    # else's business, and not needed to run it.
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            if not record.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(record.filename), source.read(record))
