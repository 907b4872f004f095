"""onnxruntime on the CPU."""

import contextlib
import ctypes
import os
from pathlib import Path

import numpy as np

# onnxruntime's wheels report their use to Microsoft, and write an id of the machine below HOME, unless this is set
# before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

from avex_serve.errors import BundleError


class OnnxBackend:
    """An onnxruntime session, called from up to one thread for each core.

    A call uses one thread and one row: two such calls at the same time beat one call on two threads, and larger
    batches are no faster on a CPU. Spinning threads would take time from other calls.
    """

    device = "cpu"
    max_batch = 1
    optimisation = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL

    def __init__(self, path: Path, input_names: list[str], output_names: list[str], *, int8: bool = False) -> None:
        """Load the graph; BundleError if onnxruntime can't, or if it is not the manifest's."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = self.optimisation
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The fused kernel is slower on a CPU than an addition and a layer norm.
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
        # A pattern is one block for all buffers, planned after the first call for each input shape. It takes memory
        # in addition to that of the call, and is hardly faster.
        options.enable_mem_pattern = False
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own error classes derive directly from Exception
            raise BundleError(f"onnxruntime can't load {path}: {error}") from error
        _return_memory()
        given = [node.name for node in self._session.get_inputs()]
        answered = {node.name for node in self._session.get_outputs()}
        if given != input_names or not answered.issuperset(output_names):
            raise BundleError(
                f"{path} takes {given} and answers {sorted(answered)}; "
                f"its manifest says {input_names} and {sorted(output_names)}"
            )
        self.format = "onnx-int8" if int8 else "onnx"
        self._input_names = input_names
        self._output_names = output_names

    def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See `Backend.run`."""
        outputs = self._session.run(self._output_names, dict(zip(self._input_names, inputs, strict=True)))
        return dict(zip(self._output_names, outputs, strict=True))


def _return_memory() -> None:
    """Return the memory that loading has freed; glibc would keep it in addition to the buffers of answers."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
