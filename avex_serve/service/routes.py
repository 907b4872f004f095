"""What metrics and logs call a request: the template of its path."""

from functools import cache
from re import Pattern
from typing import Final

from starlette.routing import compile_path

from avex_serve.service.openapi import paths

OTHER: Final = "other"
# Answered also while the service drains, and asked every few seconds.
PROBES: Final = frozenset(
    {
        "/livez",
        "/healthz",
        "/readyz",
        "/metrics",
        "/v2/health/live",
        "/v2/health/ready",
        "grpc.health.v1.Health/Check",
        "inference.GRPCInferenceService/ServerLive",
        "inference.GRPCInferenceService/ServerReady",
    }
)


def route_of(path: str) -> str:
    """The template that a path fits, or `OTHER`: paths that nobody serves must not make series."""
    return next((template for template, pattern in _patterns() if pattern.match(path)), OTHER)


@cache
def _patterns() -> list[tuple[str, Pattern[str]]]:
    return [(template, compile_path(template)[0]) for template in paths()]
