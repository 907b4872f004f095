"""The routes about the service itself: what is served, the metrics, the OpenAPI document.

They stand in front of BentoML's: its page loads a tracker from elsewhere, its metrics make a series of every path
that somebody tries, and its document names a part of the routes.
"""

import html
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Final

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from avex_serve.inference.engine import Engine
from avex_serve.service import openapi
from avex_serve.service.metrics import Metrics
from avex_serve.version import __version__

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Pages:
    """ASGI middleware: answers its routes and passes everything else on."""

    def __init__(
        self,
        app: ASGIApp,
        served: Callable[[], AbstractContextManager[Iterable[Engine]]],
        metrics: Callable[[], Metrics],
        grpc_port: Callable[[], int],
    ) -> None:
        """All are called with each request, for what they give is made after the application is built.

        Args:
            app: what answers other requests.
            served: lends the engines that are served.
            metrics: of this process.
            grpc_port: where gRPC listens.
        """
        self._app = app
        self._served = served
        self._metrics = metrics
        self._grpc_port = grpc_port
        routes = [
            Route("/", self._home),
            Route("/metrics", self._metrics_text),
            Route("/docs.json", self._document),
        ]
        self._router = ExceptionMiddleware(
            Router(routes, default=app, redirect_slashes=False), {HTTPException: _refuse}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app = self._router if scope["type"] == "http" else self._app
        await app(scope, receive, send)

    async def _home(self, request: Request) -> Response:
        with self._served() as engines:
            models = [describe(engine) for engine in engines]
        if prefers_html(request.headers.get("accept", "")):
            base = str(request.base_url).rstrip("/")
            return HTMLResponse(_page(models, base, f"{request.url.hostname}:{self._grpc_port()}"))
        return JSONResponse(
            {"name": "avex-serve", "version": __version__, "models": models, "grpc_port": self._grpc_port()}
        )

    async def _metrics_text(self, _: Request) -> Response:
        return Response(await to_thread.run_sync(self._metrics().text), media_type=METRICS_TYPE)

    async def _document(self, _: Request) -> Response:
        return JSONResponse(openapi.document())


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # a method that isn't offered
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def describe(engine: Engine) -> dict[str, Any]:
    """What a model is, as a JSON document."""
    manifest = engine.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "kind": manifest.kind,
        "labels": {probe.name: len(engine.labels(probe.name)) for probe in manifest.probes},
        "trained": manifest.trained,
        "licence": manifest.licence,
        "format": engine.backend.format,
        "device": engine.backend.device,
        "threads": engine.threads,
    }


def prefers_html(accept: str) -> bool:
    """Whether a browser asks: programs name no type, any type, or JSON."""
    types = [part.partition(";")[0].strip() for part in accept.split(",")]
    return "text/html" in types and "application/json" not in types


_STYLE: Final = """body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}th,td{text-align:left;padding:.2rem 1rem .2rem 0;border-bottom:1px solid #ccc}
pre{background:#f4f4f4;padding:.7rem;overflow:auto}"""


def _page(models: list[dict[str, Any]], base: str, grpc: str) -> str:
    names = list(models[0]) if models else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(model[name]))}</td>" for name in names) + "</tr>"
        for model in models
    )
    commands = "\n".join(_commands(models, base))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>avex-serve</title><style>{_STYLE}</style></head><body>
<h1>avex-serve {html.escape(__version__)}</h1>
<h2>What is served</h2><table><tr>{head}</tr>{rows}</table>
<h2>Ask it</h2><pre>{html.escape(commands)}</pre>
<p>gRPC (Open Inference Protocol): <code>{html.escape(grpc)}</code>.
 Every route: <a href="docs.json">docs.json</a>. Metrics: <a href="metrics">metrics</a>.
 Health: <a href="readyz">readyz</a>.</p>
</body></html>
"""


def _cell(value: Any) -> str:
    return ", ".join(f"{name}: {count}" for name, count in value.items()) if isinstance(value, dict) else str(value)


def _commands(models: list[dict[str, Any]], base: str) -> list[str]:
    """Commands for each kind of model; where there are several, each names the one that it asks."""
    names = dict.fromkeys(model["name"] for model in models)

    def first(kind: str, *, labels: bool = False) -> str | None:
        fitting = (each["name"] for each in models if each["kind"] == kind and (each["labels"] or not labels))
        return next(fitting, None)

    def query(name: str, *options: str) -> str:
        pairs = [*options, *([f"model={name}"] if len(names) > 1 else [])]
        return "?" + "&".join(pairs) if pairs else ""

    commands = []
    if (name := first("audio", labels=True)) is not None:
        form = f" -F model={name}" if len(names) > 1 else ""
        commands += [
            f"curl --data-binary @recording.wav '{base}/predict{query(name, 'top_k=3')}'",
            f"curl -F audio=@recording.wav -F threshold=0.3{form} {base}/predict",
        ]
    if (name := first("audio")) is not None:
        commands.append(f"curl --data-binary @recording.wav '{base}/embed{query(name)}'")
    if (name := first("embedding")) is not None:
        model = f'"model": "{name}", ' if len(names) > 1 else ""
        # curl puts the pieces together; the file holds a list of embeddings.
        body = f"""--json '{{{model}"embeddings": ' --json @embeddings.json --json '}}'"""
        commands.append(f"curl {body} {base}/classify")
    return commands + [f"curl {base}/v2/models/{name}" for name in names]
