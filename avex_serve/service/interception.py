"""What gRPC methods and interceptors share."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

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
