"""Batches across requests, where the device takes them best: on CUDA.

The first caller of a shape opens a batch, waits a few milliseconds for others to join, and for as long as the device
is busy, and runs it for all. A CPU gains nothing from batches, and is left alone.
"""

import threading
from typing import Final

import numpy as np

from avex_serve.inference.backend import Backend

WAIT_SECONDS: Final = 0.003  # small beside the tens of milliseconds that a batch takes

Inputs = tuple[np.ndarray, ...]
Outputs = dict[str, np.ndarray]
Shapes = tuple[tuple[int, ...], ...]  # of a row of each input


def batched(backend: Backend) -> Backend:
    """The backend, behind a batcher if it runs on CUDA."""
    return Batcher(backend) if backend.device == "cuda" else backend


class Batcher:
    """A backend that joins the batches of callers in several threads, up to `max_batch` rows of equal shape."""

    def __init__(self, backend: Backend, wait_seconds: float = WAIT_SECONDS) -> None:
        self.device = backend.device
        self.format = backend.format
        self.max_batch = backend.max_batch
        self._backend = backend
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._on_device = threading.Lock()
        self._open: dict[Shapes, _Joint] = {}

    def run(self, *inputs: np.ndarray) -> Outputs:
        """See `Backend.run`; an error concerns the batch that caused it alone."""
        shapes = tuple(batch.shape[1:] for batch in inputs)
        with self._lock:
            joint = self._open.get(shapes)
            if joint is not None and joint.rows + len(inputs[0]) > self.max_batch:
                self._close(shapes, joint)
                joint = None
            leads = joint is None
            if joint is None:
                joint = self._open[shapes] = _Joint()
            index = joint.add(inputs)
            if joint.rows >= self.max_batch:
                self._close(shapes, joint)
        if leads:
            joint.full.wait(self._wait_seconds)
            with self._on_device:
                with self._lock:
                    self._close(shapes, joint)
                joint.run(self._backend)
        return joint.result(index)

    def _close(self, shapes: Shapes, joint: "_Joint") -> None:
        joint.full.set()
        if self._open.get(shapes) is joint:
            del self._open[shapes]


class _Joint:
    """Batches that run as one."""

    def __init__(self) -> None:
        self.rows = 0
        self.full = threading.Event()  # nobody joins any more
        self._done = threading.Event()
        self._batches: list[Inputs] = []
        self._results: list[Outputs | BaseException] = []

    def add(self, inputs: Inputs) -> int:
        self._batches.append(inputs)
        self.rows += len(inputs[0])
        return len(self._batches) - 1

    def run(self, backend: Backend) -> None:
        try:
            self._results = _joined(backend, self._batches)
        except BaseException as error:
            self._results = [error] * len(self._batches)
            raise
        finally:
            self._done.set()

    def result(self, index: int) -> Outputs:
        self._done.wait()
        result = self._results[index]
        if isinstance(result, BaseException):
            raise result
        return result


def _joined(backend: Backend, batches: list[Inputs]) -> list[Outputs | BaseException]:
    if len(batches) > 1:
        try:
            outputs = backend.run(*(np.concatenate(each) for each in zip(*batches, strict=True)))
        except Exception:  # noqa: BLE001 - whose fault it is shows when each runs alone
            pass
        else:
            ends = np.cumsum([len(inputs[0]) for inputs in batches])[:-1]
            parts = {name: np.split(output, ends) for name, output in outputs.items()}
            return [{name: part[index] for name, part in parts.items()} for index in range(len(batches))]
    return [_alone(backend, inputs) for inputs in batches]


def _alone(backend: Backend, inputs: Inputs) -> Outputs | BaseException:
    try:
        return backend.run(*inputs)
    except Exception as error:  # noqa: BLE001 - it is raised where its batch came from
        return error
