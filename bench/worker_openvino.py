"""Answers with OpenVINO and numpy alone; run by a Python that has OpenVINO. See `worker.serve`.

python worker_openvino.py GRAPH PRECISION
"""

import sys
from functools import cache

import numpy as np
import openvino
from worker import serve

SETTINGS = {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False, "PERFORMANCE_HINT": "LATENCY"}


def main(graph: str, precision: str) -> None:
    """Load, and answer."""
    core = openvino.Core()

    @cache
    def request(count: int) -> openvino.InferRequest:
        # A graph for each size of batch: answers of a graph of any size are not always filled in.
        model = core.read_model(graph)
        (samples,) = model.input("waveform").partial_shape[1:]
        model.reshape({"waveform": [count, samples.get_length()]})
        return core.compile_model(
            model, "CPU", SETTINGS | {"INFERENCE_PRECISION_HINT": precision}
        ).create_infer_request()

    def answer(batch: np.ndarray) -> np.ndarray:
        return request(len(batch)).infer({"waveform": batch})["logits"]

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
