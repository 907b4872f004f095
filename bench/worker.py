"""What a worker speaks: it reads numbers of clips, answers that many, and tells how long that took.

A line in is ``COUNT`` or ``COUNT FILE`` (to save the answer there); a line out is the seconds it took. The first
line out comes by itself when the first clip has been answered.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def peak_memory() -> float:
    """MB that this process took at most; the usual counter begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def serve(answer: Callable[[np.ndarray], np.ndarray]) -> None:
    """Answer clips (CLIPS.npy, the last argument's folder is the caller's) until standard input ends."""
    clips = np.load(sys.stdin.readline().strip())
    answer(clips[:1])
    print("ready", peak_memory(), flush=True)
    for line in sys.stdin:
        count, _, path = line.strip().partition(" ")
        started = time.perf_counter()
        found = answer(clips[: int(count)])
        seconds = time.perf_counter() - started
        if path:
            np.save(path, found)
        print(seconds, flush=True)
