"""What the request that is being answered may use, asked wherever its work goes on.

The allowance is found by context, as asyncio finds a task's timeout: decoder, windows and batches ask for it, and
no function in between passes it on. Where nobody set one, as on the command line, nothing is limited.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from avex_serve.errors import ClientGoneError, DeadlineError, TooLargeError


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for."""

    seconds: float = math.inf  # of a recording
    # Attention takes memory by the square of these:
    clip_seconds: float = math.inf  # of a clip that goes through the graph in one piece
    steps: float = math.inf  # of a sequence of embeddings
    decoded_bytes: float = math.inf  # of a recording: float32 samples of all channels
    channels: float = math.inf
    windows: float = math.inf  # of a recording
    json_bytes: float = math.inf
    answer_bytes: float = math.inf  # of memory that making an answer takes


class Deadline:
    """Until when an answer is wanted."""

    def __init__(self, seconds: float = math.inf) -> None:
        """`seconds` from now."""
        self._end = time.monotonic() + seconds
        self._abandoned = False
        self._wake: Callable[[], object] | None = None

    @property
    def remaining(self) -> float:
        """Seconds that are left, negative once it has passed."""
        return self._end - time.monotonic()

    def abandon(self) -> None:
        """Nobody waits any more."""
        self._abandoned = True
        if self._wake is not None:
            self._wake()

    def wait(self, event: threading.Event) -> None:
        """Wait, in a thread, for an event that `abandon` sets too, or until the deadline has passed."""
        self._wake = event.set
        while not self._abandoned and not event.is_set() and (remaining := self.remaining) > 0:
            event.wait(min(remaining, threading.TIMEOUT_MAX))

    def check(self) -> None:
        """Raise ClientGoneError or DeadlineError unless the answer is still wanted."""
        if self._abandoned:
            raise ClientGoneError("the client has gone before its answer was ready")
        if self.remaining <= 0:
            raise DeadlineError("the answer was not ready in time; send a shorter recording, or allow more time")


@dataclass
class Allowance:
    """Limits, a deadline, and what others leave, of one request."""

    limits: Limits
    deadline: Deadline
    take_turns: Callable[[], None]  # waits until others have had their turn
    take_room: Callable[[int], None]  # waits until there is room for so many bytes of a recording or an answer
    answer_bytes: int = field(default=0, init=False)  # of memory that making the answer takes, as far as is known

    def checkpoint(self) -> None:
        """Between two pieces of work: let others have a turn; raises ClientGoneError or DeadlineError."""
        self.deadline.check()
        self.take_turns()
        self.deadline.check()

    def check_recording(self, frames: int, channels: int, sample_rate: int) -> None:
        """Make sure that a recording, as much as is known of it, may be decoded.

        Raises:
            TooLargeError: it is too long, or too large once decoded.
            ClientGoneError, DeadlineError: while it waited for room.
        """
        if channels > self.limits.channels:
            raise TooLargeError(f"the recording has {channels} channels; at most {self.limits.channels} are taken")
        if frames > self.limits.seconds * sample_rate:
            raise TooLargeError(
                f"the recording is longer than the {self.limits.seconds:g} s that are taken; send it in pieces"
            )
        if 4 * frames * channels > self.limits.decoded_bytes:
            raise TooLargeError(
                f"the recording takes more than {self.limits.decoded_bytes} bytes once decoded; send it in pieces"
            )
        self.take_room(4 * frames)

    def check_clip(self, samples: int, sample_rate: int, window: int) -> None:
        """Raise TooLargeError for a clip that is longer than is taken and than a window, in samples."""
        longest = max(window / sample_rate, self.limits.clip_seconds)
        if samples > longest * sample_rate:
            raise TooLargeError(
                f"a clip of {samples} samples is longer than the {longest:g} s that are taken in one piece; send "
                "shorter ones, or the recording as it is, which is cut here"
            )

    def check_steps(self, count: int) -> None:
        """Raise TooLargeError for a sequence of too many embeddings."""
        if count > self.limits.steps:
            raise TooLargeError(
                f"a sequence of {count} embeddings is longer than the {self.limits.steps} that are taken; send "
                "those of shorter clips"
            )

    def check_windows(self, count: int) -> None:
        """Raise TooLargeError for too many windows."""
        if count > self.limits.windows:
            raise TooLargeError(
                f"the recording has {count} windows; at most {self.limits.windows} are taken: "
                "send it in pieces, or with less overlap"
            )

    def check_json(self, size: int) -> None:
        """Raise TooLargeError for a JSON document of too many bytes, which take many times as many once parsed."""
        if size > self.limits.json_bytes:
            raise TooLargeError(
                f"the JSON has {size} bytes; at most {self.limits.json_bytes} are taken: send tensors in binary"
            )

    def extend_answer(self, size: int, remedy: str) -> None:
        """Before a part of the answer is made: count the bytes of memory that it will take.

        Raises:
            TooLargeError: the answer becomes too large; the message ends with the remedy.
            ClientGoneError, DeadlineError: while it waited for room.
        """
        self.answer_bytes += size
        if self.answer_bytes > self.limits.answer_bytes:
            raise TooLargeError(
                f"the answer takes {self.answer_bytes} bytes of memory while it is made; at most "
                f"{self.limits.answer_bytes} are given: {remedy}"
            )
        self.take_room(self.answer_bytes)


UNLIMITED: Final = Allowance(Limits(), Deadline(), lambda: None, lambda _: None)

_current: ContextVar[Allowance] = ContextVar("avex_allowance")


def current() -> Allowance:
    """The allowance of the request that is being answered."""
    return _current.get(UNLIMITED)


@contextlib.contextmanager
def granted(allowance: Allowance) -> Iterator[None]:
    """Make it the current one within the block."""
    token = _current.set(allowance)
    try:
        yield
    finally:
        _current.reset(token)
