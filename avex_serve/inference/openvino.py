"""OpenVINO on the CPU, in float32."""

from pathlib import Path
from queue import SimpleQueue

import numpy as np
import openvino

from avex_serve.errors import BundleError


class OpenvinoBackend:
    """A compiled graph, called from up to one thread for each stream; a stream uses one core.

    The graph is compiled for one row: that is faster than rows left open, and OpenVINO has returned outputs that it
    had not filled where their number changed. Larger batches are run row by row.
    """

    device = "cpu"
    format = "openvino"
    max_batch = 1

    def __init__(self, path: Path, input_names: list[str], output_names: list[str], threads: int) -> None:
        """Compile the graph; BundleError if OpenVINO can't, or if it is not the manifest's."""
        options = {
            # By default it computes in bfloat16 on processors that have it.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,
        }
        core = openvino.Core()
        try:
            model = core.read_model(path)
            given = [each.any_name for each in model.inputs]
            answered = {each.any_name for each in model.outputs}
            if given != input_names or not answered.issuperset(output_names):
                raise BundleError(
                    f"{path} takes {given} and answers {sorted(answered)}; "
                    f"its manifest says {input_names} and {sorted(output_names)}"
                )
            model.reshape({each.any_name: [1, *list(each.partial_shape)[1:]] for each in model.inputs})
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO can't load {path}: {error}") from error
        self._inputs = input_names
        self._outputs = {name: compiled.output(name) for name in output_names}
        # A request has buffers of its own, which only one thread may use at a time.
        self._requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())

    def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See `Backend.run`."""
        rows = []
        request = self._requests.get()
        try:
            for row in range(len(inputs[0])):
                request.infer({name: each[row : row + 1] for name, each in zip(self._inputs, inputs, strict=True)})
                # Copied: the next call writes into the same memory.
                rows.append([request.get_tensor(port).data.copy() for port in self._outputs.values()])
        finally:
            self._requests.put(request)
        columns = zip(*rows, strict=True)
        return {name: np.concatenate(column) for name, column in zip(self._outputs, columns, strict=True)}
