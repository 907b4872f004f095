"""What is served, and its metrics.

They replace BentoML's: its page loads a tracker from elsewhere, and its metrics make a series of every path that
a client tries.
"""

from typing import Any, Final

import msgspec
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from avex_serve import __version__
from avex_serve.annotations.formats import FORMATS
from avex_serve.bundles.manifest import EmbeddingInfo, ProbeInfo
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import links
from avex_serve.inference.scores import Selection, score_scale
from avex_serve.service import parsing
from avex_serve.service.front import Front
from avex_serve.service.http import page
from avex_serve.service.metrics import METRICS_TYPE
from avex_serve.service.settings import DEMO_WARNING

# Routes that the start page names.
PREDICT: Final = "/predict"
EMBED: Final = "/embed"
CLASSIFY: Final = "/classify"
MODEL: Final = "/v2/models/{name}"
DESCRIPTION: Final = "/models/{name}"


async def home(front: Front, request: Request) -> Response:
    """For browsers the page, for programs what is served, as JSON."""
    if page.shows_page(front, request.headers):
        return page.document(request)
    with front.repository.lease_those(lambda _: True) as engines:
        models = [describe(engine) for engine in engines]
    settings = front.settings
    document = {
        "name": "avex-serve",
        "version": __version__,
        "warnings": [DEMO_WARNING] if settings.serves_demo else [],
        "models": models,
        "formats": list(FORMATS),
        "limits": {"body_bytes": settings.max_body_bytes, "seconds": settings.max_seconds},
        "grpc_port": settings.grpc_port,
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
    name = request.path_params["name"]
    query = parsing.query_from_text(request.query_params.multi_items(), ["version"])
    with front.repository.lease(name, query.version) as engine:
        document = {
            **describe(engine),
            "versions": front.repository.versions(name),
            "routes": _routes(front, engine),
            "inputs": [{"name": each.name, "shape": each.shape} for each in engine.manifest.inputs],
            "audio": _audio(engine),
            "probes": [_probe(engine, probe) for probe in engine.manifest.probes],
            "embeddings": [_embedding(engine, info) for info in engine.manifest.embeddings],
        }
    return Response(msgspec.json.encode(document), media_type="application/json")


def _routes(front: Front, engine: Engine) -> list[str]:
    """Of the routes for recordings and embeddings, those that ask this model."""
    manifest = engine.manifest
    if manifest.kind == "audio":
        return [*([PREDICT] if manifest.probes else []), *([EMBED] if manifest.embeddings else [])]
    with front.repository.lease_those(lambda source: bool(links(source, manifest))) as sources:
        return [CLASSIFY, PREDICT] if sources else [CLASSIFY]


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
        document["thresholds"] = calibrator.thresholds()
        document["target_precision"] = probe.calibration.target_precision
    return document


def _embedding(engine: Engine, info: EmbeddingInfo) -> dict[str, Any]:
    return {"output": info.output, "shape": engine.manifest.output(info.output).shape[1:], "layers": info.layers}
