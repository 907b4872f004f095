"""What the exporters need of torch while they look at a graph."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from avex_export.graph import EmbeddingGraph, Graph


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Without gradients, without torch's transformer fast path, and without the noise of its exporters.

    The fast path is one opaque operator that neither ONNX nor the meta device knows.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), torch.no_grad():
        # TorchScript is deprecated upstream; it is what loads on CUDA without compiling.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        # torch's own layers check sizes, which hold for every input of the shape that is traced.
        warnings.filterwarnings("ignore", category=TracerWarning, module=r"torch\.nn\.")
        # An LSTM keeps its weights in a list that torch.export notices; torch's own modules do so.
        warnings.filterwarnings("ignore", r"The tensor attributes .*_flat_weights", UserWarning)
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        # Raised inside torch.export by its own code.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            logger.setLevel(logging.ERROR)  # it reports every optional package that is not installed
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            logger.setLevel(level)


def dynamic_axes(graph: Graph, example: Tensor) -> dict[int, Any]:
    """The axes of the input that are dynamic for torch.export: the batch, and time if the head reads sequences."""
    axes = {0: torch.export.Dim.DYNAMIC}
    if isinstance(graph, EmbeddingGraph) and graph.probe.takes_sequence:
        axes[1] = torch.export.Dim.DYNAMIC
    return axes
