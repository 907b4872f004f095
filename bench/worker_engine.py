"""Answers recordings with an engine in this process, as a program without a server would. See `worker.serve`.

python worker_engine.py BUNDLE PRECISION CALLERS
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from worker import serve

from avex_serve import open_bundle
from avex_serve.audio.reader import decode


def main(bundle: str, precision: str, callers: int) -> None:
    """Load, and answer."""
    engine = open_bundle(bundle, "cpu", precision=precision)
    pool = ThreadPoolExecutor(callers)

    def predict(recording: np.ndarray) -> int:
        return len(engine.predict(*decode(recording.tobytes())).detections)

    def answer(batch: np.ndarray) -> np.ndarray:
        return np.array(list(pool.map(predict, batch)))

    serve(answer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
