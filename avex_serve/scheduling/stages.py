"""How long the steps of an answer take, written down for whoever asks: the service, for its metrics and its log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

import numpy as np

DECODE: Final = "decode"
RESAMPLE: Final = "resample"
QUEUE: Final = "queue"  # a request waits for a slot or its next turn, or a batch of it for a thread
INFER: Final = "infer"
STAGES: Final = (DECODE, RESAMPLE, QUEUE, INFER)


@dataclass(frozen=True)
class Work:
    """What was done for one request. Threads add to it side by side: appending to a list is atomic."""

    seconds: list[tuple[str, float]] = field(default_factory=list)  # (stage, seconds), one entry a measurement
    batches: list[int] = field(default_factory=list)  # rows of each batch that was inferred
    models: list[str] = field(default_factory=list)  # names of those that inferred, one entry a batch

    def totals(self) -> dict[str, float]:
        """Seconds by stage; those of threads that ran side by side are added up."""
        totals: dict[str, float] = {}
        for stage, seconds in self.seconds:
            totals[stage] = totals.get(stage, 0.0) + seconds
        return totals


_current: ContextVar[Work | None] = ContextVar("avex_serve_work", default=None)


@contextmanager
def recorded() -> Iterator[Work]:
    """Write down the work of the block, and of the threads that take over its context."""
    work = Work()
    token = _current.set(work)
    try:
        yield work
    finally:
        _current.reset(token)


def begin(name: str) -> Callable[[], None]:
    """Write down how long it takes until the function that is returned is called, in whatever thread.

    Does nothing outside of `recorded`.
    """
    if (work := _current.get()) is None:
        return lambda: None
    start = perf_counter()
    return lambda: work.seconds.append((name, perf_counter() - start))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Write down how long the block takes. Does nothing outside of `recorded`."""
    end = begin(name)
    try:
        yield
    finally:
        end()


Run = Callable[..., dict[str, np.ndarray]]  # see `Backend.run`


def in_pool(run: Run, model: str) -> Run:
    """`run` for a thread of a pool, which has no context: how long each batch waited and ran, and its rows."""
    if (work := _current.get()) is None:
        return run
    end_wait = begin(QUEUE)

    def call(*inputs: np.ndarray) -> dict[str, np.ndarray]:
        end_wait()
        start = perf_counter()
        try:
            return run(*inputs)
        finally:
            work.seconds.append((INFER, perf_counter() - start))
            work.batches.append(len(inputs[0]))
            work.models.append(model)

    return call
