"""Answers with onnxruntime and numpy alone: the least that a Python process with this graph takes to start.

python worker_onnxruntime.py BUNDLE
"""

import sys
from pathlib import Path

import onnxruntime
from worker import serve


def main(bundle: Path) -> None:
    """Load, and answer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    serve(lambda batch: session.run(["logits"], {"waveform": batch})[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
