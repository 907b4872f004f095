"""The log: BentoML's text, or a JSON document a line; either way with the id of the request."""

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry import trace

from avex_serve.scheduling.request import current

LogFormat = Literal["text", "json"]


def configure_logs(log_format: LogFormat) -> None:
    """Give what BentoML has set up our format: the id of the request at the end of the line, or JSON."""
    for handler in _handlers():
        if log_format == "json":
            handler.setFormatter(JsonFormatter())
        else:
            handler.addFilter(_append_id)


def _handlers() -> Iterator[logging.Handler]:
    loggers = [logging.getLogger(name) for name in ("", "bentoml", "uvicorn.error", "circus")]
    yield from {handler: None for logger in loggers for handler in logger.handlers}


def _append_id(record: logging.LogRecord) -> bool:
    # BentoML's format ends with this field, which its filter has set: ours was added after it.
    if identity := current().id:
        record.trace_msg = f"{getattr(record, 'trace_msg', '')} (request_id={identity})"
    return True


class JsonFormatter(logging.Formatter):
    """One JSON document a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: what, when, which request and span, the fields of a request, the traceback."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := current().id:
            document["request_id"] = identity
        span = trace.get_current_span().get_span_context()
        if span.trace_flags.sampled:
            document["trace_id"] = trace.format_trace_id(span.trace_id)
            document["span_id"] = trace.format_span_id(span.span_id)
        document |= getattr(record, "fields", {})
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)
