"""From SIGTERM on: new requests are refused, running ones are answered, then the server ends.

BentoML's own order would close HTTP first, leave gRPC as it is until then, and wait for a day. Its supervisor keeps
the listening socket open until its workers are gone, so that a worker which stopped accepting would leave new
clients waiting for nothing: this one goes on accepting and answers 503.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from avex_serve.errors import UnavailableError
from avex_serve.service.interception import Call, around
from avex_serve.service.routes import PROBES

logger = logging.getLogger("bentoml.avex_serve")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
CUT_OFF: Final = 1  # exit code
REFUSAL: Final = UnavailableError("the service is shutting down; send the request again, to another replica")


class Drain:
    """Counts what runs and ends it in order; one for a process, shared by both transports."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the most that running requests get."""
        self.draining = False
        self._seconds = seconds
        self._running = 0
        self._idle = asyncio.Event()
        self._previous: dict[int, Any] = {}
        self._task: asyncio.Task[None] | None = None

    def on_signals(self, announce: Callable[[], None]) -> None:
        """Drain when the process is told to end; call it on the event loop.

        Args:
            announce: tells clients that watch the health that it ends; `draining` says so by then.
        """
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: Any) -> None:
            if self.draining:  # told again: the server's own way, which waits for nobody once it was told twice
                self._previous[number](number, frame)
                return
            self.draining = True
            loop.call_soon_threadsafe(begin, number)

        def begin(number: int) -> None:
            self._task = loop.create_task(self._end(number, announce))

        for number in SIGNALS:
            self._previous[number] = signal.signal(number, handle)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request as running during the block."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def _end(self, number: int, announce: Callable[[], None]) -> None:
        logger.info("shutting down: %d requests are running, and get %g s", self._running, self._seconds)
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


class DrainingHttp:
    """ASGI middleware: refuses requests while the service drains."""

    def __init__(self, app: ASGIApp, drain: Callable[[], Drain]) -> None:
        """`drain` is called with each request, for it is made after the application is built."""
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        drain = self._drain()
        if drain.draining:
            headers = {"connection": "close", "retry-after": "1"}
            refusal = JSONResponse({"error": str(REFUSAL)}, status_code=REFUSAL.http_status, headers=headers)
            await refusal(scope, receive, send)
            return
        with drain.running():
            await self._app(scope, receive, send)


class DrainingGrpc(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """gRPC interceptor: refuses calls while the service drains."""

    def __init__(self, drain: Drain) -> None:
        self._drain = drain

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler; probes pass, and streams, which are the health service's."""
        handler = await continuation(details)
        if handler is None or handler.response_streaming or details.method.lstrip("/") in PROBES:
            return handler

        def wrap(answer_call: Call) -> Call:
            async def call(message: Any, context: grpc.aio.ServicerContext) -> Any:
                if self._drain.draining:
                    await context.abort(grpc.StatusCode[REFUSAL.grpc_status], str(REFUSAL))
                with self._drain.running():
                    return await answer_call(message, context)

            return call

        return around(handler, wrap)
