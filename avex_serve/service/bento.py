"""The inside of BentoML and uvicorn: no other module imports it.

BentoML has no public way to what is here. Written for BentoML 1.4 and uvicorn 0.54.
"""

import json
import logging
import shutil
import tempfile
from functools import cached_property
from typing import Any, Final, NamedTuple

import bentoml
import click  # BentoML's command is made with it
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from bentoml._internal.utils import circus
from opentelemetry.sdk.trace import TracerProvider
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from avex_serve.errors import InputError

# -- HTTP connections -----------------------------------------------------------------------------------------------

MAX_HEAD_BYTES: Final = 2**16

_LINE_BYTES: Final = len(b": \r\n")  # of a header, besides its name and value
_REFUSAL: Final = json.dumps({"error": f"the request's head is too large; expected at most {MAX_HEAD_BYTES} bytes"})


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a bound on the head of a request: its line, its headers and its trailers.

    The parser collects each header until it is complete. That takes time by the square of its size, before any
    application sees the request: a header of 200 MiB blocked the event loop for a minute, and it took no key.
    Too large a head is answered 431, and the connection is closed.
    """

    _incomplete = 0  # bytes since the last complete part: a head, a piece of a body, a request
    _too_large = False

    def data_received(self, data: bytes) -> None:
        """Parse data from the client."""
        self._incomplete += len(data)
        super().data_received(data)
        if self._incomplete > MAX_HEAD_BYTES and not self._too_large:
            self._refuse()

    def on_headers_complete(self) -> None:
        """Check the size of a complete head, which may have arrived at once."""
        self._incomplete = 0
        size = len(self.url) + sum(len(name) + len(value) + _LINE_BYTES for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._too_large = True
            raise ValueError("the head is too large")  # ends the parser, see `send_400_response`
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Accept a piece of a body."""
        self._incomplete = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Accept the end of a request."""
        self._incomplete = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser can't parse."""
        if self._too_large:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        self._too_large = True
        # While another request is being answered, this would look like its answer.
        if self.cycle is None or self.cycle.response_complete:
            head = f"content-type: application/json\r\ncontent-length: {len(_REFUSAL)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[431] + (head + _REFUSAL).encode())
        self.transport.close()


def bound_heads() -> None:
    """Make the servers of this process use `BoundedHttp`: BentoML lets uvicorn choose its protocol."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttp.__name__}"


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
