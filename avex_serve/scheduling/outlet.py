"""The pieces of an answer, from the thread that makes them to the event loop that sends them."""

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Final

from avex_serve.scheduling.request import Request

UNSENT_BYTES: Final = 2**18  # of pieces that wait for the client: then the thread waits for it

Pieces = Generator[bytes, None, None]


class Outlet:
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
