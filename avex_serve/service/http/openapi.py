"""The OpenAPI document: what every route takes and answers.

It replaces BentoML's, which knows neither the Open Inference Protocol nor bodies that are a recording.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Final, get_args

import msgspec

from avex_serve import __version__
from avex_serve.annotations.formats import FORMATS
from avex_serve.audio.windows import FinalClip
from avex_serve.inference.pipeline import Query
from avex_serve.inference.results import (
    Classification,
    Detection,
    Embedding,
    LabelScore,
    MergeScore,
    Prediction,
    Predictions,
)
from avex_serve.inference.scores import ScoreScale
from avex_serve.service.http import forms

Schema = dict[str, Any]
Options = Mapping[str, tuple[str, Schema]]  # name: description and schema

VERSION: Final = "3.1.0"
KEY: Final = "key"
_KEY_SCHEME: Final[Schema] = {
    "type": "http",
    "scheme": "bearer",
    "description": "one of the keys of the service; none is needed where it has none",
}


_STRING: Final[Schema] = {"type": "string"}
_BOOLEAN: Final[Schema] = {"type": "boolean"}
_ANY: Final[Schema] = {"type": "object"}
# The format is OpenAPI 3.0's: generators of clients take what has none for text.
_BINARY: Final[Schema] = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}
# Empty text and "null" stand for the default.
_NUMBER: Final[Schema] = {"anyOf": [{"type": "number"}, {"enum": ["", "null"]}]}
_BY_LABEL: Final[Schema] = {"type": "object", "additionalProperties": {"type": "number"}}
_THRESHOLD: Final[Schema] = {
    "anyOf": [
        {"type": "number"},
        {"type": "string", "pattern": r"^\{", "contentMediaType": "application/json", "contentSchema": _BY_LABEL},
        {"enum": ["", "null"]},
    ]
}
_COUNT: Final[Schema] = {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["", "null"]}]}
_FINAL_CLIP: Final[Schema] = {"enum": [*get_args(FinalClip), "", "null"]}
_LABELS: Final[Schema] = {"type": "array", "items": _STRING}
_MERGE_SCORE: Final[Schema] = {"enum": [*get_args(MergeScore), "", "null"]}
_CHANNEL: Final[Schema] = {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["mix", "", "null"]}]}

# Options of the routes that take a recording.
_RECORDING: Final[Options] = {
    "model": ("which model to ask; needed if several are served", _STRING),
    "version": ("of the model; by default its newest one", _STRING),
    "overlap": ("seconds that neighbouring windows share; less than a window", _NUMBER),
    "hop": ("seconds from the start of a window to the start of the next, in place of overlap", _NUMBER),
    "final_clip": ("what happens to the end of the recording that is shorter than a window", _FINAL_CLIP),
    "channel": ("which channel to process, from 1; by default mix, the mean of all", _CHANNEL),
}
PREDICT_ALL: Final[Options] = {
    "threshold": (
        "lowest score to report, a number, or JSON of numbers by label; unless top_k is given, by default that of "
        "the model's calibration, else 0.5",
        _THRESHOLD,
    ),
    "top_k": ("report at most this many labels a window", _COUNT),
    "label": ("report this label; send it several times for several", _LABELS),
    "merge": ("join windows of a label that are at most this many seconds apart", _NUMBER),
    "merge_score": ("of joined windows; by default max", _MERGE_SCORE),
    **_RECORDING,
}
PREDICT: Final[Options] = {
    **PREDICT_ALL,
    "probe": ("which head of the bundle to ask; by default its first one", _STRING),
    "format": (
        "of the answer: json, lines of JSON while it is made (stream), or a table; by default as Accept says: "
        + ", ".join(f"{form} for {kind}" for kind, form in forms.ACCEPTED.items() if "*" not in kind),
        {"enum": [*forms.NAMES, "", "null"]},
    ),
    "file": ("name or path of the recording, for tables; by default the file's name in the form", _STRING),
    "timezone": ("for tables: of a time without one, such as Australia/Brisbane or +10:00", _STRING),
}
EMBED: Final[Options] = {
    **_RECORDING,
    "output": ("which embedding of the bundle; by default its first one", _STRING),
}
WAV: Final[Options] = {"channel": _RECORDING["channel"]}


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The JSON body of ``/classify``."""

    model: str | None = None
    version: str | None = None
    embeddings: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "array", "items": {}})]
    threshold: float | dict[str, float] | None = None
    top_k: int | None = None
    probe: str | None = None

    def query(self) -> Query:
        """The options."""
        return msgspec.convert(self, Query, from_attributes=True)


CLASSIFY: Final = tuple(name for name in ClassifyRequest.__struct_fields__ if name != "embeddings")


def document(paths: dict[str, Any], open_paths: Collection[str]) -> Schema:
    """The OpenAPI document of these paths, each with its operations by method; the open paths never need a key."""
    for path, operations in paths.items():
        for method, operation in operations.items():
            operation["operationId"] = _identifier(method, path)
            if path in open_paths:
                operation["security"] = []
    return {
        "openapi": VERSION,
        "info": {
            "title": "avex-serve",
            "version": __version__,
            "description": 'Names the sounds in recordings. Every error of these routes is `{"error": "…"}`. '
            "An answer 503 with `Retry-After` says after how many seconds to send the request again. The header "
            "`X-Request-ID` gives a request a name, in its answer and in the log, and `Request-Timeout` says how "
            "many seconds you wait. `GET /` has the names of the models, and the port of gRPC: that offers the Open "
            "Inference Protocol too, and describes itself (server reflection).",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "security": [{KEY: []}, {}],
        "components": {"schemas": {**_documents(), **_PROTOCOL}, "securitySchemes": {KEY: _KEY_SCHEME}},
    }


def _identifier(method: str, path: str) -> str:
    """A name of the operation for generated clients, such as getV2ModelsByNameReady."""
    words = path.replace("{", "by/").replace("}", "").replace(".", "/").replace("_", "/").split("/")
    return method + ("".join(word.capitalize() for word in words) or "Home")


def _documents() -> dict[str, Schema]:
    """The schemas of our own documents, with the descriptions of their fields."""
    # msgspec supports no union of two lists.
    vectors = {"anyOf": [_list(_list(_NUMBERS)), _list(_NUMBERS)]}
    known = field(metadata={**Embedding.__dataclass_fields__["embeddings"].metadata, **vectors})
    embedding = make_dataclass(
        "Embedding",
        [("embeddings", Any, known)],
        bases=(Embedding,),
        kw_only=True,
        namespace={"__doc__": Embedding.__doc__},
    )
    kinds = (
        *(Prediction, Detection, Predictions, embedding, Classification, LabelScore, ClassifyRequest),
        *forms.EVENTS,
    )
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in kinds:
        schema = schemas[kind.__name__]
        schema["additionalProperties"] = False
        for each in fields(kind) if is_dataclass(kind) else ():
            schema["properties"][each.name].update(each.metadata)
    # msgspec's has `"items": false` after prefixItems, which generators of clients can't read; maxItems says it too.
    del schemas["Embedding"]["properties"]["spans"]["items"]["items"]
    return schemas


# -- operations -----------------------------------------------------------------------------------------------------


def get(summary: str, answer: str | None) -> Schema:
    """A question without parameters, answered by that component; None: by any object."""
    return _operation(summary, _json(_component(answer)))


def flag(summary: str, name: str, *, unready: bool = False) -> Schema:
    """A question answered by a flag of that name."""
    content = _json(_object({name: _BOOLEAN}))
    return _operation(summary, content, others=_unready(content) if unready else None)


def text(summary: str, *, unready: bool = False) -> Schema:
    """A question answered by plain text."""
    return _operation(summary, _TEXT, others=_unready(_TEXT) if unready else None)


def home() -> Schema:
    """The start page."""
    content = {**_json(_component("Home")), "text/html": {"schema": _STRING}}  # generators take the first
    return _operation("What is served, for people (HTML) and programs (JSON)", content)


def recording(summary: str, options: Options, answer: str) -> Schema:
    """A question about a recording, with options in the query or in a form."""
    parameters = [
        {"name": name, "in": "query", "description": description, "schema": schema}
        for name, (description, schema) in options.items()
    ]
    described = {name: {**schema, "description": description} for name, (description, schema) in options.items()}
    form = _object({"audio": {**_BINARY, "description": "the recording, as a file"}}, described)
    form["additionalProperties"] = False
    content = {"application/octet-stream": {"schema": _BINARY}, "multipart/form-data": {"schema": form}}
    return {
        **_operation(summary, _json(_component(answer)), parameters, {"required": True, "content": content}),
        "description": "The recording (WAV, FLAC, OGG, MP3) is the body, whatever its type, or a file of a form. "
        "Options may be in the query or in the form; send each once, but for label.",
    }


def predict() -> Schema:
    """The question about a recording whose answer has several forms."""
    operation = recording("Name the sounds in a recording", PREDICT, "Prediction")
    line = {"oneOf": [_component(each.__name__) for each in forms.EVENTS]}
    tables: Schema = {
        str(each.media_type): {"schema": _BINARY if name == "parquet" else _STRING}
        for name, each in forms.TABLES.items()
    }
    # That of aoef is JSON, and that of ndjson lines of another kind.
    operation["responses"]["200"]["content"] |= {
        **tables,
        **_json(_component("Prediction")),
        forms.LINES_TYPE: {"schema": line},
    }
    operation["responses"]["200"]["headers"] = {
        forms.WARNINGS: {
            "description": "of a table: reasons to doubt it, as a JSON list of sentences",
            "schema": _STRING,
        }
    }
    operation["description"] += (
        " The option format, or else Accept, says whether the answer is a document, a line of JSON for each window "
        "while it is made (the last line says whether that is all), or a table."
    )
    return operation


def classify() -> Schema:
    """A question about embeddings."""
    summary = "Ask an embedding bundle about embeddings, (batch, dim) or (batch, time, dim)"
    body = {"required": True, "content": _json(_component("ClassifyRequest"))}
    return _operation(summary, _json(_component("Classification")), None, body)


def wav() -> Schema:
    """A recording as WAV."""
    operation = recording("A recording as 16-bit WAV at its own rate, one channel", WAV, "Prediction")
    operation["responses"]["200"]["content"] = {"audio/wav": {"schema": _BINARY}}
    return operation


def tables() -> Schema:
    """Detections as a table."""
    columns = {"start": _NUMBERS, "end": _NUMBERS, "score": _NUMBERS, "label": _list({"type": "integer"})}
    described = _object(
        {"name": {**_STRING, "description": "of the file, without a folder"},
         "digest": {**_STRING, "description": "SHA-256 of the file"}, "duration": _SECONDS,
         "labels": _STRINGS, **columns},
        {"head": {**_STRING, "contentEncoding": "base64", "description": "the start of the file, for its metadata"}},
    )  # fmt: skip
    asked = _object(
        {"format": {"enum": list(FORMATS)}, "model": _STRING, "recordings": {**_list(described), "minItems": 1}},
        {
            "version": _STRING,
            "probe": _STRING,
            "overlap": {"type": "number", "minimum": 0},
            "final_clip": {"enum": list(get_args(FinalClip))},
            "channel": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "mix"}]},
            "folder": {**_STRING, "description": "of the recordings, for the table; it is never read"},
            "threshold": {"type": "number"},
            "thresholds": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    )
    return _operation(
        "Detections as a table for other programs",
        _content(_BINARY),
        None,
        {"required": True, "content": _json(asked)},
    )


def model(summary: str, answer: str | None, names: Sequence[str]) -> Schema:
    """A question about the model that these parameters of the path name."""
    missing = {"404": {"description": "no such model or version", "content": _json(_component("Error"))}}
    return _operation(summary, _json(_component(answer)), _path(names), others=missing)


def description() -> Schema:
    """What a client must know of a model."""
    version = {"name": "version", "in": "query", "description": "by default its newest one", "schema": _STRING}
    operation = model("Labels, score scale, windows and audio needs of a model", "Model", ["name"])
    operation["parameters"].append(version)
    return operation


def infer(names: Sequence[str]) -> Schema:
    """Inference by the protocol."""
    binary = {"application/octet-stream": {"schema": _BINARY}}
    length = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "bytes of JSON before the binary tensors; without it the body is all JSON",
        "schema": {"type": "integer", "minimum": 0},
    }
    body = {"required": True, "content": {**_json(_component("InferRequest")), **binary}}
    answer = {**_json(_component("InferResponse")), **binary}
    return _operation("Infer: windows as FP32, or recordings as BYTES", answer, [*_path(names), length], body)


def index() -> Schema:
    """The index of the repository."""
    line = _object({"name": _STRING, "version": _STRING, "state": _STRING, "reason": _STRING})
    body = {"content": _json(_object({}, {"ready": _BOOLEAN}))}
    return _operation("The bundles on disk, and why some are not served", _json(_list(line)), [], body)


def control(summary: str) -> Schema:
    """Load or unload a model."""
    return _operation(summary, _json(_ANY), _path(["name"]), {"content": _json(_ANY)})


def _operation(
    summary: str,
    answer: Schema,
    parameters: list[Schema] | None = None,
    body: Schema | None = None,
    others: dict[str, Schema] | None = None,
) -> Schema:
    operation: Schema = {"summary": summary}
    if parameters is not None:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = body
    operation["responses"] = {
        "200": {"description": "the answer", "content": answer},
        **(others or {}),
        "4XX": {"description": "refused, with the reason", "content": _json(_component("Error"))},
        "default": {"description": "what was wrong, and what was expected", "content": _json(_component("Error"))},
    }
    return operation


def _unready(content: Schema) -> dict[str, Schema]:
    return {"503": {"description": "not ready", "content": content}}


def _path(names: Sequence[str]) -> list[Schema]:
    return [{"name": name, "in": "path", "required": True, "schema": _STRING} for name in names]


def _component(name: str | None) -> Schema:
    return _ANY if name is None else {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _content(schema: Schema) -> Schema:
    return {"application/octet-stream": {"schema": schema}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


_TEXT: Final[Schema] = {"text/plain": {"schema": _STRING}}
_FINITE: Final[Schema] = {"type": "number"}
_NUMBERS: Final[Schema] = _list(_FINITE)
_STRINGS: Final[Schema] = _list(_STRING)
_SHAPE: Final[Schema] = _list({"type": "integer"})
_TENSORS: Final[Schema] = _list(_object({"name": _STRING, "datatype": _STRING, "shape": _SHAPE}))
_INPUT: Final[Schema] = _object(
    {"name": _STRING, "shape": _SHAPE, "datatype": {"enum": ["FP32", "BYTES", "BOOL"]}},
    {
        "parameters": _object({}, {"binary_data_size": {"type": "integer", "minimum": 0}}),
        "data": {
            "description": "numbers, nested as the shape or flat; for BYTES of shape [files] a list of texts, each "
            "the bytes of an encoded recording as base64"
        },
    },
)
_OUTPUT: Final[Schema] = _object(
    {"name": {
        **_STRING,
        "description": "of the metadata, or detections: of recordings, a JSON object for each sound found",
    }},
    {"parameters": _object({}, {
        "classification": {
            "type": "integer", "minimum": 0,
            "description": "answer the largest values of each row, up to this many, as texts value:index:label",
        },
        "binary_data": _BOOLEAN,
    })},
)  # fmt: skip
_REQUEST_PARAMETERS: Final[Schema] = {
    **_object({}, {
        **{name: {**schema, "description": PREDICT[name][0]} for name, schema in {
            "overlap": _FINITE, "hop": _FINITE, "final_clip": {"enum": list(get_args(FinalClip))},
            "channel": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "mix"}]},
            "threshold": {"anyOf": [_FINITE, _STRING]}, "top_k": {"type": "integer", "minimum": 1}, "merge": _FINITE,
            "merge_score": {"enum": list(get_args(MergeScore))},
        }.items()},
        "label": {**_STRING, "description": "report this label in detections, or those of a list in JSON"},
        "probe": {**_STRING, "description": "a head of the bundle: that of detections; other outputs are of all"},
        "binary_data_output": _BOOLEAN,
    }),
    "description": "overlap, hop, final_clip and channel are for recordings (BYTES), and threshold, top_k, label, "
    "merge and merge_score for the output detections; unknown ones are ignored, with a warning in the answer",
}  # fmt: skip
_SECONDS: Final[Schema] = {"type": "number", "description": "seconds"}
_OPTIONAL_AUDIO: Final[Schema] = {
    "description": "what recordings become; null: the model takes embeddings",
    "anyOf": [
        _object({
            "sample_rate": {"type": "integer", "description": "Hz, to which recordings are resampled"},
            "channels": {"const": 1, "description": "recordings are mixed down"},
            "window": _SECONDS,
            "shortest": {"type": "number", "description": "seconds; shorter windows are filled with zeros"},
        }),
        {"type": "null"},
    ],
}  # fmt: skip
_MODEL: Final[Schema] = {
    "name": _STRING, "version": _STRING,
    "kind": {"enum": ["audio", "embedding"]},
    "labels": {"type": "object", "additionalProperties": {"type": "integer"}, "description": "how many, by probe"},
    "trained": _BOOLEAN, "licence": _STRING, "format": _STRING, "device": _STRING, "threads": {"type": "integer"},
}  # fmt: skip
# The messages of the protocol, our description of a model, and errors.
_PROTOCOL: Final[dict[str, Schema]] = {
    "Error": _object({"error": _STRING}),
    "Home": _object({
        "name": _STRING, "version": _STRING, "warnings": _STRINGS,
        "models": _list(_object(_MODEL)),
        "formats": {**_STRINGS, "description": "of /tables; the option format of /predict has its own"},
        "limits": _object({"body_bytes": {"type": "integer"}, "seconds": {"type": "number"}}),
        "grpc_port": {"type": "integer"},
    }),
    "ServerMetadata": _object({"name": _STRING, "version": _STRING, "extensions": _STRINGS}),
    "ModelMetadata": _object(
        {"name": _STRING, "versions": _STRINGS, "platform": _STRING, "inputs": _TENSORS, "outputs": _TENSORS},
        {"parameters": {
            **_ANY,
            "description": "trained; request_parameters (a JSON list: what a request may have); for audio "
            "recordings and detections (how to send and ask for them), sample_rate (Hz), channels, window_seconds "
            "and window_samples; for each probe labels (a JSON list in the order of its scores), score_scale "
            "and threshold (the lowest score of detections by default), and of a calibrated one thresholds and "
            "target_precision, or NAME.labels and so on if there are several",
        }},
    ),
    "Model": _object({
        **_MODEL, "versions": _STRINGS,
        "routes": {
            **_list({"enum": ["/predict", "/embed", "/classify"]}),
            "description": "that ask the model; a head alone answers /predict while its backbone is served",
        },
        "inputs": {
            **_list(_object({"name": _STRING, "shape": _SHAPE})),
            "description": "of the graph: windows of audio, or the embeddings of /classify; -1: any number",
        },
        "audio": _OPTIONAL_AUDIO,
        "probes": _list(_object({
            "name": _STRING,
            "labels": {**_STRINGS, "description": "in the order of the scores"},
            "score_scale": {"enum": list(get_args(ScoreScale))},
            "threshold": {"type": "number", "description": "lowest score that is reported by default"},
            "trained": _BOOLEAN,
        }, {
            "thresholds": {**_BY_LABEL, "description": "by label, where the model's calibration has another one"},
            "target_precision": {"type": "number", "description": "of the detections from these thresholds on"},
        })),
        "embeddings": _list(_object({"output": _STRING, "shape": _SHAPE, "layers": _STRINGS})),
    }),
    "ModelReady": _object({"name": _STRING, "ready": _BOOLEAN}),
    "InferRequest": _object(
        {"inputs": _list(_INPUT)},
        {
            "id": _STRING,
            "parameters": _REQUEST_PARAMETERS,
            "outputs": {**_list(_OUTPUT), "description": "without them, all"},
        },
    ),
    "InferResponse": _object(
        {"model_name": _STRING, "model_version": _STRING, "outputs": _list(_object(
            {"name": _STRING, "datatype": _STRING, "shape": _SHAPE}, {"parameters": _ANY, "data": {
                **_list({"anyOf": [{"type": "number"}, _STRING]}),
                "description": "numbers, row by row; of BYTES texts, such as 0.983124:4:buzz",
            }}
        ))},
        {"id": _STRING, "parameters": {
            **_ANY,
            "description": "for recordings windows (a JSON list: rows of each recording) and spans (a JSON list: "
            "start and end of each row in seconds), and warnings (a JSON list) if there are any; trained, if false",
        }},
    ),
}  # fmt: skip
