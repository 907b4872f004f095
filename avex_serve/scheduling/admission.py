"""One admission limit in front of the engines, for all transports of a worker.

    body in ── queue (bounded, first come first served) ──▶ a slot ──▶ work ──▶ answer
                        ▲                                     │
                        └──── its next turn ◀─────────────────┘ after each turn, while others wait

A request waits without a thread and without a slot. In its slot, its own thread decodes it, resamples it and runs
the graph. A request that works for longer than a turn passes its slot to the request that has waited longest, and
joins the queue again. So a recording of an hour delays another request by one turn at most, even with one slot.

An answer in pieces is sent while it is made. While its client doesn't read, the request waits without its slot.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from contextvars import copy_context
from functools import partial
from typing import Final, TypeVar

from avex_serve.errors import OverloadError
from avex_serve.scheduling.request import QUEUE, Request, current, stage

Answer = TypeVar("Answer")
Pieces = Generator[bytes, None, None]  # of an answer

TURN_SECONDS: Final = 0.5
UNSENT_BYTES: Final = 2**18  # of pieces that wait for the client: then the thread waits for it


class Admission:
    """The slots, and the queue in front of them."""

    def __init__(self, slots: int, queue: int, turn_seconds: float = TURN_SECONDS) -> None:
        """Open it.

        Args:
            slots: requests at work at once.
            queue: further requests that may wait, for their first turn or for a later one.
            turn_seconds: how long a request works while others wait.
        """
        self._turn_seconds = turn_seconds
        self._places = _Places(slots, queue)
        self._pool = ThreadPoolExecutor(slots + queue, thread_name_prefix="avex-request")

    def close(self) -> None:
        """Wait for requests at work."""
        self._pool.shutdown()

    def check_room(self) -> None:
        """Raise OverloadError if there is no place for one more request now."""
        self._places.check_room()

    def waiting(self) -> int:
        """Requests that wait for their first turn, or for a later one."""
        return self._places.waiting()

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """The result of the work of the current request, done in a thread once there is a slot.

        The work calls `Request.checkpoint` between its steps. Cancelling this call ends the wait at once, and the
        work at its next step; until then it keeps its slot.

        Raises:
            OverloadError: the queue is full.
            DeadlineError: the answer was not ready in time.
        """
        request = current()
        answer: Future[Answer] = Future()
        answer.set_running_or_notify_cancel()  # so that a cancelled wait leaves it to the thread
        end_wait = request.begin(QUEUE)
        start = self._starter(work, request, answer, end_wait)
        if self._places.enter(start) and not start():
            self._places.exit(slot=True)
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            if self._places.give_up(start):
                end_wait()
            raise
        finally:
            request.abandon()  # however the wait ended: the thread's result is not read after it
            del answer  # this frame is in the traceback of the error that it holds: no cycle

    async def stream(self, make: Callable[[], Pieces]) -> AsyncGenerator[list[bytes], None]:
        """The pieces of an answer to the current request, a few at a time while they are made as by `run`.

        While the client doesn't read, the work waits without its slot. Close the generator to end the work at its
        next step. Errors as of `run`.
        """
        outlet = _Outlet(current())
        running = asyncio.create_task(self.run(partial(outlet.fill, make)))
        running.add_done_callback(partial(_end_stream, outlet))
        try:
            while True:
                ended = running.done()  # before the last pieces are taken
                if pieces := outlet.take():
                    yield pieces
                elif ended:
                    break
                else:
                    await outlet.wait()
            await running
        finally:
            running.cancel()

    def _starter(
        self, work: Callable[[], Answer], request: Request, answer: "Future[Answer]", end_wait: Callable[[], None]
    ) -> Callable[[], bool]:
        """What starts the work in a thread, once there is a slot for it; False if there is no thread.

        The request that frees the slot calls it, so that the slot need not wait for the event loop.
        """
        context = copy_context()

        def run() -> Answer:
            end_wait()
            slot = _Slot(self._places, request, self._turn_seconds)
            request.yield_slot, request.pause = slot.yield_, slot.pause
            try:
                request.check_wanted()
                return work()
            finally:
                slot.free()  # not when the wait ends: a request whose client has gone works until its next step

        # The thread takes the work, or the caller if there is no thread. The functions here do not refer to the
        # answer itself: their frames are in the traceback of the error that it may hold, and such a cycle would keep
        # body and recording until garbage is collected.
        pending = deque([(answer, run)])

        def take() -> None:
            with suppress(IndexError):
                _fulfil(*pending.pop())

        def start() -> bool:
            try:
                self._pool.submit(context.run, take)
            except RuntimeError:  # closed, or no thread can be started: then the pool may have kept the work
                with suppress(IndexError):
                    untaken, _ = pending.pop()
                    untaken.set_exception(
                        OverloadError("the service is stopping or has no thread left; ask another one")
                    )
                    return False
            return True

        return start


def _end_stream(outlet: "_Outlet", running: "asyncio.Task[None]") -> None:
    outlet.wake()
    if not running.cancelled():
        running.exception()  # or asyncio logs one that nobody waits for any more


def _fulfil(answer: "Future[Answer]", work: Callable[[], Answer]) -> None:
    """Set the result, or the error, of the work."""
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - it is raised where the answer is awaited
        answer.set_exception(error)
        del answer  # the error's traceback holds this frame: no cycle
    else:
        answer.set_result(result)


class _Places:
    """The slots, and the requests that wait for one.

    Each waiter is a wake-up callback. It is called with the lock held and must not block. It returns False if its
    request can't start.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self._slots = slots
        self._queue = queue
        self._lock = threading.RLock()
        self._inside = 0
        self._working = 0
        self._waiting: deque[Callable[[], object]] = deque()

    def check_room(self) -> None:
        with self._lock:
            if self._inside == self._slots + self._queue:
                raise OverloadError(
                    f"the service is busy: {self._slots} requests at work and {self._queue} waiting; try again later"
                )

    def waiting(self) -> int:
        """How many wait for a slot."""
        with self._lock:
            return len(self._waiting)

    def enter(self, wake: Callable[[], object]) -> bool:
        """Take a slot (True) or a place in the queue (False); OverloadError if there is neither."""
        with self._lock:
            self.check_room()
            self._inside += 1
            return self.join(wake)

    def give_up(self, wake: Callable[[], object]) -> bool:
        """Leave while waiting for the first slot; False if the slot was granted meanwhile."""
        with self._lock:
            waited = self.stop_waiting(wake)
            if waited:
                self._inside -= 1
            return waited

    def exit(self, *, slot: bool) -> None:
        """Leave, and free the slot."""
        with self._lock:
            if slot:
                self._free_slot()
            self._inside -= 1

    def leave_slot(self) -> None:
        """Free the slot, and stay inside."""
        with self._lock:
            self._free_slot()

    def join(self, wake: Callable[[], object]) -> bool:
        """Take a slot again (True) or a place in the queue (False)."""
        with self._lock:
            if self._working < self._slots:
                self._working += 1
                return True
            self._waiting.append(wake)
            return False

    def stop_waiting(self, wake: Callable[[], object]) -> bool:
        """Wait no longer; False if the slot was granted meanwhile."""
        with self._lock:
            if wake not in self._waiting:
                return False
            self._waiting.remove(wake)
            return True

    def swap_slot(self, wake: Callable[[], object]) -> bool:
        """Pass the slot to the request that has waited longest and join the queue; False if none waits."""
        with self._lock:
            if not self._waiting:
                return False
            self._waiting.append(wake)
            self._free_slot()
            return True

    def _free_slot(self) -> None:
        while self._waiting:
            if self._waiting.popleft()() is not False:
                return
            self._inside -= 1
        self._working -= 1


class _Slot:
    """The slot of a request, used in the request's thread."""

    def __init__(self, places: _Places, request: Request, turn_seconds: float) -> None:
        self._places = places
        self._request = request
        self._turn_seconds = turn_seconds
        self._began = time.monotonic()
        self._held = True

    def yield_(self) -> None:
        """If this turn is over, let others work, and return with a slot again.

        Raises:
            ClientGoneError, DeadlineError: the answer is no longer wanted.
        """
        if time.monotonic() - self._began < self._turn_seconds:
            return
        ready = threading.Event()
        if self._places.swap_slot(ready.set):
            self._held = False
            self._wait_for(ready)
        self._began = time.monotonic()

    def pause(self, event: threading.Event) -> None:
        """Wait for the event, and let others work meanwhile; return with a slot again. Errors as of `yield_`."""
        self._places.leave_slot()
        self._held = False
        self._request.wait(event)
        ready = threading.Event()
        if self._places.join(ready.set):
            self._held = True
            self._request.check_wanted()
        else:
            self._wait_for(ready)
        self._began = time.monotonic()

    def _wait_for(self, ready: threading.Event) -> None:
        """Wait in the queue for a slot."""
        with stage(QUEUE):
            self._request.wait(ready)
        if self._places.stop_waiting(ready.set):
            self._request.check_wanted()
        self._held = True

    def free(self) -> None:
        """Leave, and free the slot."""
        self._places.exit(slot=self._held)


class _Outlet:
    """The pieces of a request's answer. At most `UNSENT_BYTES` and a piece wait, however slowly the client reads."""

    def __init__(self, request: Request) -> None:
        """Make it on the event loop."""
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pieces: list[bytes] = []
        self._size = 0
        self._arrived = asyncio.Event()
        self._room = threading.Event()

    def fill(self, make: Callable[[], Pieces]) -> None:
        """In the thread of the request: make the pieces.

        Raises:
            ClientGoneError, DeadlineError: the answer is no longer wanted.
        """
        with closing(make()) as pieces:
            for piece in pieces:
                self._put(piece)

    def _put(self, piece: bytes) -> None:
        with self._lock:
            self._pieces.append(piece)
            self._size += len(piece)
            is_full = self._size > UNSENT_BYTES
            if is_full:
                self._room.clear()
        self._loop.call_soon_threadsafe(self._arrived.set)
        if is_full:
            (self._request.pause or self._request.wait)(self._room)
        self._request.shrink_answer(self._size)  # what it was made of is no longer needed, nor what was sent
        self._request.check_wanted()

    async def wait(self) -> None:
        """On the event loop: wait for pieces, or until `wake` is called."""
        await self._arrived.wait()
        self._arrived.clear()

    def wake(self) -> None:
        """End a wait."""
        self._arrived.set()

    def take(self) -> list[bytes]:
        """All pieces that are there, perhaps none."""
        with self._lock:
            pieces, self._pieces, self._size = self._pieces, [], 0
            self._room.set()
        return pieces
