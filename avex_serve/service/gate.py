"""What every request passes before anything reads it, whatever the transport: key, room, deadline."""

import math
from dataclasses import dataclass
from typing import Final, Self

from avex_serve.errors import InputError
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.request import Limits, Memory, Request
from avex_serve.service.keys import Keys
from avex_serve.service.settings import Settings

QUEUE_FACTOR: Final = 16  # waiting requests for each at work
TIMEOUT_MARGIN: Final = 10.0  # seconds
CONTROL_BYTES: Final = 2**16  # of a request that carries no tensors and is read on the event loop


@dataclass(frozen=True)
class Gate:
    """The gate of a worker, one for HTTP and gRPC together."""

    keys: Keys
    admission: Admission
    limits: Limits
    bodies: Memory
    answers: Memory
    body_bytes: int  # of one body at most
    read_seconds: float  # for a body to arrive
    answer_seconds: float  # from arrival to answer

    @classmethod
    def from_settings(cls, settings: Settings, threads: int) -> Self:
        """The gate that the settings describe.

        Args:
            settings: of the service.
            threads: that infer in this worker, and as many requests at work unless the settings say otherwise.

        Raises:
            InputError: see `Keys.from_settings`.
        """
        slots = settings.concurrency or threads
        return cls(
            keys=Keys.from_settings(settings),
            admission=Admission(slots, QUEUE_FACTOR * slots if settings.queue is None else settings.queue),
            limits=Limits(
                seconds=settings.max_seconds,
                clip_seconds=settings.max_clip_seconds,
                steps=settings.max_steps,
                decoded_bytes=settings.max_decoded_bytes,
                channels=settings.max_channels,
                windows=settings.max_windows,
                json_bytes=settings.max_json_bytes,
                answer_bytes=settings.max_answer_bytes,
            ),
            bodies=Memory(settings.max_held_bytes, "bodies"),
            answers=Memory(slots * settings.max_answer_bytes, "answers"),
            body_bytes=settings.max_body_bytes,
            read_seconds=settings.read_timeout_seconds,
            answer_seconds=settings.timeout_seconds,
        )

    def request(self, id: str) -> Request:
        """The context of a request that arrives now."""
        return Request(id, self.limits, self.answer_seconds, self.bodies, self.answers)


def http_time_limit() -> float:
    """Seconds after which BentoML may cut a request off: a little later than the gate does.

    BentoML wants it when the service's class is made, and keeps a timer for each request until then.
    """
    try:
        return Settings.from_environment().timeout_seconds + TIMEOUT_MARGIN
    except InputError:  # which keeps the service from starting, with a message
        return TIMEOUT_MARGIN


def parse_seconds(name: str, text: str | None) -> float | None:
    """A client's time limit, None for None.

    Raises:
        InputError: no positive number.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{name} is {text[:20]!r}; expected a positive number of seconds")
    return seconds
