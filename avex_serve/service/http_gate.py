"""The gate over HTTP: ASGI middleware in front of our routes and of BentoML's.

A request without a key, without room or with too large a body is refused before its body is read. While one waits
or is answered, its client's connection is watched: if it closes, the request is cancelled.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.errors import AvexServeError, ClientGoneError, DeadlineError, SlowRequestError, TooLargeError
from avex_serve.scheduling.request import Request, current
from avex_serve.service.gate import Gate, parse_seconds

TIMEOUT: Final = "Request-Timeout"  # header: how many seconds the client waits
# Asked by those who watch over the service, without a key, also while it is busy.
HEALTH: Final = frozenset({"/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
CONTROL: Final = "/v2/repository/"  # begins paths whose POST does no work that the admission limit is for
SLOWEST: Final = 8 * 2**10  # bytes a second, below which a body is too slow
POLICY_VIOLATION: Final = 1008  # WebSocket close code


class HttpGate:
    """ASGI middleware: lets in what may come in."""

    def __init__(self, app: ASGIApp, gate: Callable[[], Gate]) -> None:
        """`gate` is called with each request, for it is opened after the application is built."""
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._let_in(scope, receive, sending)
        except AvexServeError as error:
            if started:
                raise
            answer = JSONResponse({"error": str(error)}, error.http_status, dict(error.http_headers))
            await answer(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, headers = self._gate(), Headers(scope=scope)
        if scope["path"] not in HEALTH:
            gate.keys.check(headers.get("authorization"))
        request = current()
        request.limit_seconds(parse_seconds(TIMEOUT, headers.get(TIMEOUT)))
        _check_length(gate, request, headers.get("content-length"))
        if scope["method"] == "POST" and not scope["path"].startswith(CONTROL):
            gate.admission.check_room()
        body = _Body(gate, request, receive)
        watch: asyncio.Task[None] | None = None

        async def sending(message: Message) -> None:
            if watch is not None and message["type"] == "http.response.body" and not message.get("more_body", False):
                watch.cancel()  # the server calls it a disconnect, too, when all is sent
            await send(message)

        try:
            async with asyncio.timeout(request.remaining) as wait:
                watch = asyncio.create_task(body.watch(lambda: wait.reschedule(0)))
                await self._app(scope, body.receive, sending)
        except TimeoutError:
            if body.client_gone:
                raise ClientGoneError("the client closed the connection before its answer was ready") from None
            raise DeadlineError("the answer was not ready in time; send less, or allow more time") from None
        finally:
            if watch is not None:
                watch.cancel()


class _Body:
    """A request's body as it comes: counted, and refused where it is too much or too slow."""

    def __init__(self, gate: Gate, request: Request, receive: Receive) -> None:
        self.client_gone = False
        self._gate = gate
        self._request = request
        self._receive = receive
        self._began = time.monotonic()
        self._size = 0
        self._complete = asyncio.Event()
        self._gone = asyncio.Event()

    async def receive(self) -> Message:
        """The next message, for the application.

        Raises:
            OverloadError: the service holds too many bytes already.
            SlowRequestError: the body comes too slowly.
            TooLargeError: it is too large.
        """
        if self._complete.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        patience = self._began + self._gate.read_seconds + self._size / SLOWEST - time.monotonic()
        try:
            async with asyncio.timeout(patience):
                message = await self._receive()
        except TimeoutError:
            raise SlowRequestError(f"the body came too slowly: {self._size} bytes until now") from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            if not message.get("more_body", False):
                self._complete.set()
        return message

    async def watch(self, on_leaving: Callable[[], None]) -> None:
        """Once the body is complete, wait for the client to leave, and tell."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.client_gone = True
        self._gone.set()
        on_leaving()

    def _count(self, size: int) -> None:
        if self._size + size > self._gate.body_bytes:
            raise TooLargeError(_too_large(self._gate))
        self._request.extend_body(size)
        self._size += size


def _check_length(gate: Gate, request: Request, length: str | None) -> None:
    if length is not None:  # the server has seen to it that it is a number
        if int(length) > gate.body_bytes:
            raise TooLargeError(_too_large(gate))
        request.check_body(int(length))


def _too_large(gate: Gate) -> str:
    return f"the body is larger than the {gate.body_bytes} bytes that are taken; send the recording in pieces"
