"""How bodies and messages arrive: bounded in size, in memory and in time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from starlette.types import Message, Receive

from avex_serve.errors import InputError, OverloadError, SlowRequestError, TooLargeError
from avex_serve.scheduling.request import Request

SLOWEST: Final = 8 * 2**10  # bytes a second, below which a body is too slow
PROMPT_SECONDS: Final = 1.0  # within which a message of gRPC arrives if client and network are well


class Body:
    """The body of an HTTP request. Once it is complete, the client's connection is watched."""

    def __init__(self, request: Request, receive: Receive, max_bytes: int, seconds: float) -> None:
        """A body of at most `max_bytes`.

        It is due after `seconds`, and each `SLOWEST` bytes that arrive give it a second more. It is never due later
        than `seconds` after what arrived last: a client that sends fast at first can't pause for long at the end.
        """
        self.client_gone = False
        self._request = request
        self._receive = receive
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._size = 0
        self._complete = asyncio.Event()
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        """The next message, for the application.

        Raises:
            OverloadError: all requests together hold too many bytes.
            SlowRequestError: the body arrives too slowly.
            TooLargeError: it is too large.
        """
        if self._complete.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(self._due - time.monotonic()):
                message = await self._message()
        except TimeoutError:
            raise SlowRequestError(
                f"the body arrives too slowly: {self._size} bytes so far; send it faster"
            ) from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            if not message.get("more_body", False):
                self._complete.set()
        return message

    async def watch(self, on_leaving: Callable[[], None]) -> None:
        """Once the body is complete, wait for the client to leave and call back."""
        await self._complete.wait()
        while (await self._message())["type"] != "http.disconnect":
            pass
        self.client_gone = True
        self._gone.set()
        on_leaving()

    async def _message(self) -> Message:
        try:
            return await self._receive()
        except RuntimeError:  # uvicorn wrote "100 Continue" to a connection that uvloop had closed
            return {"type": "http.disconnect"}

    def check_length(self, length: int) -> None:
        """Refuse a body by the length that its head declares; errors as of `receive`."""
        self._check_size(length)
        self._request.check_body(length)

    def _count(self, size: int) -> None:
        self._check_size(self._size + size)
        self._request.extend_body(size)
        self._size += size
        self._due = min(self._due + size / SLOWEST, time.monotonic() + self._seconds)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise TooLargeError(
                f"the body is too large; expected at most {self._max_bytes} bytes (AVEX_MAX_BODY_BYTES): send a "
                "WAV as FLAC, which takes about half as much, or the recording in pieces"
            )


class Messages:
    """The messages of gRPC that are arriving; used only on the event loop.

    A call whose client sends nothing looks like one whose message has arrived in half. So each message may take a
    moment, within which the network bounds how much there can be of them, and only a few may take longer. No message
    waits for another, and those that arrive promptly get through even if many calls idle.
    """

    def __init__(self, seconds: float, slow: int) -> None:
        """Up to `slow` messages may take longer than a moment at once, each of them at most `seconds`."""
        self._seconds = seconds
        self._free = slow

    async def next(self, read: Callable[[], Awaitable[Any]]) -> bytes:
        """The only message of a call; InputError if it ends without one, and errors as of `read`."""
        data = await self.read(read)
        if data is None:
            raise InputError("the call ended without a message; send one")
        return data

    async def read(self, read: Callable[[], Awaitable[Any]]) -> bytes | None:
        """The message that is read; None: the client sends no more.

        Raises:
            OverloadError: it is slow, and too many others are slow already.
            SlowRequestError: it doesn't arrive in time.
        """
        has_place = refused = False

        def take_place() -> None:
            nonlocal has_place, refused
            if self._free:
                self._free -= 1
                has_place = True
            elif not timeout.expired():
                refused = True
                timeout.reschedule(0)

        moment = asyncio.get_running_loop().call_later(PROMPT_SECONDS, take_place)
        try:
            async with asyncio.timeout(self._seconds) as timeout:
                data = await read()
        except TimeoutError:
            if refused:
                raise OverloadError("too many messages arrive slowly; try again later, or send it faster") from None
            raise SlowRequestError(f"the message didn't arrive within {self._seconds:g} s; send it faster") from None
        finally:
            moment.cancel()
            self._free += has_place
        if data is grpc.aio.EOF:
            return None
        message: bytes = data
        return message
