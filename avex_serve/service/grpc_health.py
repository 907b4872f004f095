"""The standard health service over gRPC: what `/readyz` says, for those who ask and those who watch.

It asks at each call, since models come and go: gRPC's own servicer only knows what it was told. It knows no single
models, for it is answered without a key: whoever has one asks `ModelReady`.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2

from avex_serve.service.grpc_messages import SERVICE, decoded

SERVICES: Final = ("", SERVICE)  # "" is the server as a whole
LOOK_SECONDS: Final = 1.0  # between two looks for those who watch
MAX_WATCHERS: Final = 256  # of a worker: they need no key

_Answer = health_pb2.HealthCheckResponse


class Health:
    """The service; used on the event loop alone."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        """`ready` says whether the service takes requests."""
        self._ready = ready
        self._wake = asyncio.Event()
        self._watchers = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the server answers calls by."""
        serializer = _Answer.SerializeToString
        return grpc.method_handlers_generic_handler(
            health.SERVICE_NAME,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=serializer),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=serializer),
            },
        )

    def look(self) -> None:
        """Tell those who watch now what has changed."""
        self._wake.set()  # wakes all who wait
        self._wake.clear()

    async def _check(self, data: bytes, context: grpc.aio.ServicerContext) -> Any:
        request: Any = decoded(health_pb2.HealthCheckRequest, data)
        if request.service not in SERVICES:
            names = " and ".join(map(repr, SERVICES))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:80]!r}; known: {names}")
        return _Answer(status=self._status(request.service))

    async def _watch(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        request: Any = decoded(health_pb2.HealthCheckRequest, data)
        if self._watchers == MAX_WATCHERS:
            reason = f"{MAX_WATCHERS} streams watch already; call Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        self._watchers += 1
        try:
            await self._tell(request, context)
        finally:
            self._watchers -= 1

    async def _tell(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        told = None
        while True:
            if (status := self._status(request.service)) != told:
                await context.write(_Answer(status=status))
                told = status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    def _status(self, service: str) -> int:
        if service not in SERVICES:
            return int(_Answer.SERVICE_UNKNOWN)
        return int(_Answer.SERVING if self._ready() else _Answer.NOT_SERVING)
