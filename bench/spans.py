"""CPU time that the span of an HTTP request costs: none, ours, and OpenTelemetry's ASGI middleware.

python bench/spans.py
"""

import asyncio
import statistics
import time
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pkg_resources, which the instrumentation imports
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider

from avex_serve.scheduling.request import Request
from avex_serve.service.telemetry import Exchange, Spans, _complete

ROUNDS, REQUESTS = 7, 2000
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/predict",
    "raw_path": b"/predict",
    "query_string": b"",
    "server": ("127.0.0.1", 3000),
    "client": ("127.0.0.1", 50000),
    "headers": [(b"host", b"127.0.0.1"), (b"user-agent", b"curl"), (b"content-length", b"3")],
}
provider = TracerProvider()  # records spans and exports none
spans = Spans(provider.get_tracer("avex_serve"), ("http", "grpc"))


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def ours(scope, receive, send):
    exchange = Exchange("http", "/predict", "POST", "/predict", quiet=False, status="200")
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    with spans.span(exchange, headers) as span:
        await application(scope, receive, send)
        _complete(span, exchange, Request("id"))


WAYS = {
    "no span": application,
    "ours": ours,
    "OpenTelemetry's, one span a request": OpenTelemetryMiddleware(
        application, tracer_provider=provider, exclude_spans=["receive", "send"]
    ),
    "OpenTelemetry's, by default": OpenTelemetryMiddleware(application, tracer_provider=provider),
}


async def receive():
    return {"type": "http.request", "body": b"abc", "more_body": False}


async def send(message):
    pass


async def microseconds(way):
    start = time.process_time()
    for _ in range(REQUESTS):
        await way(dict(SCOPE), receive, send)
    return (time.process_time() - start) / REQUESTS * 1e6


async def main():
    times = {name: [] for name in WAYS}
    for _ in range(ROUNDS):  # interleaved, for the machine's speed drifts
        for name, way in WAYS.items():
            times[name].append(await microseconds(way))
    for name, each in times.items():
        print(f"{name:36} {statistics.median(each):7.1f} µs a request")


if __name__ == "__main__":
    asyncio.run(main())
