"""The standard health service over gRPC: what `/readyz` reports, for single checks and for watchers.

It checks at each call, since models come and go, while gRPC's own servicer would have to be notified. It knows no
single models, because it needs no key: clients with a key ask `ModelReady`.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from avex_serve.errors import NotFoundError, OverloadError
from avex_serve.service.grpc.messages import SERVICE, message

SERVICES: Final = ("", SERVICE)  # "" is the server as a whole
CHECK_SECONDS: Final = 1.0  # between two checks for watchers
MAX_WATCHERS: Final = 256  # of a worker: they need no key

_Answer = health_pb2.HealthCheckResponse


class Health:
    """The service; used only on the event loop."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        """`ready` says whether the service accepts requests."""
        self._ready = ready
        self._wake = asyncio.Event()
        self._watchers = 0

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handlers of its methods by name."""
        serializer = _Answer.SerializeToString
        return {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=serializer),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=serializer),
        }

    def announce(self) -> None:
        """Send watchers what has changed."""
        self._wake.set()  # wakes all that wait
        self._wake.clear()

    async def _check(self, data: bytes, _: grpc.aio.ServicerContext) -> Any:
        service = _service(data)
        if service not in SERVICES:
            names = " and ".join(map(repr, SERVICES))
            raise NotFoundError(f"no service {service[:80]!r}; known: {names}")
        return _Answer(status=self._status(service))

    async def _watch(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        service = _service(data)
        if self._watchers == MAX_WATCHERS:
            raise OverloadError(f"{MAX_WATCHERS} streams watch already; call Check instead")
        self._watchers += 1
        try:
            await self._send_changes(service, context)
        finally:
            self._watchers -= 1

    async def _send_changes(self, service: str, context: grpc.aio.ServicerContext) -> None:
        sent = None
        while True:
            if (status := self._status(service)) != sent:
                await context.write(_Answer(status=status))
                sent = status
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._wake.wait()

    def _status(self, service: str) -> int:
        if service not in SERVICES:
            return int(_Answer.SERVICE_UNKNOWN)
        return int(_Answer.SERVING if self._ready() else _Answer.NOT_SERVING)


def _service(data: bytes) -> str:
    request: Any = message(health_pb2.HealthCheckRequest, data)
    return str(request.service)
