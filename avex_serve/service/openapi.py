"""The OpenAPI document: every route, what it takes and what it answers.

It stands in place of the one BentoML makes, which knows neither the Open Inference Protocol nor bodies that are a
recording. Its paths are also the names by which metrics and logs call a request.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from pydantic import TypeAdapter

from avex_serve.inference.results import Classification, Embedding, Prediction, Predictions
from avex_serve.service.options import ClassifyRequest
from avex_serve.version import __version__

Options = Mapping[str, tuple[str, dict[str, Any]]]  # name: description and schema

VERSION: Final = "3.1.0"
_DOCUMENTS: Final[tuple[type, ...]] = (
    Prediction,
    Predictions,
    Embedding,
    Classification,
    ClassifyRequest,
)
_REFERENCE: Final = "#/components/schemas/{model}"
_BINARY: Final = {"type": "string", "contentMediaType": "application/octet-stream"}
_NUMBER: Final[dict[str, Any]] = {
    "anyOf": [{"type": "number"}, {"enum": ["", "null"]}]
}  # the text that stands for the default
_COUNT: Final[dict[str, Any]] = {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["", "null"]}]}
_NAME: Final[dict[str, Any]] = {"type": "string"}
_OVERLAP: Final[Options] = {"overlap": ("seconds that neighbouring windows share; less than a window", _NUMBER)}
_AUDIO: Final[Options] = {
    "model": ("which model to ask; needed where several are served", _NAME),
    "version": ("of the model; its newest one by default", _NAME),
    **_OVERLAP,
}
_PREDICT_ALL: Final[Options] = {
    "threshold": ("lowest score to report; 0.5 unless top_k is given", _NUMBER),
    "top_k": ("report at most so many labels a window", _COUNT),
    **_AUDIO,
}
_PREDICT: Final[Options] = {
    **_PREDICT_ALL,
    "probe": ("which head of the bundle to ask; its first one by default", _NAME),
}
_EMBED: Final[Options] = {
    **_AUDIO,
    "output": ("which embedding of the bundle; its first one by default", _NAME),
}


def document() -> dict[str, Any]:
    """The OpenAPI document as JSON."""
    _, schemas = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in _DOCUMENTS], ref_template=_REFERENCE
    )
    return {
        "openapi": VERSION,
        "info": {
            "title": "avex-serve",
            "version": __version__,
            "description": 'Names the sounds in recordings. Every error of these routes is `{"error": "…"}`.',
            "license": {"name": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths(),
        "components": {"schemas": {**schemas["$defs"], **_PROTOCOL}},
    }


@cache
def paths() -> dict[str, Any]:
    """The routes by their templates."""
    model: dict[str, Any] = {}
    for path, parameters in (
        ("/v2/models/{name}", [_path("name")]),
        ("/v2/models/{name}/versions/{version}", [_path("name"), _path("version")]),
    ):
        model[path] = _get("Inputs and outputs of a model", _ref("ModelMetadata"), parameters, missing=True)
        model[f"{path}/ready"] = _get("Whether a model is ready", _ref("ModelReady"), parameters, missing=True)
        model[f"{path}/config"] = _get("How a model is served", _ANY, parameters, missing=True)
        model[f"{path}/infer"] = _infer(parameters)
    return {
        "/": {
            "get": {
                "summary": "What is served, for people (HTML) and programs (JSON)",
                "responses": _answers({"text/html": {"schema": _NAME}, "application/json": {"schema": _ANY}}),
            }
        },
        "/predict": _recording("Name the sounds in a recording", _PREDICT, "Prediction"),
        "/predict_all": _recording("What all heads of a bundle hear in a recording", _PREDICT_ALL, "Predictions"),
        "/embed": _recording("Embeddings of a recording, one a window", _EMBED, "Embedding"),
        "/classify": {
            "post": {
                "summary": "Ask an embedding bundle about embeddings, (batch, dim) or (batch, time, dim)",
                "requestBody": _body({"application/json": {"schema": _ref("ClassifyRequest")}}),
                "responses": _answers(_json(_ref("Classification"))),
            }
        },
        "/v2": _get("Name, version and extensions of the server", _ref("ServerMetadata")),
        "/v2/health/live": _get("Whether the process lives", _flag("live")),
        "/v2/health/ready": _get("Whether requests are taken", _flag("ready"), unready=_json(_flag("ready"))),
        "/v2/repository/index": _control(
            "The bundles on disk, and why some are not served", [], _INDEX, _READY_ONLY
        ),
        "/v2/repository/models/{name}/load": _control("Load a model, or anew", [_path("name")], _ANY, _ANY),
        "/v2/repository/models/{name}/unload": _control("Serve a model no longer", [_path("name")], _ANY, _ANY),
        **model,
        "/livez": _get("Whether the process lives", None),
        "/healthz": _get("As /livez", None),
        "/readyz": _get("As /v2/health/ready", None, unready=_TEXT),
        "/metrics": _get("Metrics in Prometheus' text format", None),
        "/docs.json": _get("This document", _ANY),
        "/schema.json": _get("What BentoML's client needs", _ANY),
    }


_ANY: Final[dict[str, Any]] = {"type": "object"}
_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _flag(name: str) -> dict[str, Any]:
    return _object({name: {"type": "boolean"}})


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=name)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": content}


def _answers(content: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    return {
        "200": {"description": "the answer", "content": content},
        **others,
        "default": {"description": "what was wrong, and what was expected", "content": _json(_ref("Error"))},
    }


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _NAME}


def _query(options: Options) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "description": description, "schema": schema}
        for name, (description, schema) in options.items()
    ]


def _get(
    summary: str,
    schema: dict[str, Any] | None,
    parameters: list[dict[str, Any]] | None = None,
    *,
    missing: bool = False,
    unready: dict[str, Any] | None = None,
) -> dict[str, Any]:
    others: dict[str, Any] = {}
    if missing:
        others["404"] = {"description": "no such model or version", "content": _json(_ref("Error"))}
    if unready is not None:
        others["503"] = {"description": "not ready", "content": unready}
    content = _TEXT if schema is None else _json(schema)
    operation: dict[str, Any] = {"summary": summary, "responses": _answers(content, **others)}
    if parameters:
        operation["parameters"] = parameters
    return {"get": operation}


def _recording(summary: str, options: Options, answer: str) -> dict[str, Any]:
    fields = {name: {**schema, "description": description} for name, (description, schema) in options.items()}
    form = {**_object({"audio": {**_BINARY, "description": "the recording, as a file"}}, fields)}
    form["additionalProperties"] = False
    return {
        "post": {
            "summary": summary,
            "description": "The recording (WAV, FLAC, OGG, MP3) is the body, whatever its type, or a file of a "
            "form. Options stand in the query or in the form, each once.",
            "parameters": _query(options),
            "requestBody": _body({
                "application/octet-stream": {"schema": _BINARY},
                "multipart/form-data": {"schema": form},
            }),
            "responses": _answers(_json(_ref(answer))),
        }
    }  # fmt: skip


def _control(
    summary: str, parameters: list[dict[str, Any]], answer: dict[str, Any], request: dict[str, Any]
) -> dict[str, Any]:
    operation = {"summary": summary, "parameters": parameters, "responses": _answers(_json(answer))}
    return {"post": {**operation, "requestBody": {"content": _json(request)}}}


def _infer(parameters: list[dict[str, Any]]) -> dict[str, Any]:
    binary = {"application/octet-stream": {"schema": _BINARY}}
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "bytes of JSON before the binary tensors; without it the body is all JSON",
        "schema": {"type": "integer", "minimum": 0},
    }
    return {
        "post": {
            "summary": "Infer: windows as FP32, or recordings as BYTES",
            "parameters": [*parameters, length],
            "requestBody": _body({**_json(_ref("InferRequest")), **binary}),
            "responses": _answers({**_json(_ref("InferResponse")), **binary}),
        }
    }


_READY_ONLY: Final = _object({}, {"ready": {"type": "boolean"}})
_INDEX: Final = {
    "type": "array",
    "items": _object({"name": _NAME, "version": _NAME, "state": _NAME, "reason": _NAME}),
}
_STRINGS: Final = {"type": "array", "items": {"type": "string"}}
_SHAPE: Final = {"type": "array", "items": {"type": "integer"}}
_TENSORS: Final = {
    "type": "array",
    "items": _object({"name": _NAME, "datatype": _NAME, "shape": _SHAPE}),
}
_INPUT: Final = _object(
    {"name": _NAME, "shape": _SHAPE, "datatype": {"enum": ["FP32", "BYTES", "BOOL"]}},
    {"parameters": _ANY, "data": {"description": "numbers, nested as the shape or flat; for BYTES base64"}},
)
# What pydantic doesn't know: the messages of the protocol, and errors.
_PROTOCOL: Final[dict[str, Any]] = {
    "Error": _object({"error": {"type": "string"}}),
    "ServerMetadata": _object({"name": _NAME, "version": _NAME, "extensions": _STRINGS}),
    "ModelMetadata": _object(
        {"name": _NAME, "versions": _STRINGS, "platform": _NAME, "inputs": _TENSORS, "outputs": _TENSORS}
    ),
    "ModelReady": _object({"name": _NAME, "ready": {"type": "boolean"}}),
    "InferRequest": _object(
        {"inputs": {"type": "array", "items": _INPUT}},
        {
            "id": _NAME,
            "parameters": _ANY,
            "outputs": {"type": "array", "items": _object({"name": _NAME}, {"parameters": _ANY})},
        },
    ),
    "InferResponse": _object(
        {"model_name": _NAME, "model_version": _NAME, "outputs": {"type": "array", "items": _object(
            {"name": _NAME, "datatype": _NAME, "shape": _SHAPE},
            {"parameters": _ANY, "data": {"type": "array", "items": {"type": "number"}}},
        )}},
        {"id": _NAME, "parameters": _ANY},
    ),
}  # fmt: skip
