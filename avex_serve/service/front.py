"""What every request passes, over HTTP and gRPC, in one order.

                                                                HTTP     gRPC
    1. It gets a route, an id, a context and a span. From here on it is recorded, and every error is answered.
    2. The service is shutting down                             503      UNAVAILABLE         except health, metrics
    3. It has no valid key                                      401      UNAUTHENTICATED     except health, the page
    4. Its time limit is not a number of seconds                400
    5. Its body is too large, by the length in its head         413
       All requests together hold too many bytes                503
    6. The queue in front of the engines is full                503      RESOURCE_EXHAUSTED  only inference
    7. The body arrives too slowly                              408      DEADLINE_EXCEEDED
       or is too large after all, or all bodies together are    413, 503 INVALID_ARGUMENT, RESOURCE_EXHAUSTED
    8. Its handler answers. The answer is late                  504      DEADLINE_EXCEEDED
       or the client has gone                                   499      CANCELLED

The first six are decided before the body is read. With CORS, preflights are answered after the first.
"""

import asyncio
import logging
import math
from bisect import bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, Final, NamedTuple, Protocol

import grpc
from anyio import to_thread
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from opentelemetry import trace
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.errors import (
    AvexServeError,
    ClientGoneError,
    DeadlineError,
    ForbiddenError,
    InputError,
    TooLargeError,
    UnsupportedError,
)
from avex_serve.inference.repository import Repository
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.request import LATE, Limits, Memory, Request, current
from avex_serve.service import bento
from avex_serve.service.arrival import Body, Messages
from avex_serve.service.credentials import Keys
from avex_serve.service.drain import Drain
from avex_serve.service.grpc.messages import SERVICE
from avex_serve.service.settings import Settings
from avex_serve.service.telemetry import REQUEST_ID, Exchange, Telemetry, request_id

logger = logging.getLogger(__name__)

METRICS: Final = "/metrics"
# Probes need no key, and are answered while the service is busy or shuts down.
HEALTH: Final = frozenset(
    bento.HEALTH
    | {f"/{HEALTH_SERVICE}/{method}" for method in ("Check", "Watch")}
    | {f"/{SERVICE}/{method}" for method in ("ServerLive", "ServerReady")}
)
QUIET: Final = HEALTH | {METRICS}
OTHER: Final = "other"  # the route of requests that no route fits: they must not make series of metrics
CONTROL: Final = "/v2/repository/"  # the start of paths whose POST needs no engine
INFER: Final = f"/{SERVICE}/ModelInfer"
STREAM: Final = f"/{SERVICE}/ModelStreamInfer"
CONTROL_BYTES: Final = 2**16  # of a request without tensors, which is parsed on the event loop

TIME_LIMIT: Final = "Request-Timeout"  # header: how many seconds the client waits
TRACE_ID: Final = "X-BentoML-Trace-ID"  # header, if BentoML is configured to send it
MAX_METADATA: Final = 128  # entries of a gRPC call
MAX_METADATA_BYTES: Final = 2**14  # their names and values
# The details of a gRPC status are a header, percent-encoded, and clients accept 8 KiB of headers: they would report
# longer ones as another error.
MAX_DETAILS: Final = 1000  # characters
MAX_DETAILS_BYTES: Final = 4000  # as sent
LAST_SECONDS: Final = 1.0  # for the last word of an answer in pieces that has become too late
EARLY_SECONDS: Final = 0.01  # by which a timer may end before its time: uvloop counts whole milliseconds


@dataclass(frozen=True)
class Front:
    """What the requests of a worker share, over both transports."""

    settings: Settings
    repository: Repository
    keys: Keys
    admission: Admission
    limits: Limits
    bodies: Memory
    answers: Memory
    telemetry: Telemetry
    drain: Drain
    alive: list[Callable[[], bool]] = field(default_factory=list)  # whether each background task still runs

    def ready(self) -> bool:
        """Whether requests are accepted: models are served, each has answered once, and no part has ended."""
        return not self.drain.draining and self.is_whole() and self.repository.serves()

    def is_whole(self) -> bool:
        """Whether all background tasks of the worker run."""
        return all(runs() for runs in self.alive)

    @contextmanager
    def record(self, exchange: Exchange, headers: Mapping[str, str]) -> Iterator[Request]:
        """Record the request that the block answers. It arrives now, and its context is current in the block."""
        request = Request(request_id(headers), self.limits, self.settings.timeout_seconds, self.bodies, self.answers)
        with self.telemetry.record(exchange, request, headers):
            try:
                yield request
            finally:
                request.release_memory()

    def admit(
        self,
        request: Request,
        path: str,
        headers: Mapping[str, str],
        *,
        infers: bool,
        body: Body | None = None,
        public: bool = False,
    ) -> None:
        """Refuse what can be refused before the body is read.

        Args:
            request: its context.
            path: or the gRPC method.
            headers: or metadata.
            infers: whether it needs an engine.
            body: of HTTP, of which nothing has been read.
            public: whether it needs no key, as the files of the page.

        Raises:
            AvexServeError: numbers 3 to 6 at the top of this module.
        """
        if path not in HEALTH and not public:
            request.key = self.keys.check(headers.get("authorization"))
        if body is not None:
            request.limit_seconds(_seconds(headers.get(TIME_LIMIT)))
            # The parser accepts 64 bits, after any number of zeros; Python refuses more than 4300 digits.
            body.check_length(int(headers.get("content-length", "").strip().lstrip("0") or 0))
        if infers:
            self.admission.check_room()

    def running(self, *, quiet: bool) -> AbstractContextManager[None]:
        """Count the request as running during the block; ShuttingDownError if the service is shutting down."""
        return nullcontext() if quiet else self.drain.running()

    async def load(self, name: str) -> None:
        """See `Repository.load`; ForbiddenError unless the setting allows it."""
        self.check_control()
        await to_thread.run_sync(self.repository.load, name)

    async def unload(self, name: str) -> None:
        """See `Repository.unload`; ForbiddenError unless the setting allows it."""
        self.check_control()
        await to_thread.run_sync(self.repository.unload, name)

    def check_control(self) -> None:
        """Raise ForbiddenError unless the setting lets clients load and unload models."""
        if self.settings.model_control != "explicit":
            raise ForbiddenError("clients can't load and unload models here; AVEX_MODEL_CONTROL=explicit allows it")


def known(error: Exception, route: str) -> AvexServeError:
    """The error that a client gets; faults of the service are logged."""
    if isinstance(error, ClientDisconnect):
        return InputError("the client closed the connection before its request was complete")
    if isinstance(error, AvexServeError):
        if error.http_status == 500:
            logger.error("%s: %s", route, error)
        return error
    logger.error("unexpected error in %s", route, exc_info=error)
    return AvexServeError("unexpected error; the server's log has the details")


# -- HTTP -----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What answers a request."""

    route: str  # the template of its path, or `OTHER`
    app: ASGIApp
    public: bool = False  # whether it needs no key


class Application(Protocol):
    """The application behind the front of HTTP."""

    def find(self, scope: Scope) -> Found:
        """What answers the request."""
        ...


class HttpFront:
    """ASGI middleware: the front of HTTP."""

    def __init__(
        self,
        app: ASGIApp,
        front: Callable[[], Front],
        application: Callable[[Callable[[], Front], ASGIApp], Application],
    ) -> None:
        """BentoML makes it before the service starts.

        Args:
            app: BentoML's application.
            front: returns the worker's front.
            application: makes ours from `front` and BentoML's application.
        """
        self._app = app
        self._front = front
        self._application = application(front, app)
        cors, self._sends_trace_id = bento.http_configuration()
        self._cors = None if cors is None else CORSMiddleware(app, **cors)

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
        front, headers = self._front(), Headers(scope=scope)
        found = self._application.find(scope)
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
        self, front: Front, found: Found, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        settings, path = front.settings, scope["path"]
        body = Body(request, receive, settings.max_body_bytes, settings.read_timeout_seconds)
        infers = scope["method"] == "POST" and not path.startswith(CONTROL)
        front.admit(request, path, Headers(scope=scope), infers=infers, body=body, public=found.public)
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


# -- gRPC -----------------------------------------------------------------------------------------------------------

Call = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]  # (message or stream of messages, context) → answer


class GrpcFront(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """gRPC interceptor: the front of gRPC, for methods whose message arrives as bytes.

    gRPC cancels a call itself when its client leaves or its deadline passes.
    """

    def __init__(self, front: Front) -> None:
        self._front = front
        settings = front.settings
        # The size of a message is known only after it has arrived. So up to as many may be slow as fit if all are of
        # the largest size. Those of other methods are small and arrive in one packet with the call.
        slow = max(1, int(front.bodies.total // settings.max_body_bytes))
        self._work = Messages(settings.read_timeout_seconds, slow)
        self._rest = Messages(settings.read_timeout_seconds, 1)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The handler behind the front.

        It takes a stream of one message, because gRPC receives a single message before it calls the handler.
        """
        handler = await continuation(details)
        # Metadata is text, except that of names that end in -bin. The first value of a name counts.
        metadata = details.invocation_metadata or ()
        pairs = [(key, text) for key, text in metadata if isinstance(text, str)]
        # gRPC applies its limit on metadata only to clients that have confirmed it.
        fits = len(metadata) <= MAX_METADATA and sum(map(len, chain(*metadata))) <= MAX_METADATA_BYTES
        headers = dict(reversed(pairs)) if fits else None
        call = (self._streaming if details.method == STREAM else self._behind)(handler, details.method, headers)
        if handler is None:
            return grpc.stream_unary_rpc_method_handler(call)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)

    def _behind(self, handler: Any, method: str, headers: Mapping[str, str] | None) -> Call:
        route = method.removeprefix("/")
        exchange = Exchange("grpc", route, "", method, quiet=method in QUIET)
        # Those of the health service may last for days, and are not recorded.
        is_stream = handler is not None and handler.response_streaming and not handler.request_streaming

        async def call(messages: Any, context: grpc.aio.ServicerContext) -> Any:
            with nullcontext(Request()) if is_stream else self._front.record(exchange, headers or {}) as request:
                try:
                    if not is_stream:
                        await context.send_initial_metadata(((REQUEST_ID, request.id),))
                    with self._front.running(quiet=exchange.quiet):
                        answer = await self._answer(handler, method, headers, request, messages, context)
                    exchange.status = (context.code() or grpc.StatusCode.OK).name
                    return answer
                except (asyncio.CancelledError, grpc.aio.BaseError):  # gRPC has ended the call
                    exchange.status = grpc.StatusCode.CANCELLED.name
                    raise
                except Exception as error:  # noqa: BLE001 - logged if it is unexpected
                    code, message = grpc_refusal(error, route)
                exchange.status = code.name
                # gRPC keeps the error that ends a call until garbage is collected. Raised outside of the except
                # clause it doesn't lead to the one before, whose traceback holds the message: up to megabytes.
                await context.abort(code, message)

        return call

    async def _answer(
        self,
        handler: Any,
        method: str,
        headers: Mapping[str, str] | None,
        request: Request,
        messages: Any,
        context: grpc.aio.ServicerContext,
    ) -> Any:
        self._admit(request, method, headers, context, infers=method == INFER)
        if handler is None:
            raise UnsupportedError(
                f"there is no such method here; expected one that reflection lists, e.g. of {SERVICE}"
            )
        if handler.request_streaming:
            answer = handler.stream_stream if handler.response_streaming else handler.stream_unary
            return await _in_time(answer(messages, context), request.remaining)
        data = await (self._work if method == INFER else self._rest).next(context.read)
        if method != INFER and len(data) > CONTROL_BYTES:
            raise TooLargeError(f"the message has {len(data)} bytes; expected at most {CONTROL_BYTES} here")
        request.extend_body(len(data))
        answer = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return await _in_time(answer(data, context), None if method in HEALTH else request.remaining)

    def _admit(
        self,
        request: Request,
        method: str,
        headers: Mapping[str, str] | None,
        context: grpc.aio.ServicerContext,
        *,
        infers: bool,
    ) -> None:
        """Refuse what can be refused before its message is read."""
        if headers is None:
            raise TooLargeError(
                f"the metadata is too large; expected at most {MAX_METADATA} entries and {MAX_METADATA_BYTES} bytes"
            )
        request.limit_seconds(context.time_remaining())
        self._front.admit(request, method, headers, infers=infers)

    def _streaming(self, handler: Any, method: str, headers: Mapping[str, str] | None) -> Call:
        """The call of a stream. Each of its messages is a request of its own, and they are answered in turn."""
        route = method.removeprefix("/")

        async def call(_: Any, context: grpc.aio.ServicerContext) -> None:
            identity = {**(headers or {}), REQUEST_ID: request_id(headers or {})}
            await context.send_initial_metadata(((REQUEST_ID, identity[REQUEST_ID]),))
            data: bytes | None = None
            while True:
                refusal = None
                exchange = Exchange("grpc", route, "", method, quiet=False)
                with self._front.record(exchange, identity) as request:
                    try:
                        with self._front.running(quiet=False):
                            # Once a message has arrived, the handler answers that there is no room for it.
                            self._admit(request, method, headers, context, infers=data is None)
                            if data is None:  # the first one arrives with the call
                                data = await self._work.read(context.read)
                            if data is not None:
                                request.extend_body(len(data))
                                answer = handler.stream_stream(data, context)
                                exchange.status = await _in_time(answer, request.remaining)
                        exchange.status = exchange.status or grpc.StatusCode.OK.name
                    except (asyncio.CancelledError, grpc.aio.BaseError):
                        exchange.status = grpc.StatusCode.CANCELLED.name
                        raise
                    except Exception as error:  # noqa: BLE001 - logged if it is unexpected
                        refusal = grpc_refusal(error, route)
                        exchange.status = refusal[0].name
                if refusal is None and data is not None:
                    data = None  # frees it while the next one is awaited
                    try:
                        data = await self._work.read(context.read)
                    except AvexServeError as error:
                        refusal = grpc_refusal(error, route)
                if refusal is not None:
                    await context.abort(*refusal)
                if data is None:
                    return

        return call


async def deliver(
    pieces: AsyncGenerator[list[bytes], None], send: Callable[[list[bytes]], Awaitable[None]], route: str
) -> AvexServeError | None:
    """Send the pieces of an answer while they are made; returns the error if only a part of them could be.

    Errors of the work, and a deadline that passes, are returned. That the client has gone, or that the service ends,
    is raised.
    """
    async with aclosing(pieces):
        try:
            async for some in pieces:
                await send(some)
        except asyncio.CancelledError:
            if current().remaining > EARLY_SECONDS:
                raise
            return DeadlineError(LATE)
        except grpc.aio.BaseError:
            raise
        except Exception as error:  # noqa: BLE001 - `known` logs what is unexpected
            return known(error, route)
    return None


async def _in_time(answer: Awaitable[Any], seconds: float | None) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise DeadlineError(LATE) from None


def grpc_refusal(error: Exception, route: str) -> tuple[grpc.StatusCode, str]:
    """Status and details of a call that failed."""
    error = known(error, route)
    return grpc.StatusCode[error.grpc_status], _fitting(str(error)[:MAX_DETAILS])


def _fitting(details: str) -> str:
    """The part of the details that a client accepts; what isn't printable ASCII is sent as %XX for each byte."""
    # A surrogate can't be sent.
    text = details.encode("utf-8", "replace").decode()
    sizes = accumulate(1 if " " <= each <= "~" and each != "%" else 3 * len(each.encode()) for each in text)
    return text[: bisect_right(list(sizes), MAX_DETAILS_BYTES)]
