"""From SIGTERM on: new requests are refused, running ones are answered, then the server ends.

BentoML on its own would close HTTP first, leave gRPC unchanged until then, and wait for a day. Its supervisor keeps
the listening socket open until its workers have ended, so clients of a worker that stopped accepting would wait in
vain. This worker goes on accepting, and answers 503. While it closes, clients wait for the supervisor, which refuses
them as its last act (`bento`).

The process ends soon after AVEX_DRAIN_SECONDS, whatever its threads do. A worker whose supervisor has died gets
no signal, so it looks for its supervisor and then ends in the same way.
"""

import asyncio
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Final

from avex_serve.errors import ShuttingDownError

logger = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
CUT_OFF: Final = 1  # exit code
CLOSING_SECONDS: Final = 5.0  # to close servers and engines, after the last answer
LOOK_SECONDS: Final = 1.0  # between two looks for the supervisor


def shutting_down() -> ShuttingDownError:
    """The error of a request that comes too late."""
    return ShuttingDownError("the service is shutting down; send the request again, to another replica")


class Drain:
    """Counts running requests and ends them in order; one for a process, shared by both transports."""

    def __init__(self, seconds: float) -> None:
        """Running requests get up to `seconds`."""
        self.draining = False
        self._seconds = seconds
        self._running = 0
        self._idle = asyncio.Event()
        self._previous: dict[int, Any] = {}
        self._task: asyncio.Task[None] | None = None

    def on_signals(self, announce: Callable[[], None]) -> None:
        """Drain when the process gets a signal to end; call this on the event loop.

        Args:
            announce: called at the beginning, when `draining` is already set.
        """
        loop, context = (
            asyncio.get_running_loop(),
            copy_context(),
        )  # a signal may interrupt a request, in its context

        def handle(number: int, frame: Any) -> None:
            if self.draining:  # the second signal: the server ends in its own way
                self._previous[number](number, frame)
                return
            self.draining = True
            # Closing waits for threads, and a thread may never end. This timer needs neither the event loop nor
            # Python: it prints where every thread is, and ends the process.
            faulthandler.dump_traceback_later(self._seconds + CLOSING_SECONDS, exit=True)
            loop.call_soon_threadsafe(begin, number, context=context)

        def begin(number: int) -> None:
            self._task = loop.create_task(self._end(number, announce))

        for number in SIGNALS:
            self._previous[number] = signal.signal(number, handle)

    def watch_supervisor(self) -> None:
        """Send this process SIGTERM once its supervisor has ended."""
        supervisor = os.getppid()

        def look() -> None:
            while os.getppid() == supervisor:
                time.sleep(LOOK_SECONDS)
            logger.error("the supervisor of this worker has ended; the worker ends too")
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=look, name="avex-supervisor", daemon=True).start()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request as running during the block; ShuttingDownError if it is too late."""
        if self.draining:
            raise shutting_down()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def _end(self, number: int, announce: Callable[[], None]) -> None:
        logger.info("shutting down: %d requests are running and get up to %g s", self._running, self._seconds)
        announce()
        try:
            async with asyncio.timeout(self._seconds):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            logger.error("AVEX_DRAIN_SECONDS (%g) are over: %d requests are cut off", self._seconds, self._running)
            # Threads that infer can't be stopped, and everything else would wait for them.
            os._exit(CUT_OFF)
        self._previous[number](number, None)
