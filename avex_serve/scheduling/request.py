"""One request, from its arrival to the end of its answer: id, deadline, limits, memory and timings.

Code finds the request that it works for by context (`current`), as asyncio finds the timeout of a task. So the
decoder, the windows and the batches can ask for it, and no function in between passes it on. Where no request is
set, as on the command line, nothing is limited.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from avex_serve.errors import ClientGoneError, DeadlineError, OverloadError, TooLargeError

GONE: Final = "the client closed the connection before its answer was ready"
LATE: Final = (
    "the answer was not ready in time; send a shorter recording, or allow more time: in the request "
    "(Request-Timeout, or a deadline over gRPC) or in the service (AVEX_TIMEOUT_SECONDS)"
)
DECODE: Final = "decode"
RESAMPLE: Final = "resample"
QUEUE: Final = "queue"  # the request waits for a slot, or one of its batches for a thread
INFER: Final = "infer"
# Where stages overlap, because threads work side by side, the time counts for the first of them here.
STAGES: Final = (INFER, DECODE, RESAMPLE, QUEUE)


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. Each check raises TooLargeError, which names the service's setting."""

    seconds: float = math.inf  # of a recording
    # Attention takes memory by the square of these two:
    clip_seconds: float = math.inf  # of a clip that goes through the graph in one piece
    steps: float = math.inf  # of a sequence of embeddings
    decoded_bytes: float = math.inf  # of a recording: float32 samples of all channels
    channels: float = math.inf
    windows: float = math.inf  # of a recording
    json_bytes: float = math.inf
    answer_bytes: float = math.inf  # of memory for making an answer

    def check_recording(self, frames: int, channels: int, sample_rate: int) -> None:
        """Check a recording of which this many frames are known."""
        if channels > self.channels:
            raise TooLargeError(
                f"the recording has {channels} channels; expected at most {self.channels} (AVEX_MAX_CHANNELS): mix "
                "it down, or send the channels one by one"
            )
        if frames > self.seconds * sample_rate:
            raise TooLargeError(
                f"the recording is longer than {self.seconds:g} s (AVEX_MAX_SECONDS); send it in pieces"
            )
        if 4 * frames * channels > self.decoded_bytes:
            raise TooLargeError(
                f"the recording has more than {self.decoded_bytes} bytes once decoded (AVEX_MAX_DECODED_BYTES); "
                "send it in pieces, or with fewer channels"
            )

    def check_clip(self, samples: int, sample_rate: int, window: int) -> None:
        """Check a clip for the graph; a window of the model, in samples, is always allowed."""
        longest = max(window / sample_rate, self.clip_seconds)
        if samples > longest * sample_rate:
            raise TooLargeError(
                f"a clip of {samples} samples is longer than {longest:g} s (AVEX_MAX_CLIP_SECONDS); send "
                "shorter clips, or the recording itself, which the service cuts into windows"
            )

    def check_steps(self, count: int) -> None:
        """Check the length of a sequence of embeddings."""
        if count > self.steps:
            raise TooLargeError(
                f"a sequence has {count} embeddings; expected at most {self.steps} (AVEX_MAX_STEPS): send those "
                "of shorter clips"
            )

    def check_windows(self, count: int) -> None:
        """Check the number of windows of a recording."""
        if count > self.windows:
            raise TooLargeError(
                f"the recording has {count} windows; expected at most {self.windows} (AVEX_MAX_WINDOWS): send it "
                "in pieces, or with less overlap"
            )

    def check_recordings(self, count: int) -> None:
        """Check the number of recordings of a request, each of which has a window at least."""
        if count > self.windows:
            raise TooLargeError(
                f"the request has {count} recordings; expected at most {self.windows} (AVEX_MAX_WINDOWS): send "
                "several requests"
            )

    def check_json(self, size: int) -> None:
        """Check the bytes of a JSON document, which takes many times as much memory once it is parsed."""
        if size > self.json_bytes:
            raise TooLargeError(
                f"the JSON has {size} bytes; expected at most {self.json_bytes} (AVEX_MAX_JSON_BYTES): send "
                "tensors in binary"
            )


class StageTime(NamedTuple):
    """A stage that was measured."""

    stage: str
    start: float  # of `time.perf_counter`, as `end`
    end: float
    cpu: float  # seconds that its thread computed


class ModelName(NamedTuple):
    """A model that worked for a request."""

    name: str
    version: str


@dataclass(frozen=True)
class Timings:
    """What was done for a request. Threads add to it side by side: appending to a list is atomic."""

    spans: list[StageTime] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)  # rows of each batch that was inferred
    models: list[ModelName] = field(default_factory=list)  # those that inferred, one entry a batch
    audio: list[tuple[ModelName, float]] = field(default_factory=list)  # seconds of audio that a model has processed

    def totals(self) -> dict[str, float]:
        """Seconds of the request in each stage. Each moment counts for one stage at most: see `STAGES`."""
        if not (spans := self.spans[:]):
            return {}
        # With numpy: a long recording has tens of thousands of spans.
        stages, starts, ends, _ = zip(*spans, strict=True)
        places = np.fromiter(map(STAGES.index, stages), np.intp, len(spans))
        times = np.array([starts, ends]).ravel()
        order = np.argsort(times)
        changes = np.zeros((times.size, len(STAGES)), np.int32)
        changes[np.arange(times.size), np.tile(places, 2)] = np.repeat((1, -1), len(spans))
        running = np.cumsum(changes[order], axis=0)[:-1] > 0  # between two times
        # What runs first there; where nothing does, all weights are zero.
        totals = np.bincount(running.argmax(axis=1), np.diff(times[order]) * running.any(axis=1), len(STAGES))
        return {stage: float(totals[place]) for place, stage in enumerate(STAGES) if place in places}

    def cpu(self) -> dict[str, float]:
        """Seconds that threads computed in each stage; those of threads side by side are added up."""
        seconds = dict.fromkeys(STAGES, 0.0)
        for span in self.spans[:]:
            seconds[span.stage] += span.cpu
        return seconds


class Memory:
    """The bytes that all requests together may hold, for their bodies or for making their answers."""

    def __init__(self, total: float = math.inf, use: str = "requests") -> None:
        self.total = total
        self._use = use
        self._held = 0
        self._lock = threading.Lock()

    def check_room(self, size: int) -> None:
        """Raise OverloadError if this many more bytes would be too many."""
        if self._held + size > self.total:
            raise OverloadError(
                f"the service is busy: other requests hold all but {self.total - self._held} of its {self.total} "
                f"bytes for {self._use}; try again later"
            )

    def reserve(self, size: int) -> None:
        """Hold this many more bytes; raises as `check_room`."""
        with self._lock:
            self.check_room(size)
            self._held += size

    def release(self, size: int) -> None:
        """Hold this many bytes less."""
        with self._lock:
            self._held -= size


class Request:
    """One request. `Admission` sets `yield_slot` and `pause` while the request has a slot."""

    def __init__(
        self,
        id: str = "",
        limits: Limits | None = None,
        seconds: float = math.inf,
        bodies: Memory | None = None,
        answers: Memory | None = None,
    ) -> None:
        """A request that arrives now.

        Args:
            id: what logs, spans and the client call it.
            limits: how much it may ask for; None: anything.
            seconds: until its answer is due.
            bodies: memory for the bodies of all requests; None: as much as it needs.
            answers: memory for the answers to all requests; None: as much as it needs.
        """
        self.id = id
        self.limits = limits or Limits()
        self.timings = Timings()
        self.key = ""  # name of the API key that the client sent
        self.yield_slot: Callable[[], None] = lambda: None
        self.pause: Callable[[threading.Event], None] | None = None  # waits without the slot
        self._due = time.monotonic() + seconds
        self._abandoned = False
        self._wake: Callable[[], object] | None = None
        self._bodies = bodies or Memory()
        self._answers = answers or Memory()
        self._body_bytes = 0
        self._answer_bytes = 0
        self._released = False
        self._lock = threading.Lock()  # of the memory: a thread may work on when the answer has been given up

    # -- until when -----------------------------------------------------------------------------------------------

    @property
    def remaining(self) -> float:
        """Seconds until the answer is due, negative once it is late."""
        return self._due - time.monotonic()

    def limit_seconds(self, seconds: float | None) -> None:
        """Expect the answer after at most this many seconds from now; None: the client sets no limit."""
        if seconds is not None:
            self._due = min(self._due, time.monotonic() + seconds)

    def abandon(self) -> None:
        """Note that the client no longer waits for the answer; ends `wait`."""
        self._abandoned = True
        if self._wake is not None:
            self._wake()

    def wait(self, event: threading.Event) -> None:
        """Wait, in a thread, until the event is set, the request is abandoned or the answer is late."""
        self._wake = event.set
        while not self._abandoned and not event.is_set() and (remaining := self.remaining) > 0:
            event.wait(min(remaining, threading.TIMEOUT_MAX))

    def check_wanted(self) -> None:
        """Raise ClientGoneError or DeadlineError unless the answer is still wanted."""
        if self._abandoned:
            raise ClientGoneError(GONE)
        if self.remaining <= 0:
            raise DeadlineError(LATE)

    def checkpoint(self) -> None:
        """Between two pieces of work: let other requests work; raises as `check_wanted`."""
        self.check_wanted()
        self.yield_slot()
        self.check_wanted()

    # -- memory ---------------------------------------------------------------------------------------------------

    def check_body(self, size: int) -> None:
        """Raise OverloadError if there is no room now for a body of this many bytes."""
        self._bodies.check_room(size)

    def extend_body(self, size: int) -> None:
        """Reserve memory for this many more bytes of the body; raises as `check_body`, and ClientGoneError."""
        with self._lock:
            if self._released:
                raise ClientGoneError(GONE)
            self._bodies.reserve(size)
            self._body_bytes += size

    def extend_answer(self, size: int, remedy: str) -> None:
        """Before a part of the answer is made: reserve the memory that it takes.

        Raises:
            ClientGoneError: the answer has been given up.
            TooLargeError: the answer becomes too large; the message ends with the remedy.
            OverloadError: all requests together hold too many bytes.
        """
        with self._lock:
            if self._released:
                raise ClientGoneError(GONE)
            total = self._answer_bytes + size
            if total > self.limits.answer_bytes:
                raise TooLargeError(
                    f"the answer takes {total} bytes of memory; expected at most {self.limits.answer_bytes} "
                    f"(AVEX_MAX_ANSWER_BYTES): {remedy}"
                )
            self._answers.reserve(size)
            self._answer_bytes = total

    def shrink_answer(self, size: int) -> None:
        """Once a part of the answer is sent: hold at most this many bytes of it."""
        with self._lock:
            if (sent := self._answer_bytes - size) > 0:
                self._answers.release(sent)
                self._answer_bytes = size

    def release_memory(self) -> None:
        """Give back what body and answer take, once the answer is sent or given up. Nothing is reserved after it."""
        with self._lock:
            self._bodies.release(self._body_bytes)
            self._answers.release(self._answer_bytes)
            self._body_bytes = self._answer_bytes = 0
            self._released = True

    # -- timings --------------------------------------------------------------------------------------------------

    def begin(self, stage: str) -> Callable[[], None]:
        """Start to measure a stage; call the result, in any thread, when the stage ends."""
        thread, start, computed = threading.get_ident(), time.perf_counter(), time.thread_time()

        def end() -> None:
            # A wait ends in another thread, and takes no CPU time.
            cpu = time.thread_time() - computed if threading.get_ident() == thread else 0.0
            self.timings.spans.append(StageTime(stage, start, time.perf_counter(), cpu))

        return end


_current: ContextVar[Request | None] = ContextVar("avex_serve_request", default=None)


def current() -> Request:
    """The request that is being answered; one without limits where there is none."""
    return _current.get() or Request()


@contextlib.contextmanager
def answering(request: Request) -> Iterator[None]:
    """Make it the current request of the block, and of the tasks and threads that take over its context."""
    token = _current.set(request)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure the block as a stage of the current request."""
    end = current().begin(name)
    try:
        yield
    finally:
        end()
