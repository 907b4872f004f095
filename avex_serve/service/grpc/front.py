"""The front of gRPC: what every call passes before its handler; see `avex_serve.service.front`."""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any, Final

import grpc

from avex_serve.errors import (
    AvexServeError,
    DeadlineError,
    InputError,
    OverloadError,
    SlowRequestError,
    TooLargeError,
    UnsupportedError,
)
from avex_serve.scheduling.request import LATE, Request
from avex_serve.service.front import CONTROL_BYTES, HEALTH, QUIET, Front, known
from avex_serve.service.grpc.messages import SERVICE
from avex_serve.service.telemetry import REQUEST_ID, Exchange, request_id

INFER: Final = f"/{SERVICE}/ModelInfer"
STREAM: Final = f"/{SERVICE}/ModelStreamInfer"
MAX_METADATA: Final = 128  # entries of a call
MAX_METADATA_BYTES: Final = 2**14  # their names and values
PROMPT_SECONDS: Final = 1.0  # within which a message arrives if client and network are well
# The details of a status are a header, percent-encoded, and clients accept 8 KiB of headers: they would report
# longer ones as another error.
MAX_DETAILS: Final = 1000  # characters
MAX_DETAILS_BYTES: Final = 4000  # as sent

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
        self._front.check_key(request, method, headers)
        if infers:
            self._front.admission.check_room()

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
