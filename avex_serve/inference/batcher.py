"""Joins batches of several requests on CUDA, where larger batches are faster. On a CPU they are not.

The first caller of a shape opens a batch and waits for others to join: a few milliseconds, and as long as the device
is busy. Then it runs the batch for all of them.
"""

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from avex_serve.inference.backend import Backend

WAIT_SECONDS: Final = 0.003  # little next to the tens of milliseconds that a batch takes

Inputs = tuple[np.ndarray, ...]
Outputs = dict[str, np.ndarray]
Shapes = tuple[tuple[int, ...], ...]  # of a row of each input
Batch = tuple[Inputs, "Future[Outputs]"]


class Batcher:
    """A backend that joins the batches of callers in several threads, up to `max_batch` rows of equal shape."""

    def __init__(self, backend: "Backend", wait_seconds: float = WAIT_SECONDS) -> None:
        self.device = backend.device
        self.format = backend.format
        self.max_batch = backend.max_batch
        self._backend = backend
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._on_device = threading.Lock()
        self._open: dict[Shapes, _Joint] = {}

    def run(self, *inputs: np.ndarray) -> Outputs:
        """See `Backend.run`; an error reaches only the caller whose batch caused it."""
        shapes = tuple(batch.shape[1:] for batch in inputs)
        with self._lock:
            joint = self._open.get(shapes)
            if joint is not None and joint.rows + len(inputs[0]) > self.max_batch:
                self._close(shapes, joint)
                joint = None
            leads = joint is None
            if joint is None:
                joint = self._open[shapes] = _Joint()
            outputs: Future[Outputs] = Future()
            joint.batches.append((inputs, outputs))
            if joint.rows >= self.max_batch:
                self._close(shapes, joint)
        if leads:
            joint.full.wait(self._wait_seconds)
            with self._on_device:
                with self._lock:
                    self._close(shapes, joint)
                _run(self._backend, joint.batches)
        return outputs.result()

    def _close(self, shapes: Shapes, joint: "_Joint") -> None:
        joint.full.set()
        if self._open.get(shapes) is joint:
            del self._open[shapes]


class _Joint:
    """Batches that run as one."""

    def __init__(self) -> None:
        self.full = threading.Event()  # no further batch may join
        self.batches: list[Batch] = []

    @property
    def rows(self) -> int:
        return sum(len(inputs[0]) for inputs, _ in self.batches)


def _run(backend: "Backend", batches: list[Batch]) -> None:
    """Run the batches as one; if that fails, run each alone, so that an error reaches only its cause."""
    try:
        joined = [
            np.concatenate(each) if len(each) > 1 else each[0]
            for each in zip(*(inputs for inputs, _ in batches), strict=True)
        ]
        ends = np.cumsum([len(inputs[0]) for inputs, _ in batches])[:-1]
        parts = {name: np.split(output, ends) for name, output in backend.run(*joined).items()}
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        if len(batches) > 1 and isinstance(error, Exception):
            for batch in batches:
                _run(backend, [batch])
        else:
            for _, outputs in batches:
                outputs.set_exception(error)
    else:
        for index, (_, outputs) in enumerate(batches):
            outputs.set_result({name: part[index] for name, part in parts.items()})
