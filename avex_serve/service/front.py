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

Here is what both transports share. Their own halves are `avex_serve.service.http.front` and
`avex_serve.service.grpc.front`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final

import grpc
from anyio import to_thread
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from starlette.requests import ClientDisconnect

from avex_serve.errors import AvexServeError, DeadlineError, ForbiddenError, InputError
from avex_serve.inference.repository import Repository
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.request import LATE, Limits, Memory, Request, current
from avex_serve.service import bento
from avex_serve.service.credentials import Keys
from avex_serve.service.drain import Drain
from avex_serve.service.grpc.messages import SERVICE
from avex_serve.service.settings import Settings
from avex_serve.service.telemetry import Exchange, Telemetry, request_id

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
CONTROL_BYTES: Final = 2**16  # of a request without tensors, which is parsed on the event loop
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

    def check_key(self, request: Request, path: str, headers: Mapping[str, str]) -> None:
        """Note the name of the client's key; AuthenticationError if it has none that is valid.

        Args:
            request: its context.
            path: or the gRPC method.
            headers: or metadata.
        """
        if path not in HEALTH:
            request.key = self.keys.check(headers.get("authorization"))

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
