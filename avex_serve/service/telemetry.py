"""What is recorded of each request, over HTTP and gRPC: its id, a line in the log, metrics and a span.

Spans are sent in one of two ways, otherwise none are made:

    OTEL_EXPORTER_OTLP_ENDPOINT   and OpenTelemetry's other variables: spans of HTTP and gRPC are made here and sent
                                  by OTLP over HTTP; without ``avex-serve[tracing]`` the log says that none are sent
    BENTOML_CONFIG                with ``tracing``: BentoML makes the spans of HTTP; those of gRPC are made here and
                                  sent the same way
"""

import logging
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Literal

from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from avex_serve.scheduling.request import Request, answering, current
from avex_serve.service.metrics import Metrics

logger = logging.getLogger(__name__)
access_log = logging.getLogger("avex_serve.access")

Transport = Literal["http", "grpc"]

REQUEST_ID: Final = "x-request-id"
# Ids that clients may choose: they are repeated in a header and in logs.
_ACCEPTED_ID: Final = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
MAX_PATH: Final = 200  # characters of a path that the log repeats

_ids = random.Random()  # seeded by the kernel once; uuid4 would ask it for each request


@dataclass
class Exchange:
    """A request and its answer, as metrics, logs and spans name them."""

    transport: Transport
    route: str  # template of the path, or full name of the gRPC method
    method: str  # of HTTP; empty for gRPC
    path: str  # as the client sent it
    quiet: bool  # a successful one is neither logged nor traced: probes and scrapes come every few seconds
    status: str = ""  # "200", "NOT_FOUND"; empty until it is answered


class Telemetry:
    """Records requests; one for a process, shared by both transports."""

    def __init__(self, metrics: Metrics, spans: "Spans") -> None:
        self.metrics = metrics
        self._spans = spans

    @contextmanager
    def record(self, exchange: Exchange, request: Request, headers: Mapping[str, str]) -> Iterator[None]:
        """Record the request that the block answers; the block sets the status.

        Args:
            exchange: what to record.
            request: its context, current during the block.
            headers: by lower-case name; metadata for gRPC.
        """
        start = perf_counter()
        with (
            answering(request),
            self._spans.span(exchange, headers) as span,
            self.metrics.in_progress(exchange.transport),
        ):
            try:
                yield
            finally:
                seconds = perf_counter() - start
                stages = request.timings.totals()
                self.metrics.observe(exchange.transport, exchange.route, exchange.status, seconds, request, stages)
                _complete(span, exchange, request, stages)
                if not (exchange.quiet and exchange.status in ("200", "OK")):
                    _log(exchange, request, seconds, stages)

    def close(self) -> None:
        """Send the spans that are not sent yet."""
        self._spans.close()


def request_id(headers: Mapping[str, str]) -> str:
    """The id that the client chose, or a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _ACCEPTED_ID.fullmatch(given) else f"{_ids.getrandbits(128):032x}"


# -- the log --------------------------------------------------------------------------------------------------------

_ADDED_BY_BENTOML: Final = ("levelname_bracketed", "component", "trace_msg", "service_name")


def configure_logs(
    log_format: Literal["text", "json"], handlers: Iterable[logging.Handler], worker: int | None
) -> None:
    """Log everything as BentoML's text with the id of the request, or as one JSON document a line.

    Args:
        log_format: of each line.
        handlers: of all lines of the process.
        worker: the number of this worker; None: it is the supervisor.
    """
    if log_format == "json":  # also what Python prints by itself
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda found: _log_uncaught(found.exc_type, found.exc_value, found.exc_traceback)
    for handler in handlers:
        handler.addFilter(_add_ids)
        if log_format == "json":
            handler.setFormatter(
                JsonFormatter(
                    ("levelname", "name", "message"),
                    rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
                    reserved_attrs=(*RESERVED_ATTRS, *_ADDED_BY_BENTOML),
                    timestamp="time",
                    static_fields={} if worker is None else {"worker": worker},
                    json_ensure_ascii=False,
                )
            )


def _log_uncaught(kind: Any, error: BaseException | None, traceback: Any) -> None:
    logger.critical("uncaught error", exc_info=(kind, error, traceback) if error is not None else None)


def _add_ids(record: logging.LogRecord) -> bool:
    """Add the request and its span to a record, after BentoML's filter has added its own."""
    record.__dict__.pop("request_id", None)  # BentoML's is the number of a span
    if identity := current().id:
        record.request_id = identity
        # BentoML's text ends with this field.
        key = f", key={name}" if (name := current().key) else ""
        record.trace_msg = f"{getattr(record, 'trace_msg', '')} (request_id={identity}{key})"
    span = trace.get_current_span().get_span_context()
    if span.trace_flags.sampled:
        record.trace_id, record.span_id = trace.format_trace_id(span.trace_id), trace.format_span_id(span.span_id)
    return True


def _log(exchange: Exchange, request: Request, seconds: float, stages: Mapping[str, float]) -> None:
    timings, models = request.timings, set(request.timings.models)
    fields: dict[str, Any] = {
        "transport": exchange.transport,
        "method": exchange.method,
        "route": exchange.route,
        "path": exchange.path[:MAX_PATH],
        "status": exchange.status,
        "duration_ms": round(1000 * seconds, 3),
        "key": request.key,
        "model": ",".join(sorted({model.name for model in models})),
        "version": ",".join(sorted({model.version for model in models})),
        "batches": len(timings.batches),
        "audio_s": round(sum(part for _, part in timings.audio), 3),
        **{f"{stage}_ms": round(1000 * part, 3) for stage, part in stages.items()},
        "cpu_ms": round(1000 * sum(timings.cpu().values()), 3),
    }
    asked = f"{exchange.method} {exchange.path[:MAX_PATH]}".lstrip()
    access_log.info(
        "%s %s %s %.1f ms",
        exchange.transport,
        asked,
        exchange.status,
        1000 * seconds,
        extra={name: value for name, value in fields.items() if value not in ("", 0)},
    )


# -- spans ----------------------------------------------------------------------------------------------------------

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the first one counts
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Spans:
    """Makes the span of each request."""

    def __init__(
        self, tracer: Tracer, transports: Iterable[Transport], provider: TracerProvider | None = None
    ) -> None:
        """`transports` are those whose spans are made here; `provider` is shut down with `close`."""
        self._tracer = tracer
        self._transports = frozenset(transports)
        self._provider = provider

    @classmethod
    def configured(cls, bentoml: Callable[[], TracerProvider | None]) -> "Spans":
        """Spans as the standard variables say, otherwise as BentoML is configured.

        `bentoml` returns its provider; None: BentoML sends no spans.
        """
        endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
        if os.environ.get("OTEL_SDK_DISABLED") != "true" and endpoint is not None:
            if not os.environ[endpoint].strip().lower().startswith(("http://", "https://")):
                logger.warning(
                    "no traces are sent: %s doesn't begin with http:// or https://; set it to the URL of the "
                    "collector's port for HTTP, such as http://localhost:4318",
                    endpoint,
                )
                return cls(trace.NoOpTracer(), ())
            try:
                exporting = _exporting_provider()
            except ImportError:  # clusters set the variable for all containers alike
                logger.warning(
                    "no traces are sent: %s is set, and OpenTelemetry's exporter for OTLP over HTTP is not "
                    "installed; pip install 'avex-serve[tracing]', or set OTEL_SDK_DISABLED=true",
                    endpoint,
                )
                return cls(trace.NoOpTracer(), ())
            if next(filter(None, map(os.environ.get, PROTOCOLS)), None) == "grpc":
                logger.warning(
                    "%s is grpc, but traces are sent by OTLP over HTTP: the endpoint must be the collector's port "
                    "for HTTP, 4318 by default",
                    " or ".join(PROTOCOLS),
                )
            return cls(exporting.get_tracer("avex_serve"), ("http", "grpc"), exporting)
        if (provider := bentoml()) is not None:
            return cls(provider.get_tracer("avex_serve"), ("grpc",))
        return cls(trace.NoOpTracer(), ())

    @contextmanager
    def span(self, exchange: Exchange, headers: Mapping[str, str]) -> Iterator[Span]:
        """The span of the request that the block answers; a child of the client's, if it sent one."""
        if exchange.transport not in self._transports or exchange.quiet:
            yield trace.INVALID_SPAN
            return
        if exchange.transport == "http":
            attributes = {"http.request.method": exchange.method, "http.route": exchange.route}
        else:
            attributes = {"rpc.system.name": "grpc", "rpc.method": exchange.route}
        with self._tracer.start_as_current_span(
            f"{exchange.method} {exchange.route}".lstrip(),
            context=propagate.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            yield span

    def close(self) -> None:
        """Send the spans that are not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


def _complete(span: Span, exchange: Exchange, request: Request, stages: Mapping[str, float]) -> None:
    """Add the status, the id and the seconds of each stage to the span."""
    if not span.is_recording():
        return
    status = exchange.status
    name = "http.response.status_code" if exchange.transport == "http" else "rpc.response.status_code"
    span.set_attribute(name, int(status) if status.isdecimal() else status)
    span.set_attribute("avex.request_id", request.id)
    for stage, seconds in stages.items():
        span.set_attribute(f"avex.{stage}.seconds", seconds)
    if status.startswith("5") or status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
        span.set_status(StatusCode.ERROR)


def _exporting_provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence over our name.
    resource = Resource.create({SERVICE_NAME: "avex-serve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)  # sampled as OTEL_TRACES_SAMPLER says
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
