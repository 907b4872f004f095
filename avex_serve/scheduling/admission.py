"""One admission limit in front of the engine, for all transports of a worker.

    body in ── queue (bounded, first come first served) ──▶ a slot ──▶ work ──▶ answer
                        ▲                                     │
                        ├──── its next turn ◀─────────────────┤ after each turn, while others wait
                        └─ room for large audio or answers ◀──┘ while as many as there are slots have it

A request waits without a thread and without a slot; in a slot it is decoded, resampled and sent through the graph,
by a thread of its own. Work that lasts longer than a turn gives its slot to whoever waits longest and lines up
again, so that a recording of an hour keeps nobody waiting for longer than its turn, even with one slot. What this
costs in memory is bounded: only as many requests as there are slots have a large recording or answer at once.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Final, TypeVar

from avex_serve.errors import OverloadError
from avex_serve.scheduling.allowance import Allowance, Deadline, Limits, granted
from avex_serve.scheduling.stages import QUEUE, begin, stage

Answer = TypeVar("Answer")

TURN_SECONDS: Final = 0.5
LARGE_BYTES: Final = 2**24  # of a decoded recording, 87 s at 48 kHz, or of an answer


class Admission:
    """The slots, the queue in front of them and the bytes that requests hold meanwhile."""

    def __init__(
        self, slots: int, queue: int, held_bytes: int, limits: Limits, turn_seconds: float = TURN_SECONDS
    ) -> None:
        """Open it.

        Args:
            slots: requests at work at once.
            queue: requests that may wait besides, at the beginning or in between.
            held_bytes: of all bodies that have come or are coming.
            limits: what a single request may ask for.
            turn_seconds: how long a request works on while others wait.
        """
        self.bodies = HeldBytes(held_bytes)
        self._limits = limits
        self._turn_seconds = turn_seconds
        self._places = _Places(slots, queue)
        self._pool = ThreadPoolExecutor(slots + queue, thread_name_prefix="avex-request")

    def close(self) -> None:
        """Wait for requests at work."""
        self._pool.shutdown()

    def check_room(self) -> None:
        """Raise OverloadError if a request that came now would find no place."""
        self._places.check_room()

    async def run(self, work: Callable[[], Answer], deadline: Deadline) -> Answer:
        """Answer of the work, done in a thread once there is a slot.

        The work asks `allowance.current` between its steps. Cancelling this call ends the wait at once, and the work
        at its next step; until then it keeps its slot.

        Raises:
            OverloadError: the queue is full.
            DeadlineError: the deadline passed.
        """
        answer: Future[Answer] = Future()
        answer.set_running_or_notify_cancel()  # so that whoever ends the wait leaves it alone
        end_wait = begin(QUEUE)
        start = self._starter(work, deadline, answer, end_wait)
        if self._places.enter(start):
            start()
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            if self._places.give_up(start):
                end_wait()
            raise
        finally:
            deadline.abandon()  # whatever ended the wait, nobody reads what the thread would still find
            del answer  # this frame is in the traceback of the error that it holds: no cycle

    def _starter(
        self, work: Callable[[], Answer], deadline: Deadline, answer: "Future[Answer]", end_wait: Callable[[], None]
    ) -> Callable[[], None]:
        """What starts the work in a thread, once there is a slot for it.

        Whoever frees the slot calls it, so that the slot need not wait for the event loop.
        """
        context = copy_context()

        def run() -> Answer:
            end_wait()
            visit = _Visit(self._places, deadline, self._turn_seconds)
            try:
                with granted(Allowance(self._limits, deadline, visit.take_turns, visit.take_room)):
                    deadline.check()
                    return work()
            finally:
                visit.end()  # not when the wait ends: a request whose client has gone works on until its next step

        # Taken by the thread, or by whoever finds that there is none. The functions here don't refer to the answer
        # itself: their frames hang on the traceback of the error that it may hold, and such a cycle would keep body
        # and recording until garbage is collected.
        pending = deque([(answer, run)])

        def take() -> None:
            with suppress(IndexError):
                _fulfil(*pending.pop())

        def start() -> None:
            try:
                self._pool.submit(context.run, take)
            except RuntimeError:  # closed, or no thread can be started: then the pool may have kept the work
                with suppress(IndexError):
                    untaken, _ = pending.pop()
                    self._places.exit(slot=True, room=False)
                    untaken.set_exception(
                        OverloadError("the service is stopping or has no thread left; ask another one")
                    )

        return start


def _fulfil(answer: "Future[Answer]", work: Callable[[], Answer]) -> None:
    """Set the answer, or the error, of the work."""
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
        answer.set_exception(error)
        del answer  # the error's traceback holds this frame: no cycle
    else:
        answer.set_result(result)


class _Places:
    """Slots and rooms for large recordings and answers, as many of one as of the other, and who waits for them.

    Who waits is known by the function that grants it what it waits for; such a function is called with the lock
    held and only wakes or starts somebody.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self._slots = slots
        self._queue = queue
        self._lock = threading.RLock()  # who can't be started gives back the slot at once
        self._inside = 0
        self._working = 0
        self._large = 0
        self._for_slot: deque[Callable[[], object]] = deque()
        self._for_room: deque[Callable[[], object]] = deque()

    def check_room(self) -> None:
        with self._lock:
            self._check_room()

    def enter(self, grant: Callable[[], object]) -> bool:
        """Take a slot (True) or a place in the queue; OverloadError if there is neither."""
        with self._lock:
            self._check_room()
            self._inside += 1
            return self._take_slot(grant)

    def give_up(self, grant: Callable[[], object]) -> bool:
        """Go while waiting for the first slot; False if it was granted meanwhile."""
        with self._lock:
            waited = self._stop_waiting(grant)
            if waited:
                self._inside -= 1
            return waited

    def exit(self, *, slot: bool, room: bool) -> None:
        """Go, and free what one has."""
        with self._lock:
            if slot:
                self._free_slot()
            if room:
                self._free_room()
            self._inside -= 1

    def take_slot(self, grant: Callable[[], object]) -> bool:
        """Take a slot (True) or wait for one."""
        with self._lock:
            return self._take_slot(grant)

    def stop_waiting(self, grant: Callable[[], object]) -> bool:
        """Wait no more; False if it was granted meanwhile."""
        with self._lock:
            return self._stop_waiting(grant)

    def swap_slot(self, grant: Callable[[], object]) -> bool:
        """Give the slot to whoever waits longest and line up again; False if nobody waits."""
        with self._lock:
            if not self._for_slot:
                return False
            self._for_slot.append(grant)
            self._free_slot()
            return True

    def take_room(self, grant: Callable[[], object]) -> bool:
        """Take room for what is large (True), or free the slot and wait for room."""
        with self._lock:
            if self._large < self._slots:
                self._large += 1
                return True
            self._for_room.append(grant)
            self._free_slot()
            return False

    def _take_slot(self, grant: Callable[[], object]) -> bool:
        if self._working < self._slots:
            self._working += 1
            return True
        self._for_slot.append(grant)
        return False

    def _free_slot(self) -> None:
        if self._for_slot:
            self._for_slot.popleft()()
        else:
            self._working -= 1

    def _free_room(self) -> None:
        if self._for_room:
            self._for_room.popleft()()
        else:
            self._large -= 1

    def _stop_waiting(self, grant: Callable[[], object]) -> bool:
        for line in (self._for_slot, self._for_room):
            if grant in line:
                line.remove(grant)
                return True
        return False

    def _check_room(self) -> None:
        if self._inside == self._slots + self._queue:
            raise OverloadError(
                f"the service is busy: {self._slots} requests at work and {self._queue} waiting; try again later"
            )


class _Visit:
    """A request that has its first slot, from within its thread."""

    def __init__(self, places: _Places, deadline: Deadline, turn_seconds: float) -> None:
        self._places = places
        self._deadline = deadline
        self._turn_seconds = turn_seconds
        self._began = time.monotonic()
        self._has_slot = True
        self._has_room = False

    def take_turns(self) -> None:
        """Let others have a turn if this one's is over."""
        if time.monotonic() - self._began < self._turn_seconds:
            return
        ready = threading.Event()
        if self._places.swap_slot(ready.set):
            self._has_slot = False
            self._await(ready)
            self._has_slot = True
        self._began = time.monotonic()

    def take_room(self, size: int) -> None:
        """Wait for room if a recording or an answer of so many bytes needs it."""
        if size <= LARGE_BYTES or self._has_room:
            return
        ready = threading.Event()
        if not self._places.take_room(ready.set):
            self._has_slot = False
            self._await(ready)
        self._has_room = True
        if not self._has_slot:
            ready = threading.Event()
            if not self._places.take_slot(ready.set):
                self._await(ready)
            self._has_slot = True

    def end(self) -> None:
        """Give back what it has."""
        self._places.exit(slot=self._has_slot, room=self._has_room)

    def _await(self, ready: threading.Event) -> None:
        """Until it is granted; raises what `Deadline.check` does where nobody waits for the answer any more."""
        with stage(QUEUE):
            self._deadline.wait(ready)
        if self._places.stop_waiting(ready.set):
            self._deadline.check()


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
