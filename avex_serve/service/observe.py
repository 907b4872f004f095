"""What is noted of every request, over HTTP and gRPC alike: id, line in the log, metrics and span."""

import asyncio
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Literal

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.scheduling.request import Request as Context
from avex_serve.scheduling.request import Timings, answering
from avex_serve.service.interception import Call, around
from avex_serve.service.metrics import Metrics
from avex_serve.service.routes import OTHER, PROBES, route_of
from avex_serve.service.tracing import Tracing

logger = logging.getLogger("bentoml.avex_serve.access")

REQUEST_ID: Final = "x-request-id"
# What is taken over from a client, since it is echoed in a header and written to logs.
_ACCEPTED_ID: Final = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
MAX_PATH: Final = 200  # characters of a path that the log repeats

_ids = random.Random()  # seeded by the kernel once; uuid4 would ask it for each request


@dataclass
class Request:
    """A request that is being answered."""

    transport: Literal["http", "grpc"]
    route: str  # template of the path, or the full name of the method
    method: str  # of HTTP; empty for gRPC
    path: str
    id: str
    work: Timings
    status: str = ""  # "200", "NOT_FOUND"; empty until it is answered


class Observer:
    """Notes requests; one for a process, shared by both transports."""

    def __init__(self, metrics: Metrics, tracing: Tracing, begin: Callable[[str], Context]) -> None:
        """`begin` makes the context of a request with that id, which arrives now."""
        self._metrics = metrics
        self._tracing = tracing
        self._begin = begin

    @contextmanager
    def request(
        self, transport: Literal["http", "grpc"], route: str, path: str, headers: Mapping[str, str], method: str = ""
    ) -> Iterator[Request]:
        """Note the request that the block answers; the block sets its status.

        Args:
            transport: how it came.
            route: its template, one of a bounded set.
            path: as the client wrote it.
            headers: by lower-case name; metadata for gRPC.
            method: of HTTP.
        """
        given = headers.get(REQUEST_ID, "")
        identity = given if _ACCEPTED_ID.fullmatch(given) else f"{_ids.getrandbits(128):032x}"
        start = perf_counter()
        context = self._begin(identity)
        with (
            answering(context),
            self._tracing.span(transport, route, method, headers) as span,
            self._metrics.in_progress(transport),
        ):
            work = context.timings
            request = Request(transport, route, method, path[:MAX_PATH], identity, work)
            try:
                yield request
            finally:
                context.release_memory()
                seconds = perf_counter() - start
                self._metrics.observe(transport, route, request.status, seconds, work)
                span.end(request.status, identity, work)
                _log(request, seconds)


def _log(request: Request, seconds: float) -> None:
    if request.route in PROBES and request.status in ("200", "OK"):
        return  # probes and scrapes come every few seconds
    fields: dict[str, Any] = {
        "transport": request.transport,
        "method": request.method,
        "route": request.route,
        "path": request.path,
        "status": request.status,
        "duration_ms": round(1000 * seconds, 3),
        "model": ",".join(sorted(set(request.work.models))),
        "batches": len(request.work.batches),
        **{f"{stage}_ms": round(1000 * part, 3) for stage, part in request.work.totals().items()},
    }
    fields = {name: value for name, value in fields.items() if value not in ("", 0)}
    asked = f"{request.method} {request.path}".lstrip()
    logger.info(
        "%s %s %s %.1f ms", request.transport, asked, request.status, 1000 * seconds, extra={"fields": fields}
    )


class ObservedHttp:
    """ASGI middleware: the outermost of ours, so that it sees what the others refuse."""

    def __init__(self, app: ASGIApp, observer: Callable[[], Observer]) -> None:
        """`observer` is called with each request, for it is made after the application is built."""
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # Percent-encoded, as it came: no character in it can forge a line of the log.
        path = scope.get("raw_path", b"").decode("ascii", "replace")
        with self._observer().request("http", route_of(scope["path"]), path, headers, scope["method"]) as request:

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    request.status = str(message["status"])
                    message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), request.id.encode())]
                await send(message)

            try:
                await self._app(scope, receive, send_with_id)
            except asyncio.CancelledError:
                request.status = request.status or "504"  # BentoML's time limit
                raise
            except Exception:
                request.status = request.status or "500"
                raise


class ObservedGrpc(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """gRPC interceptor: the first, so that it sees what the others refuse."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler of a unary call; streams of the health service pass."""
        # Metadata is text, but for names that end in -bin.
        headers = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        handler = await continuation(details)
        if handler is None:
            with self._observer.request("grpc", OTHER, details.method, headers) as request:
                request.status = grpc.StatusCode.UNIMPLEMENTED.name
            return None
        if handler.response_streaming:
            return handler
        route = details.method.lstrip("/")

        def wrap(answer_call: Call) -> Call:
            async def call(message: Any, context: grpc.aio.ServicerContext) -> Any:
                with self._observer.request("grpc", route, details.method, headers) as request:
                    await context.send_initial_metadata(((REQUEST_ID, request.id),))
                    try:
                        answer = await answer_call(message, context)
                    except asyncio.CancelledError:
                        request.status = grpc.StatusCode.CANCELLED.name
                        raise
                    except BaseException:  # abort raises one of its own
                        request.status = (context.code() or grpc.StatusCode.UNKNOWN).name
                        raise
                    request.status = (context.code() or grpc.StatusCode.OK).name
                    return answer

            return call

        return around(handler, wrap)
