"""OpenTelemetry spans, where they are configured.

    OTEL_EXPORTER_OTLP_ENDPOINT   and the other standard variables: spans of ours for HTTP and gRPC, sent by OTLP
                                  over HTTP; needs ``avex-serve[tracing]``
    BENTOML_CONFIG                with ``tracing``: BentoML makes the spans of HTTP, ours of gRPC go the same way

Without either nothing is traced.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

# BentoML has no public way to its tracer provider and its configuration.
from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from avex_serve.errors import DependencyError
from avex_serve.scheduling.request import Timings
from avex_serve.service.routes import PROBES

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing:
    """Makes the span of each request."""

    def __init__(self, tracer: Tracer, transports: frozenset[str], provider: TracerProvider | None = None) -> None:
        self._tracer = tracer
        self._transports = transports  # those whose spans nobody else makes
        self._provider = provider

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Tracing":
        """As the standard variables say, else as BentoML is configured.

        Raises:
            DependencyError: spans are to be exported, and the exporter isn't installed.
        """
        if environment.get("OTEL_SDK_DISABLED") != "true" and any(environment.get(name) for name in ENDPOINTS):
            provider = _exporting_provider()
            return cls(provider.get_tracer("avex_serve"), frozenset({"http", "grpc"}), provider)
        if not _bentoml_sends():
            return cls(trace.NoOpTracer(), frozenset())
        return cls(BentoMLContainer.tracer_provider.get().get_tracer("avex_serve"), frozenset({"grpc"}))

    @contextmanager
    def span(self, transport: str, route: str, method: str, headers: Mapping[str, str]) -> Iterator["RequestSpan"]:
        """The span of the request that the block answers; a child of the client's, if it sent one."""
        if transport not in self._transports or route in PROBES:
            yield RequestSpan(trace.INVALID_SPAN, transport)
            return
        with self._tracer.start_as_current_span(
            f"{method} {route}".lstrip(),
            context=propagate.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=_http(route, method) if transport == "http" else _grpc(route),
        ) as span:
            yield RequestSpan(span, transport)

    def close(self) -> None:
        """Send what is not yet sent."""
        if self._provider is not None:
            self._provider.shutdown()


def leave_out_unsent_spans() -> None:
    """Keep BentoML from making a span of each HTTP request where none of them would be sent."""
    BentoMLContainer.tracing_excluded_urls.set(_Untraced())


class _Untraced:
    """The URLs without spans; asked first when BentoML has read its configuration, which is after it starts."""

    def url_disabled(self, url: str) -> bool:
        return self._configured is None or self._configured.url_disabled(url)

    @cached_property
    def _configured(self) -> Any:
        if not _bentoml_sends():
            return None
        BentoMLContainer.tracing_excluded_urls.reset()
        return BentoMLContainer.tracing_excluded_urls.get()


def _bentoml_sends() -> bool:
    return BentoMLContainer.config.tracing.exporter_type.get() is not None


class RequestSpan:
    """The span of one request."""

    def __init__(self, span: trace.Span, transport: str) -> None:
        self._span = span
        self._transport = transport

    def end(self, status: str, request_id: str, work: Timings) -> None:
        """Write down how the request ended, and the seconds of each stage."""
        if not self._span.is_recording():
            return
        name = "http.response.status_code" if self._transport == "http" else "rpc.response.status_code"
        self._span.set_attribute(name, int(status) if status.isdecimal() else status)
        self._span.set_attribute("avex.request_id", request_id)
        for stage, seconds in work.totals().items():
            self._span.set_attribute(f"avex.{stage}.seconds", seconds)
        if status.startswith("5") or status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
            self._span.set_status(StatusCode.ERROR)


def _http(route: str, method: str) -> dict[str, str]:
    return {"http.request.method": method, "http.route": route}


def _grpc(route: str) -> dict[str, str]:
    return {"rpc.system.name": "grpc", "rpc.method": route}


def _exporting_provider() -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise DependencyError(
            f"{' or '.join(ENDPOINTS)} is set, and OpenTelemetry's exporter for OTLP over HTTP is not installed; "
            "pip install 'avex-serve[tracing]'"
        ) from None
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before the name of ours.
    resource = Resource.create({SERVICE_NAME: "avex-serve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)  # sampled as OTEL_TRACES_SAMPLER says
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
