"""The pages about the service itself: what is served, and its metrics.

They replace BentoML's: its page loads a tracker from elsewhere, and its metrics make a series of every path that
a client tries.
"""

import html
from typing import Any, Final

import msgspec
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from avex_serve import __version__
from avex_serve.bundles.manifest import EmbeddingInfo, ProbeInfo
from avex_serve.inference.engine import Engine
from avex_serve.inference.scores import Selection, score_scale
from avex_serve.service.front import METRICS, Front
from avex_serve.service.metrics import METRICS_TYPE
from avex_serve.service.settings import DEMO_WARNING

# Routes that the start page names.
PREDICT: Final = "/predict"
EMBED: Final = "/embed"
CLASSIFY: Final = "/classify"
MODEL: Final = "/v2/models/{name}"
DESCRIPTION: Final = "/models/{name}"


async def home(front: Front, request: Request) -> Response:
    """What is served: for browsers a page, for programs JSON."""
    with front.repository.lease_those(lambda _: True) as engines:
        models = [describe(engine) for engine in engines]
    port = front.settings.grpc_port
    warnings = [DEMO_WARNING] if front.settings.serves_demo else []
    if prefers_html(request.headers.get("accept", "")):
        base = str(request.base_url).rstrip("/")
        return HTMLResponse(_page(models, base, f"{request.url.hostname}:{port}", warnings))
    document = {
        "name": "avex-serve",
        "version": __version__,
        "warnings": warnings,
        "models": models,
        "grpc_port": port,
    }
    return Response(msgspec.json.encode(document), media_type="application/json")


async def readyz(front: Front, _: Request) -> Response:
    """Whether requests are accepted, and a warning if the demo is what answers them."""
    if not front.ready():
        return PlainTextResponse("not ready\n", 503)
    return PlainTextResponse(f"warning: {DEMO_WARNING}\n" if front.settings.serves_demo else "\n")


async def metrics(front: Front, _: Request) -> Response:
    """The metrics of all workers."""
    return Response(await to_thread.run_sync(front.telemetry.metrics.text), media_type=METRICS_TYPE)


def describe(engine: Engine) -> dict[str, Any]:
    """A model as a JSON document."""
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


async def model(front: Front, request: Request) -> Response:
    """What a client must know of a model."""
    name, version = request.path_params["name"], request.query_params.get("version")
    with front.repository.lease(name, version) as engine:
        document = {
            **describe(engine),
            "versions": front.repository.versions(name),
            "audio": _audio(engine),
            "probes": [_probe(engine, probe) for probe in engine.manifest.probes],
            "embeddings": [_embedding(engine, info) for info in engine.manifest.embeddings],
        }
    return Response(msgspec.json.encode(document), media_type="application/json")


def _audio(engine: Engine) -> dict[str, Any] | None:
    if (audio := engine.manifest.audio) is None:
        return None
    shortest = audio.window_samples if audio.shortest_samples is None else audio.shortest_samples
    return {
        "sample_rate": audio.sample_rate,
        "channels": 1,
        "window": audio.window_samples / audio.sample_rate,
        "shortest": shortest / audio.sample_rate,
    }


def _probe(engine: Engine, probe: ProbeInfo) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": probe.name,
        "labels": engine.labels(probe.name),
        "score_scale": score_scale(probe.activation),
        "threshold": Selection.of(probe.activation, None, None).threshold,
        "trained": probe.trained,
    }
    if (calibrator := engine.calibrator(probe.name)) is not None and probe.calibration is not None:
        document["thresholds"] = calibrator.thresholds(engine.labels(probe.name))
        document["target_precision"] = probe.calibration.target_precision
    return document


def _embedding(engine: Engine, info: EmbeddingInfo) -> dict[str, Any]:
    return {"output": info.output, "shape": engine.manifest.output(info.output).shape[1:], "layers": info.layers}


def prefers_html(accept: str) -> bool:
    """Whether a browser asks: programs accept no particular type, any type, or JSON."""
    types = [part.partition(";")[0].strip() for part in accept.split(",")]
    return "text/html" in types and "application/json" not in types


_STYLE: Final = """body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}th,td{text-align:left;padding:.2rem 1rem .2rem 0;border-bottom:1px solid #ccc}
pre{background:#f4f4f4;padding:.7rem;overflow:auto}"""


def _page(models: list[dict[str, Any]], base: str, grpc: str, warnings: list[str]) -> str:
    names = list(models[0]) if models else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(model[name]))}</td>" for name in names) + "</tr>"
        for model in models
    )
    commands = "\n".join(_commands(models, base))
    warned = "".join(f"<p><strong>Warning: {html.escape(warning)}</strong></p>" for warning in warnings)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>avex-serve</title><style>{_STYLE}</style></head><body>
<h1>avex-serve {html.escape(__version__)}</h1>{warned}
<h2>What is served</h2><table><tr>{head}</tr>{rows}</table>
<h2>Ask it</h2><pre>{html.escape(commands)}</pre>
<p>gRPC (Open Inference Protocol): <code>{html.escape(grpc)}</code>.
 Every route: <a href="docs.json">docs.json</a>. Metrics: <a href="{METRICS[1:]}">metrics</a>.
 Health: <a href="readyz">readyz</a>.</p>
</body></html>
"""


def _cell(value: Any) -> str:
    return ", ".join(f"{name}: {count}" for name, count in value.items()) if isinstance(value, dict) else str(value)


def _commands(models: list[dict[str, Any]], base: str) -> list[str]:
    """Commands for each kind of model; if there are several models, each command names the one that it asks."""
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
            f"curl --data-binary @recording.wav '{base}{PREDICT}{query(name, 'top_k=3')}'",
            f"curl -F audio=@recording.wav -F threshold=0.3{form} {base}{PREDICT}",
        ]
    if (name := first("audio")) is not None:
        commands.append(f"curl --data-binary @recording.wav '{base}{EMBED}{query(name)}'")
    if (name := first("embedding")) is not None:
        model = f'"model": "{name}", ' if len(names) > 1 else ""
        # curl joins the pieces; the file holds a list of embeddings.
        body = f"""--json '{{{model}"embeddings": ' --json @embeddings.json --json '}}'"""
        commands.append(f"curl {body} {base}{CLASSIFY}")
    return commands + [f"curl {base}{MODEL.format(name=name)}" for name in names]
