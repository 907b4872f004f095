"""The gate over gRPC: an interceptor in front of every method.

A call without a key or without room is refused before its message is received. gRPC cancels a call itself when its
client leaves or its deadline passes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import grpc
from grpc_health.v1 import health

from avex_serve.errors import AvexServeError, DeadlineError, InputError, SlowRequestError
from avex_serve.runtime.admission import Ticket, hold_ticket
from avex_serve.service.gate import Gate
from avex_serve.service.grpc_messages import SERVICE
from avex_serve.service.interception import Call

# Asked by those who watch over the service, without a key, also while it is busy.
HEALTH: Final = frozenset(
    {f"/{health.SERVICE_NAME}/{method}" for method in ("Check", "Watch")}
    | {f"/{SERVICE}/{method}" for method in ("ServerLive", "ServerReady")}
)
WORK: Final = f"/{SERVICE}/ModelInfer"  # what the admission limit is for


class GrpcGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets in what may come in; for methods whose one request comes as bytes."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        # How large a message is shows only once it has come whole: so many may come at once. Others wait in their
        # connections, those of the health methods for one another alone.
        at_once = max(1, gate.admission.bodies.total // gate.body_bytes)
        self._coming = {True: asyncio.Semaphore(at_once), False: asyncio.Semaphore(at_once)}

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
            call = self._behind(handler.unary_stream, method in HEALTH)
            return grpc.stream_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        call = self._behind(handler.unary_unary, method in HEALTH)
        return grpc.stream_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)

    def _behind(self, method: Call, is_health: bool) -> Call:
        async def call(_: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await self._answer(method, context, is_health)
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

    async def _answer(self, method: Call, context: grpc.aio.ServicerContext, is_health: bool) -> Any:
        deadline = self._gate.deadline(context.time_remaining())
        data = await self._receive(context, is_health)
        bodies = self._gate.admission.bodies
        bodies.take(len(data))
        try:
            hold_ticket(Ticket(self._gate.admission, deadline))
            async with asyncio.timeout(None if is_health else deadline.remaining):
                return await method(data, context)
        except TimeoutError:
            raise DeadlineError("the answer was not ready in time; send less, or allow more time") from None
        finally:
            bodies.give_back(len(data))

    async def _receive(self, context: grpc.aio.ServicerContext, is_health: bool) -> bytes:
        try:
            async with asyncio.timeout(self._gate.read_seconds), self._coming[is_health]:
                data: Any = await context.read()
        except TimeoutError:
            raise SlowRequestError(f"the message didn't come within {self._gate.read_seconds:g} s") from None
        if data is grpc.aio.EOF:
            raise InputError("the call ended without a message; send one")
        message: bytes = data
        return message


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
