"""The front of HTTP: what every request passes before its handler; see `avex_serve.service.front`."""

import asyncio
import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Final

from opentelemetry import trace
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.errors import (
    AvexServeError,
    ClientGoneError,
    DeadlineError,
    InputError,
    SlowRequestError,
    TooLargeError,
)
from avex_serve.scheduling.request import LATE, Request
from avex_serve.service import bento
from avex_serve.service.front import OTHER, QUIET, Front, known
from avex_serve.service.http.app import Routed, Routes
from avex_serve.service.telemetry import REQUEST_ID, Exchange

CONTROL: Final = "/v2/repository/"  # the start of paths whose POST needs no engine
TIME_LIMIT: Final = "Request-Timeout"  # header: how many seconds the client waits
TRACE_ID: Final = "X-BentoML-Trace-ID"  # header, if BentoML is configured to send it
SLOWEST: Final = 8 * 2**10  # bytes a second, below which a body is too slow


class HttpFront:
    """ASGI middleware: the front of HTTP."""

    def __init__(self, app: ASGIApp, front: Callable[[], Front]) -> None:
        """BentoML makes it before the service starts.

        Args:
            app: BentoML's application.
            front: returns the worker's front, once the service has started.
        """
        self._app = app
        self._find_front = front
        self._routes = Routes(app)
        cors, self._sends_trace_id = bento.http_configuration()
        self._cors = None if cors is None else CORSMiddleware(app, **cors)

    @cached_property
    def _front(self) -> Front:
        return self._find_front()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # the start and the end of the service; upgrades to WebSocket are ignored
            await self._app(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._record(scope, receive, sending)
        except Exception as error:
            if started:
                raise  # the connection is closed
            await http_refusal(error, OTHER)(scope, receive, send)  # a fault before or in the recording

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        front, headers = self._front, Headers(scope=scope)
        found = self._routes.find(front, scope)
        # Percent-encoded, as sent: no character in it can forge a line of the log.
        path = scope.get("raw_path", b"").decode("ascii", "replace")
        exchange = Exchange("http", found.route, scope["method"], path, quiet=scope["path"] in QUIET)
        if self._cors is not None:
            send = partial(self._cors.send, send=send, request_headers=headers)
        with front.record(exchange, headers) as request:

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    exchange.status = str(message["status"])
                    message["headers"] = [*message.get("headers", ()), *self._headers(request)]
                    if front.drain.draining:  # or a client could send on a connection that is closed meanwhile
                        message["headers"].append((b"connection", b"close"))
                await send(message)

            try:
                if self._cors is not None and _is_preflight(scope, headers):
                    await self._cors.preflight_response(headers)(scope, receive, sending)
                else:
                    with front.running(quiet=exchange.quiet):
                        await self._answer(front, found, request, scope, receive, sending)
            except asyncio.CancelledError:
                exchange.status = exchange.status or "500"  # the server ends, and answers this
                raise
            except Exception as error:
                if not exchange.status:
                    await http_refusal(error, found.route)(scope, receive, sending)
                elif isinstance(error, AvexServeError):
                    exchange.status = str(error.http_status)  # the answer is incomplete: the connection is closed
                else:
                    raise

    def _headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        headers = [(REQUEST_ID.encode(), request.id.encode())]
        if self._sends_trace_id and (span := trace.get_current_span().get_span_context()).is_valid:
            headers.append((TRACE_ID.encode(), trace.format_trace_id(span.trace_id).encode()))
        return headers

    async def _answer(
        self, front: Front, found: Routed, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        settings, path, headers = front.settings, scope["path"], Headers(scope=scope)
        body = Body(request, receive, settings.max_body_bytes, settings.read_timeout_seconds)
        infers = scope["method"] == "POST" and not path.startswith(CONTROL)
        if not found.public:
            front.check_key(request, path, headers)
        request.limit_seconds(_seconds(headers.get(TIME_LIMIT)))
        # The parser accepts 64 bits, after any number of zeros; Python refuses more than 4300 digits.
        body.check_length(int(headers.get("content-length", "").strip().lstrip("0") or 0))
        if infers:
            front.admission.check_room()
        watch: asyncio.Task[None] | None = None

        async def sending(message: Message) -> None:
            if watch is not None and message["type"] == "http.response.body" and not message.get("more_body", False):
                watch.cancel()  # once all is sent, the server reports a disconnect too
            await send(message)

        try:
            async with asyncio.timeout(request.remaining) as wait:
                watch = asyncio.create_task(body.watch(partial(_end, wait)))
                await found.app(scope, body.receive, sending)
        except TimeoutError:
            if body.client_gone:
                raise ClientGoneError("the client closed the connection before its answer was ready") from None
            raise DeadlineError(LATE) from None
        finally:
            if watch is not None:
                watch.cancel()


def http_refusal(error: Exception, route: str) -> Response:
    """The answer to a request that failed."""
    if isinstance(error, HTTPException):  # Starlette's own: another method, a malformed form
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    error = known(error, route)
    return JSONResponse({"error": str(error)}, error.http_status, dict(error.http_headers))


def _end(wait: asyncio.Timeout) -> None:
    if not wait.expired():
        wait.reschedule(0)


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    return scope["method"] == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _seconds(text: str | None) -> float | None:
    """A client's time limit, None for None; InputError for anything but a positive number."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{TIME_LIMIT} is {text[:20]!r}; expected a positive number of seconds")
    return seconds


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
