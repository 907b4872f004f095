"""The gate over gRPC: an interceptor in front of every method.

A call without a key or without room is refused before its message is received. gRPC cancels a call itself when its
client leaves or its deadline passes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
from grpc_health.v1 import health

from avex_serve.errors import (
    AvexServeError,
    DeadlineError,
    InputError,
    OverloadError,
    SlowRequestError,
    TooLargeError,
)
from avex_serve.scheduling.request import current
from avex_serve.service.gate import CONTROL_BYTES, Gate
from avex_serve.service.grpc_messages import SERVICE
from avex_serve.service.interception import Call

# Asked by those who watch over the service, without a key, also while it is busy.
HEALTH: Final = frozenset(
    {f"/{health.SERVICE_NAME}/{method}" for method in ("Check", "Watch")}
    | {f"/{SERVICE}/{method}" for method in ("ServerLive", "ServerReady")}
)
WORK: Final = f"/{SERVICE}/ModelInfer"  # what the admission limit is for
PROMPT_SECONDS: Final = 1.0  # in which the message of a call comes where client and network are well


class GrpcGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets in what may come in; for methods whose one request comes as bytes."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        # How large a message is shows only once it has come whole: as many as may be held if all are of the largest
        # size. Those of other methods are small and come in one packet with the call.
        slow = max(1, int(gate.bodies.total // gate.body_bytes))
        self._work = _Arrivals(gate.read_seconds, slow)
        self._rest = _Arrivals(gate.read_seconds, 1)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The handler behind the gate."""
        method: str = handler_call_details.method
        try:
            if method not in HEALTH:
                self._gate.keys.check(_authorization(handler_call_details.invocation_metadata))
            if method == WORK:
                self._gate.admission.check_room()
        except AvexServeError as error:
            return grpc.stream_unary_rpc_method_handler(_refuse(error))
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        # As a stream, since gRPC receives a single message before it calls the handler.
        if handler.response_streaming:
            call = self._behind(handler.unary_stream, method)
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        call = self._behind(handler.unary_unary, method)
        return grpc.stream_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)

    def _behind(self, answer: Call, method: str) -> Call:
        async def call(_: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await self._answer(answer, method, context)
            except grpc.aio.AbortError as abort:
                refusal = abort
            except AvexServeError as error:
                refusal = error
            # gRPC keeps the error that ends a call, whose traceback and context would keep the message: megabytes
            # for each refusal, until garbage is collected. Hence without them, and outside of the except clauses.
            refusal.__traceback__ = refusal.__context__ = None
            if isinstance(refusal, AvexServeError):
                await _abort(context, refusal)
            raise refusal

        return call

    async def _answer(self, answer: Call, method: str, context: grpc.aio.ServicerContext) -> Any:
        request = current()
        request.limit_seconds(context.time_remaining())
        data = await self._receive(method, context)
        if method != WORK and len(data) > CONTROL_BYTES:
            raise TooLargeError(f"the message has {len(data)} bytes; at most {CONTROL_BYTES} are taken here")
        request.extend_body(len(data))
        try:
            async with asyncio.timeout(None if method in HEALTH else request.remaining):
                return await answer(data, context)
        except TimeoutError:
            raise DeadlineError("the answer was not ready in time; send less, or allow more time") from None

    async def _receive(self, method: str, context: grpc.aio.ServicerContext) -> bytes:
        data = await (self._work if method == WORK else self._rest).wait_for(context.read)
        if data is grpc.aio.EOF:
            raise InputError("the call ended without a message; send one")
        message: bytes = data
        return message


class _Arrivals:
    """Messages that are coming; used on the event loop alone.

    A call whose client sends nothing looks like one whose message is half there. So each may come for a moment, in
    which the network itself bounds how much there can be of them, and only so many for longer. None waits for
    another, and those that come at once find their way however many idle.
    """

    def __init__(self, seconds: float, slow: int) -> None:
        """`slow` messages may take longer than a moment at once, each for so many seconds at most."""
        self._seconds = seconds
        self._free = slow

    async def wait_for(self, read: Callable[[], Awaitable[Any]]) -> Any:
        """What is read.

        Raises:
            OverloadError: it doesn't come at once, and too many others do so already.
            SlowRequestError: it doesn't come in time.
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
                return await read()
        except TimeoutError:
            if refused:
                raise OverloadError(
                    "too many messages are slow to come; try again later, or send it faster"
                ) from None
            raise SlowRequestError(f"the message didn't come within {self._seconds:g} s") from None
        finally:
            moment.cancel()
            self._free += has_place


def _authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            return value
    return None


def _refuse(error: AvexServeError) -> Call:
    async def call(_: Any, context: grpc.aio.ServicerContext) -> None:
        await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext, error: AvexServeError) -> None:
    await context.abort(grpc.StatusCode[error.grpc_status], str(error))
