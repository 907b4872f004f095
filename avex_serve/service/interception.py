"""What gRPC methods and interceptors share."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

# (request, or its stream; context) → answer
Call = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


def around(handler: Any, wrap: Callable[[Call], Call]) -> Any:
    """The handler of a call with one answer, wrapped; its request may come as a stream."""
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(
            wrap(handler.stream_unary), handler.request_deserializer, handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(
        wrap(handler.unary_unary), handler.request_deserializer, handler.response_serializer
    )


def decoded(request_class: type[Message], method: Call) -> Call:
    """The method for undecoded requests: gRPC itself logs a traceback where one is no message."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            request = request_class.FromString(data)
        except DecodeError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {request_class.DESCRIPTOR.name}"
            )
        return await method(request, context)

    return call
