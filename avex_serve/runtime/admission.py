"""One admission limit in front of the engine, for all transports of a worker.

    body in ── queue (bounded, first come first served) ──▶ a slot ──▶ work ──▶ answer
                        ▲                                     │
                        └──── a long request's next turn ◀────┘ after each turn, while others wait

A request waits without a thread and without a slot; in a slot it is decoded, resampled and sent through the graph,
by a thread of its own. Work that lasts longer than a turn gives its slot to whoever waits longest and lines up
again, so that a recording of an hour keeps nobody waiting for longer than its turn, even with one slot. Those that
wait for their next turn hold a decoded recording: there are never more of them than slots.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from avex_serve.errors import OverloadError
from avex_serve.runtime.allowance import Allowance, Deadline, Limits, granted

Answer = TypeVar("Answer")

TURN_SECONDS: Final = 0.5


class Admission:
    """The slots, the queue in front of them and the bytes that requests hold meanwhile."""

    def __init__(
        self, slots: int, queue: int, held_bytes: int, limits: Limits, turn_seconds: float = TURN_SECONDS
    ) -> None:
        """Open it.

        Args:
            slots: requests at work at once.
            queue: requests that may wait for a slot.
            held_bytes: of all bodies that have come or are coming.
            limits: what a single request may ask for.
            turn_seconds: how long a request works on while others wait.
        """
        self.bodies = HeldBytes(held_bytes)
        self._slots = slots
        self._queue = queue
        self._limits = limits
        self._turn_seconds = turn_seconds
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque()  # what to call to hand a slot over
        self._working = 0
        self._between_turns = 0
        self._pool = ThreadPoolExecutor(2 * slots, thread_name_prefix="avex-request")

    def close(self) -> None:
        """Wait for requests at work."""
        self._pool.shutdown()

    def check_room(self) -> None:
        """Raise OverloadError if a request that came now would find no place."""
        with self._lock:
            self._check_room()

    async def run(self, work: Callable[[], Answer], deadline: Deadline) -> Answer:
        """Answer of the work, done in a thread once there is a slot.

        The work asks `allowance.current` between its steps. Cancelling this call ends the wait at once, and the work
        at its next step; until then it keeps its slot.

        Raises:
            OverloadError: the queue is full.
            DeadlineError: the deadline passed.
        """
        await self._enter()
        try:
            return await asyncio.wrap_future(self._start(work, deadline))
        finally:
            deadline.abandon()  # whatever ended the wait, nobody reads what the thread would still find

    async def _enter(self) -> None:
        """Wait for a slot."""
        ready = asyncio.Event()
        hand_over = partial(asyncio.get_running_loop().call_soon_threadsafe, ready.set)
        with self._lock:
            self._check_room()
            if self._working < self._slots:
                self._working += 1
                return
            self._waiting.append(hand_over)
        try:
            await ready.wait()
        except asyncio.CancelledError:
            self._leave(hand_over)
            raise

    def _start(self, work: Callable[[], Answer], deadline: Deadline) -> Future[Answer]:
        allowance = Allowance(self._limits, deadline, self._turns())

        def run() -> Answer:
            with granted(allowance):
                deadline.check()
                return work()

        try:
            future = self._pool.submit(copy_context().run, run)
        except RuntimeError:  # closed
            self._release()
            raise OverloadError("the service is stopping; ask another one") from None
        # Not when the wait ends: a request whose client has gone works on until its next step.
        future.add_done_callback(lambda _: self._release())
        return future

    def _turns(self) -> Callable[[], None]:
        """What a request calls between its steps."""
        began = time.monotonic()

        def take_turns() -> None:
            nonlocal began
            if time.monotonic() - began >= self._turn_seconds:
                self._pass_on()
                began = time.monotonic()

        return take_turns

    def _pass_on(self) -> None:
        """Give the slot to whoever waits longest and wait for another, in the request's thread."""
        ready = threading.Event()
        with self._lock:
            if not self._waiting or self._between_turns == self._slots:
                return
            self._between_turns += 1
            self._waiting.append(ready.set)
            self._waiting.popleft()()
        ready.wait()
        with self._lock:
            self._between_turns -= 1

    def _leave(self, hand_over: Callable[[], object]) -> None:
        with self._lock:
            if hand_over in self._waiting:
                self._waiting.remove(hand_over)
                return
        self._release()  # it was handed over meanwhile

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft()()
            else:
                self._working -= 1

    def _check_room(self) -> None:
        if self._working == self._slots and len(self._waiting) - self._between_turns >= self._queue:
            raise OverloadError(
                f"the service is busy: {self._slots} requests at work and {self._queue} waiting; try again later"
            )


class HeldBytes:
    """The bytes that requests hold, all together; used on the event loop alone."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = 0

    def check_room(self, size: int) -> None:
        """Raise OverloadError if so many more would be too many."""
        if self._held + size > self.total:
            raise OverloadError(
                f"the service is busy: the requests at hand take all but {self.total - self._held} of the "
                f"{self.total} bytes that it holds; try again later"
            )

    def take(self, size: int) -> None:
        """Hold so many more; raises as `check_room`."""
        self.check_room(size)
        self._held += size

    def give_back(self, size: int) -> None:
        """Hold so many fewer."""
        self._held -= size


@dataclass(frozen=True)
class Ticket:
    """By what a request that has passed the gate gets its slot."""

    admission: Admission
    deadline: Deadline


_ticket: ContextVar[Ticket] = ContextVar("avex_ticket")


def hold_ticket(ticket: Ticket) -> None:
    """Give it to the request of this task; set where a transport lets it in."""
    _ticket.set(ticket)


async def admitted(work: Callable[[], Answer]) -> Answer:
    """`Admission.run` for the request of this task."""
    ticket = _ticket.get()
    return await ticket.admission.run(work, ticket.deadline)
