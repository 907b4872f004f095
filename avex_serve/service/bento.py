"""The inside of BentoML and uvicorn: no other module imports it.

BentoML has no public way to what is here. Written for BentoML 1.4 and uvicorn 0.54.
"""

import asyncio
import json
import logging
import re
import shutil
import tempfile
from functools import cached_property
from typing import Any, Final, NamedTuple

import bentoml
import click  # BentoML's command is made with it
import h11  # uvicorn reads HTTP with it
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from bentoml._internal.server.http import traffic
from bentoml._internal.utils import circus
from opentelemetry.sdk.trace import TracerProvider
from starlette.types import ASGIApp
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from avex_serve.errors import InputError

# -- HTTP connections -----------------------------------------------------------------------------------------------

MAX_HEAD_BYTES: Final = 2**16
MAX_HEADERS: Final = 256
MAX_FAULT: Final = 100  # characters of what h11 says of bytes that it can't parse

_LINE_BYTES: Final = len(b": \r\n")  # of a header, besides its name and value
_ORIGIN: Final = re.compile(rb"https?://[^/?]*", re.IGNORECASE)


class BoundedConnection(h11.Connection):
    """h11's parser, with bounds on a head that arrives at once, and with one way to tell where a body ends."""

    fault: h11.RemoteProtocolError | None = None  # why the client's bytes can't be parsed

    def next_event(self) -> Any:
        """The next part of a request, see h11; RemoteProtocolError for what is refused."""
        try:
            event = super().next_event()
            return _checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise


def _checked(request: h11.Request) -> h11.Request:
    size = len(request.target) + sum(len(name) + len(value) + _LINE_BYTES for name, value in request.headers)
    if size > MAX_HEAD_BYTES or len(request.headers) > MAX_HEADERS:
        raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
        # A proxy that reads the other one would find another request in the body.
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if (origin := _ORIGIN.match(request.target)) is None:
        return request
    target = b"/" + request.target[origin.end() :].removeprefix(b"/")  # as proxies are asked, RFC 9112, 3.2.2
    return h11.Request(
        method=request.method, headers=request.headers, target=target, http_version=request.http_version
    )


class BoundedFlow(FlowControl):
    """uvicorn's flow control, which reads nothing more while a request waits for the answer to the one before it."""

    def __init__(self, transport: asyncio.Transport, connection: h11.Connection) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        """Read again, unless a request waits."""
        if self._connection.their_state is not h11.DONE or not self._connection.trailing_data[0]:
            super().resume_reading()


class BoundedHttp(H11Protocol):
    """uvicorn's HTTP protocol on h11, which reads one request after another, with bounds on each connection.

    A head has at most `MAX_HEAD_BYTES` and `MAX_HEADERS`. What follows the request in work stays unread, except for
    what the last read returned. An upgrade is ignored: the request is answered as any other (RFC 9110, 7.8). Bytes
    that are no request are answered 400, and too large a head 431, both as JSON; then the connection is closed.
    """

    conn: BoundedConnection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = BoundedConnection(h11.SERVER, MAX_HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection."""
        super().connection_made(transport)
        self.flow = BoundedFlow(transport, self.conn)

    def data_received(self, data: bytes) -> None:
        """Parse data from the client, unless its connection ends with the request in work."""
        if not self.transport.is_closing() and self.conn.their_state is not h11.MUST_CLOSE:
            super().data_received(data)

    def on_response_complete(self) -> None:
        """Turn to the next request."""
        super().on_response_complete()
        self.flow.resume_reading()  # its head may be incomplete

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refuses, if no part of another answer has been sent, and close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application can't answer any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_refusal(self.conn.fault))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False


def _refusal(fault: h11.RemoteProtocolError | None) -> bytes:
    if fault is not None and fault.error_status_hint == 431:
        status = "431 Request Header Fields Too Large"
        error = f"the request's head is too large; expected at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
    else:
        status, error = "400 Bad Request", f"this is no valid HTTP request: {str(fault)[:MAX_FAULT]}"
    body = json.dumps({"error": error})
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return f"HTTP/1.1 {status}\r\n{head}{body}".encode()


def bound_connections() -> None:
    """Make the servers of this process use `BoundedHttp`: BentoML lets uvicorn choose its protocol."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttp.__name__}"


def keep_no_timers() -> None:
    """Keep BentoML from limiting the time of each HTTP request, which `front` does.

    BentoML has no setting for this. Its timers hold the memory of requests that have long been answered.
    """
    traffic.TimeoutMiddleware = _untimed  # type: ignore[assignment,misc]


def _untimed(app: ASGIApp, timeout: float) -> ASGIApp:
    return app


# -- configuration --------------------------------------------------------------------------------------------------

PROXY_PORT: Final = 8000  # BentoML's default


def workers(service: str) -> int:
    """How many processes serve, as BentoML is configured; 1 outside of its server."""
    if bentoml.server_context.worker_index is None:
        return 1
    # BentoML gives a worker its own number, but not the total.
    configured = (BentoMLContainer.config.services.get().get(service) or {}).get("workers") or 1
    return int(system_resources()["cpu"]) or 1 if configured == "cpu_count" else int(configured)


def http_address() -> tuple[str, int]:
    """Host and port of HTTP, by the options of the running `bentoml serve` or else by its configuration."""
    command = click.get_current_context(silent=True)
    options = {} if command is None else command.params
    http = BentoMLContainer.http
    return options.get("host") or http.host.get(), options.get("port") or http.port.get()


def share_log(name: str) -> list[logging.Handler]:
    """Make the loggers below `name` log as BentoML's do, and return the handlers of all lines of the process."""
    theirs, ours = logging.getLogger("bentoml"), logging.getLogger(name)
    ours.handlers, ours.level, ours.propagate = theirs.handlers, theirs.level, False
    loggers = [logging.getLogger(), theirs, logging.getLogger("uvicorn.error"), logging.getLogger("circus")]
    return list({handler: None for logger in loggers for handler in logger.handlers})


class HttpConfiguration(NamedTuple):
    """The part of BentoML's section `http` that BentoML applies to its own routes alone."""

    cors: dict[str, Any] | None  # arguments of Starlette's CORSMiddleware; None: it is off
    sends_trace_id: bool


def http_configuration() -> HttpConfiguration:
    """The section `http` of BentoML's configuration, for all routes.

    Raises:
        InputError: a setting that would have no effect.
    """
    http = BentoMLContainer.http.get()
    if http["proxy_port"] != PROXY_PORT:
        raise InputError(
            f"BENTOML_CONFIG sets http.proxy_port to {http['proxy_port']}, which is for services that start a "
            "command of their own; remove it, and set http.port or --port instead"
        )
    cors = {name.removeprefix("access_control_"): setting for name, setting in http["cors"].items()}
    if not cors.pop("enabled"):
        return HttpConfiguration(None, http["response"]["trace_id"])
    if cors["allow_origins"] is None:
        raise InputError(
            "BENTOML_CONFIG enables http.cors without an origin; set access_control_allow_origins to those of your "
            "pages, to [] with access_control_allow_origin_regex, or to ['*']"
        )
    options = {name: _listed(name, setting) for name, setting in cors.items() if setting is not None}
    return HttpConfiguration(options, http["response"]["trace_id"])


def _listed(name: str, setting: Any) -> Any:
    """A setting as CORSMiddleware expects it: BentoML accepts a text for a list of one."""
    return [setting] if isinstance(setting, str) and name != "allow_origin_regex" else setting


class _Supervisor(circus.Arbiter):
    """BentoML's supervisor, controlled by sockets in a folder that no other user can open.

    BentoML makes it listen on two TCP ports of loopback. Whoever can connect there, other users of the machine or
    containers of the same pod, can make it run any command.
    """

    def __init__(self, watchers: list[Any], **options: Any) -> None:
        folder = tempfile.mkdtemp(prefix="avex-serve-")  # only its owner can open it
        options["endpoint"], options["pubsub_endpoint"] = f"ipc://{folder}/control", f"ipc://{folder}/events"
        super().__init__(watchers, **options)
        self.exit_stack.callback(shutil.rmtree, folder, ignore_errors=True)


def close_control_port() -> None:
    """Make `_Supervisor` supervise the workers that this process starts."""
    circus.Arbiter = _Supervisor  # type: ignore[misc]


# -- spans ----------------------------------------------------------------------------------------------------------


def tracer_provider() -> TracerProvider | None:
    """What sends the spans that BentoML is configured to send; None: it sends none."""
    return BentoMLContainer.tracer_provider.get() if _sends_spans() else None


def skip_unsent_spans() -> None:
    """Keep BentoML from making a span for each HTTP request when no exporter would send it."""
    BentoMLContainer.tracing_excluded_urls.set(_Untraced())


class _Untraced:
    """The URLs without spans. BentoML reads its configuration after the start, but before the first request."""

    def url_disabled(self, url: str) -> bool:
        return self._configured is None or self._configured.url_disabled(url)

    @cached_property
    def _configured(self) -> Any:
        if not _sends_spans():
            return None
        BentoMLContainer.tracing_excluded_urls.reset()
        return BentoMLContainer.tracing_excluded_urls.get()


def _sends_spans() -> bool:
    return BentoMLContainer.config.tracing.exporter_type.get() is not None
