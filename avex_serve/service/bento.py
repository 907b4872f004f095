"""The inside of BentoML and uvicorn: no other module imports it.

BentoML has no public way to what is here. Written for BentoML 1.4 and uvicorn 0.54.
"""

import asyncio
import json
import logging
import math
import os
import selectors
import shutil
import signal
import socket
import ssl
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from contextvars import Context, copy_context
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, get_type_hints

import bentoml
import click  # BentoML's command is made with it
import httptools  # uvicorn reads HTTP with it
from _bentoml_sdk.service.config import ServiceConfig
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.configuration.helpers import load_config_file
from bentoml._internal.resource import system_resources
from bentoml._internal.server.http import traffic
from bentoml._internal.utils import circus
from opentelemetry.sdk.trace import TracerProvider
from starlette.types import ASGIApp
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from avex_serve.errors import InputError
from avex_serve.service.drain import shutting_down

logger = logging.getLogger(__name__)

# -- HTTP connections -----------------------------------------------------------------------------------------------

MAX_HEAD_BYTES: Final = 2**16
MAX_HEADERS: Final = 256
MAX_WAITING: Final = 32  # requests of a connection that wait for the answer to the one before
STALL_SECONDS: Final = 60.0  # without a byte of an answer read, after which a client is given up
ARRIVAL_SECONDS: Final = 0.5  # for a request on an open connection to arrive, before the server ends
LINGER_SECONDS: Final = 10.0  # for the rest of a request that was refused before all of it had arrived
MAX_BEGINNING: Final = 8  # requests that begin in one turn of the event loop: most take it a millisecond
HEALTH: Final = frozenset({"/livez", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})

_LINE_BYTES: Final = len(b": \r\n")  # of a header, besides its name and value
_NO_REQUEST: Final = (400, "this is not a valid HTTP request; expected one by RFC 9112")
_TOO_LARGE: Final = (
    431, f"the request's head is too large; expected at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
)  # fmt: skip


class _Answering(NamedTuple):
    """What an answer needs of its transport."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]
    close: Callable[[], None]


def _refusal(status: int, error: str, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """A whole answer, the last one of its connection."""
    body = json.dumps({"error": error})
    fields = {"content-type": "application/json", "content-length": len(body), **headers, "connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return STATUS_LINE[status] + f"{head}\r\n{body}".encode()


class _Line:
    """Requests that wait to begin. Those of hundreds of connections at once would make one long turn of the loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, begin: Callable[[], None], context: Context, *, first: bool) -> None:
        """Call it in one of the next turns, before or after those that wait, in a context of no request."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._begin, context=context)
        (self._waiting.appendleft if first else self._waiting.append)(begin)

    def _begin(self) -> None:
        for _ in range(min(MAX_BEGINNING, len(self._waiting))):
            self._waiting.popleft()()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._begin)


_line = _Line()


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with bounds on what a client can make it keep, and without upgrades.

    - The parser collects each header until it is complete, in time by the square of its size. So a head, or the
      trailers of a body, has at most `MAX_HEAD_BYTES`; what is larger is answered 431.
    - Up to `MAX_WAITING` requests may arrive before the answer to the one before; the connection ends with theirs.
    - An upgrade is ignored: the request is answered as any other, as RFC 9110, 7.8, allows.
    - At most `MAX_BEGINNING` requests of all connections begin in one turn of the event loop, health checks first.
    - A client that reads nothing of an answer for `STALL_SECONDS` is disconnected.
    - A connection that is closed in the middle of a request first discards the rest of it, for `LINGER_SECONDS` at
      most. Otherwise the kernel resets the connection, and a client that is still sending loses the answer.

    What can't be parsed is answered 400. Refusals are JSON, and the connection is closed after them.
    """

    _incomplete = 0  # bytes since the last complete part: a head, a piece of a body, a request
    _in_body = False  # whether a head was complete, and its body isn't
    _ended = False  # whether nothing more is parsed
    _fault = _NO_REQUEST
    _working: RequestResponseCycle | None = None  # the running request; `cycle` is the last that has arrived
    _stalled: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._context = copy_context()  # of the server, not of the request before
        self._pieces: list[bytes] = []  # of the body, in the data that are parsed
        # The parser calls this for each chunk, of which a client may send two million in a second.
        self.on_body = self._pieces.append  # type: ignore[method-assign, assignment]
        super().__init__(*arguments, **options)

    def data_received(self, data: bytes) -> None:
        """Parse data from the client."""
        self._unset_keepalive_if_required()
        if self._ended:
            return
        self._incomplete += len(data)
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError:
            self._end()
        else:
            if self._incomplete > MAX_HEAD_BYTES:
                self._fault = _TOO_LARGE
                self._end()

    def _parse(self, data: bytes) -> bytes:
        """What is left to parse."""
        try:
            self.parser.feed_data(data)
            self._pass_body()
        except httptools.HttpParserUpgrade as upgrade:
            # The parser skips the body of a request that offers an upgrade, and reads it after a head without one.
            lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
            lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            return b"\r\n".join([*lines, b"", data[upgrade.args[0] :]])
        return b""

    def on_headers_complete(self) -> None:
        """Check a complete head, and begin its request."""
        self._incomplete = 0
        size = len(self.url) + sum(len(name) + len(value) + _LINE_BYTES for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._fault = _TOO_LARGE
            raise ValueError  # ends the parser
        if self.parser.get_method() == b"CONNECT" or len(self.pipeline) == MAX_WAITING:
            raise ValueError
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self._in_body = True
            answering = _Answering(self.transport.write, self.transport.is_closing, self._close)
            self.cycle.transport = answering  # type: ignore[assignment]

    def _pass_body(self) -> None:
        if self._pieces:
            self._incomplete = 0
            super().on_body(b"".join(self._pieces))
            self._pieces.clear()

    def on_message_complete(self) -> None:
        """Accept the end of a request."""
        self._pass_body()
        self._incomplete = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._in_body = False

    def _end(self) -> None:
        """Parse nothing more: refuse what has arrived, unless that would look like the answer to another request."""
        self._ended = True
        if self._in_body:
            refuses = self.cycle is self._working and not self.cycle.response_started
        else:
            refuses = self._working is None or self._working.response_complete
            if not refuses:
                self.cycle.keep_alive = False  # those before it are answered, then the connection is closed
                return
        self._let_go()
        if refuses:
            self.transport.write(_refusal(*self._fault))
        self._close()

    def _close(self) -> None:
        """Close the connection, as soon as the client has sent the rest."""
        self.pipeline.clear()
        if not (self._in_body or self._ended):
            self.transport.close()
            return
        self._ended = True
        if self.transport.can_write_eof():  # not with TLS
            self.transport.write_eof()
        self.flow.resume_reading()
        self._lingering = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def shutdown(self) -> None:
        """End the connection, after a request that is on its way: it is refused, where uvicorn would reset it."""
        self.loop.call_later(ARRIVAL_SECONDS, super().shutdown)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._working = cycle
        begin = partial(super()._start_asgi_task, cycle, app)
        _line.add(begin, self._context, first=cycle.scope["path"] in HEALTH)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the application know, and forget the connection."""
        self._let_go()
        super().connection_lost(exc)
        self._unwatch()
        if self._lingering is not None:
            self._lingering.cancel()
        self.pipeline.clear()  # its requests, and the last one, hold this connection
        self.cycle = self._working = None  # type: ignore[assignment]

    def _let_go(self) -> None:
        """Report the end of the connection to the running request; uvicorn reports it only to the last one."""
        if self._working is not None and not self._working.response_complete:
            self._working.disconnected = True
            self._working.message_event.set()

    def pause_writing(self) -> None:
        """Let the application wait until the client has read, and watch whether it does."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Let the application go on."""
        super().resume_writing()
        self._unwatch()

    def _watch_reading(self, unread: float = math.inf) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= unread:
            self._let_go()
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(STALL_SECONDS, self._watch_reading, left)

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()


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
TOP: Final = {"version", "services"}  # of its files, since version 2


def workers(service: str) -> int:
    """How many processes serve, as BentoML is configured; 1 outside of its server."""
    if not serves():
        return 1
    # BentoML gives a worker its own number, but not the total.
    configured = (BentoMLContainer.config.services.get().get(service) or {}).get("workers") or 1
    return int(system_resources()["cpu"]) or 1 if configured == "cpu_count" else int(configured)


def worker() -> int | None:
    """The number of this worker; None outside of workers."""
    return bentoml.server_context.worker_index


def serves() -> bool:
    """Whether this process is BentoML's server: a worker, or the supervisor of the workers."""
    command = click.get_current_context(silent=True)
    return worker() is not None or (command is not None and command.info_name == "serve")


def http_address() -> tuple[str, int]:
    """Host and port of HTTP, by the options of the running `bentoml serve` or else by its configuration."""
    options, http = _options(), BentoMLContainer.http
    return options.get("host") or http.host.get(), options.get("port") or http.port.get()


class HttpsOptions(NamedTuple):
    """The options of HTTP over TLS, as uvicorn gets them; without a certificate, HTTP is plain."""

    enabled: bool = False  # by the configuration, where the certificate alone decides
    certificate: Path | None = None
    key: Path | None = None
    password: str = ""
    client_ca: Path | None = None
    asks_clients: int = ssl.CERT_NONE  # for a certificate
    version: int = ssl.PROTOCOL_TLS_SERVER
    ciphers: str = "TLSv1"  # BentoML's default, which leaves those of newer versions too


def https_options() -> HttpsOptions:
    """The options of TLS, by those of the running `bentoml serve` or else by its configuration."""
    options, configured = _options(), BentoMLContainer.ssl.get()

    def value(name: str) -> Any:
        return options.get(f"ssl_{name}") or configured[name]

    def path(name: str) -> Path | None:
        return Path(value(name)) if value(name) else None

    return HttpsOptions(
        enabled=configured["enabled"],
        certificate=path("certfile"),
        key=path("keyfile"),
        password=value("keyfile_password") or "",
        client_ca=path("ca_certs"),
        asks_clients=value("cert_reqs") or ssl.CERT_NONE,
        version=value("version") or ssl.PROTOCOL_TLS_SERVER,
        ciphers=value("ciphers") or HttpsOptions().ciphers,
    )


def check_names(service: str) -> None:
    """Check the names in BentoML's file of configuration: it ignores those that it doesn't know.

    A misspelt `ssl` would leave HTTP in plain text.

    Args:
        service: the class of the service, whose section may have its name.

    Raises:
        InputError: a name that is none of BentoML's.
    """
    if not (file := os.environ.get("BENTOML_CONFIG")):
        return
    configuration = load_config_file(file)
    faults = [f"{name}; expected services." for name in configuration if name not in TOP]
    for name, section in (configuration.get("services") or {}).items():
        if name in get_type_hints(ServiceConfig):  # of all services
            faults += _unknown_names({name: section}, ServiceConfig, "services.")
        elif name != service and name.lower() == service.lower():
            faults.append(f"services.{name}; did you mean {service}?")
        else:
            faults += _unknown_names(section, ServiceConfig, f"services.{name}.")
    if faults:
        raise InputError(f"BENTOML_CONFIG has {faults[0]} BentoML would ignore it")


def _unknown_names(section: Mapping[str, Any], kind: Any, place: str) -> Iterator[str]:
    """What to say of each name that is not of the kind, one of BentoML's typed dictionaries."""
    known = get_type_hints(kind)
    for name, value in section.items():
        if name not in known:
            nearest = get_close_matches(str(name), known, 1)
            expected = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}."
            yield f"{place}{name}; {expected}"
        elif isinstance(value, dict) and hasattr(known[name], "__required_keys__"):  # a TypedDict
            yield from _unknown_names(value, known[name], f"{place}{name}.")


def _options() -> dict[str, Any]:
    command = click.get_current_context(silent=True)
    return {} if command is None else command.params


def share_log(name: str) -> list[logging.Handler]:
    """Make the loggers below `name` log as BentoML's do, and return the handlers of all lines of the process."""
    theirs, ours = logging.getLogger("bentoml"), logging.getLogger(name)
    ours.handlers, ours.level, ours.propagate = theirs.handlers, theirs.level, False
    loggers = [logging.getLogger(), theirs, logging.getLogger("uvicorn.error"), logging.getLogger("circus")]
    return list({handler: None for logger in loggers for handler in logger.handlers})


class HttpConfiguration(NamedTuple):
    """The part of BentoML's section `http` that BentoML applies only to its own routes."""

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


STARTUP_FAILED: Final = 3  # exit code of a worker, uvicorn's for this case
PARTING_SECONDS: Final = 1.0  # for clients to read that the service has ended
SERVES_AFTER: Final = 60.0  # seconds since its start, after which a worker counts as one that serves


class _Supervisor(circus.Arbiter):
    """BentoML's supervisor, controlled by sockets in a folder that no other user can open.

    BentoML makes it listen on two TCP ports of loopback. Whoever can connect there, other users of the machine or
    containers of the same pod, can make it run any command.

    A worker that can't start is not started again unless another one serves. Once none is left, the supervisor ends
    with code 1. BentoML would start them again for ever, and in containers end with a traceback.

    The kernel accepts connections for as long as the supervisor's socket listens: those that came while the workers
    closed are refused at the end. Closing the socket would reset them.
    """

    def __init__(self, watchers: list[Any], **options: Any) -> None:
        folder = tempfile.mkdtemp(prefix="avex-serve-")  # only its owner can open it
        options["endpoint"], options["pubsub_endpoint"] = f"ipc://{folder}/control", f"ipc://{folder}/events"
        super().__init__(watchers, **options)
        self.exit_stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for watcher in watchers:
            watcher.hooks["after_reap"] = self._note_end

    def start(self, cb: Callable[[Any], Any] | None = None) -> None:
        """Supervise until the end; SystemExit if no worker is left."""
        try:
            super().start(cb)
        except RuntimeError:  # circus raises it when no process is left
            logger.critical("no worker is left; the service ends")
            raise SystemExit(1) from None

    def stop_controller_and_close_sockets(self) -> None:
        """End, once the workers have ended."""
        with ExitStack() as stack:
            # Over TLS a plain answer means nothing.
            listening = [] if https_options().certificate else self.sockets.values()
            waiting = list(map(stack.enter_context, _refuse_waiting(listening)))
            super().stop_controller_and_close_sockets()
            _discard(waiting, PARTING_SECONDS)

    def _note_end(self, watcher: Any, process_pid: int, exit_code: int, **_: Any) -> None:
        if exit_code == STARTUP_FAILED:  # the worker has logged why
            if all(each.age() < SERVES_AFTER for each in watcher.processes.values()):
                watcher.respawn = False
        elif watcher.is_active():
            logger.error("the worker with process id %d %s; its requests are lost", process_pid, _how(exit_code))


def _how(exit_code: int) -> str:
    """How a process ended, by its exit code, which is negative for a signal."""
    if exit_code == -signal.SIGKILL:
        return "was ended by SIGKILL, as Linux does where memory runs out"
    return f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with code {exit_code}"


def _refuse_waiting(listening: Iterable[socket.socket]) -> Iterator[socket.socket]:
    """Close the sockets, after 503 on each connection that nobody has accepted. Yields these connections."""
    error = shutting_down()
    answer = _refusal(error.http_status, str(error), error.http_headers)
    for each in listening:
        with suppress(OSError):  # no more connections, or files
            while True:
                client, _ = each.accept()
                with suppress(OSError):  # it has gone
                    client.setblocking(False)
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_WR)
                yield client
        each.close()  # at once: who comes later is refused by the kernel


def _discard(clients: list[socket.socket], seconds: float) -> None:
    """Read what clients send until they have closed: closed before, the connection would be reset."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as reading:
        for client in clients:
            reading.register(client, selectors.EVENT_READ)
        while reading.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in reading.select(left):
                try:
                    ended = not os.read(key.fd, 2**16)
                except OSError:
                    ended = True
                if ended:
                    reading.unregister(key.fd)


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
