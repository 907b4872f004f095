"""Server reflection over gRPC: clients such as grpcurl learn methods and messages from the service itself.

Clients ask for version 1 first, and for its predecessor if it is missing. Both have the same messages.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from avex_serve.errors import OverloadError, TooLargeError
from avex_serve.service.grpc.messages import SERVICE, descriptors, message

REFLECTION: Final = tuple(f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha"))
METHOD: Final = "ServerReflectionInfo"
MAX_STREAMS: Final = 32  # of a worker
IDLE_SECONDS: Final = 5.0  # between two questions, after which a stream ends; clients open another one
MAX_QUESTION: Final = 2**12  # bytes: names of files and symbols; the answer repeats the question

_Question = reflection_pb2.ServerReflectionRequest


class Reflection:
    """The service; used on the event loop alone."""

    def __init__(self) -> None:
        pool, names = (
            descriptor_pool.DescriptorPool(),
            [SERVICE, health_pb2.DESCRIPTOR.package + ".Health", *REFLECTION],
        )
        for file in (*descriptors(), _described(health_pb2), _described(reflection_pb2), _version_1()):
            pool.Add(file)
        self._answers = reflection.aio.ReflectionServicer(names, _Pool(pool))
        self._streams = 0

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handlers of its methods by name."""
        serializer = reflection_pb2.ServerReflectionResponse.SerializeToString
        return {METHOD: grpc.stream_stream_rpc_method_handler(self._stream, response_serializer=serializer)}

    async def _stream(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        if self._streams == MAX_STREAMS:
            raise OverloadError(f"{MAX_STREAMS} streams ask already; try again later")
        self._streams += 1
        try:
            async for answer in self._answers.ServerReflectionInfo(_questions(context), context):
                await context.write(answer)
        finally:
            self._streams -= 1


class _Pool:
    """A pool that finds the file of a method or a field too, which protobuf's doesn't."""

    def __init__(self, pool: descriptor_pool.DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """The file that describes a symbol; KeyError if there is none."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindFileContainingSymbol(symbol.rpartition(".")[0])


async def _questions(context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
    """The client's questions, until it sends no more or pauses."""
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                data = await context.read()
        except TimeoutError:
            return
        if data is grpc.aio.EOF:
            return
        if len(data) > MAX_QUESTION:
            raise TooLargeError(f"the message has {len(data)} bytes; expected at most {MAX_QUESTION} here")
        yield message(_Question, data)


def _described(module: Any) -> descriptor_pb2.FileDescriptorProto:
    described = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(described)
    return described


def _version_1() -> descriptor_pb2.FileDescriptorProto:
    """The description of version 1, which grpcio-reflection lacks."""
    text = text_format.MessageToString(_described(reflection_pb2)).replace("v1alpha", "v1")
    return text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
