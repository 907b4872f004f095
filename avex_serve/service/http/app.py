"""The HTTP routes, in one table. Metrics, logs, spans, OpenAPI document and start page take their names from it.

    POST /predict, /predict_all,    the audio as the body, or as the file ``audio`` of a multipart form
         /embed
    POST /classify                  JSON, for embedding bundles
    /v2…                            the Open Inference Protocol
    /, /models, /metrics,           about the service itself; for browsers, / is a page
         /docs.json
    /page, /wav, /tables            what the page needs

What isn't here, or has no handler here, BentoML answers, except that a path which nobody knows is refused in our
words. Its own handlers of `/predict` and so on are never reached over the network: see
docs/decisions/serving-own-routes.md.
"""

import io
import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.errors import InputError, NotFoundError, StorageError, TooLargeError, UnsupportedError
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import known
from avex_serve.service import parsing
from avex_serve.service.front import CONTROL_BYTES, HEALTH, METRICS, OTHER, Front
from avex_serve.service.http import about, forms, openapi, page
from avex_serve.service.oip import json, protocol

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Handler = Callable[[Front, Request], Awaitable[Response]]


class Endpoint(NamedTuple):
    """A row of the table."""

    methods: tuple[str, ...]
    path: str
    handler: Handler | None  # None: BentoML's
    operation: dict[str, Any] | None  # for the OpenAPI document; None: it leaves the endpoint out


class Routed(NamedTuple):
    """What answers a request."""

    route: str  # the template of its path, or `OTHER`
    app: ASGIApp
    public: bool = False  # whether it needs no key


class Routes:
    """Finds what answers a request.

    It matches by Starlette's routes, as BentoML does behind it, so that no spelling of a path reaches the BentoML
    handlers that they replace.
    """

    def __init__(self, bentoml: ASGIApp) -> None:
        """`bentoml` is BentoML's application."""
        self._bentoml = bentoml
        # Of Starlette's routes the paths and methods are used, and never what they call.
        self._routes = [(Route(each.path, bentoml, methods=each.methods), each) for each in ENDPOINTS]

    def find(self, front: Front, scope: Scope) -> Routed:
        """What answers the request."""
        path: str = scope["path"]
        route, endpoint, child, match = self._match(scope)
        if route is None or endpoint is None:
            if path.endswith("/") and self._match({**scope, "path": path.rstrip("/")})[0] is not None:
                return Routed(OTHER, _leave_out_slash)
            return Routed(OTHER, _refuse_path if path.startswith("/v2/") else self._ask_bentoml)
        name = OTHER if endpoint.operation is None else endpoint.path
        if match is not Match.FULL:
            return Routed(name, partial(_refuse_method, route))
        public = scope["method"] != "POST" and page.is_public(front, endpoint.path, scope)
        scope.update(child)
        handler = endpoint.handler
        return Routed(name, self._bentoml if handler is None else partial(_answer, handler, front), public)

    def _match(self, scope: Scope) -> tuple[Route | None, Endpoint | None, Scope, Match]:
        """The row of the table with this path, if there is one with this method too."""
        best: tuple[Route | None, Endpoint | None, Scope, Match] = (None, None, {}, Match.NONE)
        for route, endpoint in self._routes:
            match, child = route.matches(scope)
            if match.value > best[3].value:
                best = (route, endpoint, child, match)
            if match is Match.FULL:
                break
        return best

    async def _ask_bentoml(self, scope: Scope, receive: Receive, send: Send) -> None:
        unknown = False

        async def sending(message: Message) -> None:
            nonlocal unknown
            unknown = unknown or message.get("status") == 404
            if not unknown:
                await send(message)

        await self._bentoml(scope, receive, sending)
        if unknown:
            await _refuse_path(scope, receive, send)


async def _answer(handler: Handler, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
    response = await handler(front, Request(scope, receive, send))
    await response(scope, receive, send)


# Words of paths that other services have, and the path here.
ELSEWHERE: Final = (
    (re.compile(r"^/v1/models/.+:\w+$"), "/v2/models/{name}/infer, of the Open Inference Protocol, or /predict"),
    (re.compile(r"^/v1/models/."), "/v2/models/{name}"),
    (re.compile(r"^/v1/models/?$"), "/v2/repository/index"),
    (re.compile(r"^/(predictions|invocations)\b"), "/predict"),
    (re.compile(r"^/ping$"), "/livez"),
    (re.compile(r"(labels?|classes|species)$"), about.DESCRIPTION),
    (re.compile(r"openapi|swagger|redoc|^/docs"), "/docs.json"),
)


async def _refuse_path(scope: Scope, _: Receive, __: Send) -> None:
    path = scope["path"][: parsing.QUOTED]
    named = [known for words, known in ELSEWHERE if words.search(path.lower())]
    paths = [each.path for each in ENDPOINTS if each.operation is not None]
    nearest = named or get_close_matches(path.lower(), paths, 1)
    hint = f"; did you mean {nearest[0]}" if nearest else ""
    raise NotFoundError(f"no {path} here{hint}; /docs.json has all paths, and / the models")


async def _refuse_method(route: Route, scope: Scope, _: Receive, __: Send) -> None:
    methods = ", ".join(sorted(route.methods or ()))
    hint = ""
    if scope["method"] == "PUT" and methods == "POST":
        hint = "; curl sends it with --data-binary @FILE, and PUT with -T"
    elif scope["method"] == "OPTIONS":
        hint = "; for pages of other origins, the service must be started with CORS (docs/securing.md)"
    raise HTTPException(405, f"{route.path} takes {methods}, not {scope['method'][:20]}{hint}", {"Allow": methods})


async def _leave_out_slash(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse, and redirect the clients that follow. The place is relative, since a proxy may add to the path."""
    path = scope["path"].rstrip("/")
    place = "../" * (scope["raw_path"].count(b"/") - path.count("/")) + quote(path.rpartition("/")[2])
    if options := scope["query_string"].decode("ascii"):
        place += f"?{options}"
    fault = f"no {scope['path'][: parsing.QUOTED]} here; leave out the slash at its end"
    response = _json({"error": fault}, 307)
    response.headers["Location"] = place
    await response(scope, receive, send)


def _json(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


# -- what requests carry --------------------------------------------------------------------------------------------

AUDIO_FIELD: Final = "audio"
FORM_TYPE: Final = "multipart/form-data"
SEND_FILE: Final = f"send it with one: -F {AUDIO_FIELD}=@FILE, in Python files={{'{AUDIO_FIELD}': open(FILE, 'rb')}}"
SEND_BODY: Final = (
    f"send the file itself: as the body (curl --data-binary @FILE) or in a form (-F {AUDIO_FIELD}=@FILE)"
)
LOSSY_BYTES: Final = 4096  # no compressed file of this size is without three of the 256 bytes: (253 / 256) ** 4096
MAX_FIELDS: Final = 16  # of a form, besides the file; there are fewer options
MAX_FIELD_BYTES: Final = 2**16


class _Sent(NamedTuple):
    """What a request about a recording carries."""

    audio: bytes  # encoded
    options: list[tuple[str, str]]  # of the URL's query and of the form
    file: str | None = None  # the recording's name in a form


async def _read_recording(request: Request) -> _Sent:
    """The recording and the options of a request.

    Raises:
        InputError: a malformed form.
        StorageError: a large file has no room on disk.
    """
    pairs = request.query_params.multi_items()
    if _content_type(request) != FORM_TYPE:
        body = await _read_body(request)
        if _content_type(request).startswith("multipart/"):
            raise InputError(
                f"the body is {_content_type(request)[: parsing.QUOTED]}; expected {FORM_TYPE}, or {SEND_BODY}"
            )
        if _content_type(request) == "application/x-www-form-urlencoded":
            _check_urlencoded(body)
        return _Sent(body, pairs)
    file: str | None = None
    audio: bytes | None = None
    _refuse_encoding(request)
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, field in form.multi_items():
                if name != AUDIO_FIELD and isinstance(field, str):
                    pairs.append((name, field))
                elif isinstance(field, str):
                    raise InputError(f"the form's {AUDIO_FIELD!r} has no file name, so it is no file; {SEND_FILE}")
                elif name == AUDIO_FIELD and isinstance(field, UploadFile) and audio is None:
                    audio, file = await field.read(), field.filename
                else:
                    raise InputError(
                        f"form field {name[: parsing.QUOTED]!r}: expected one file {AUDIO_FIELD!r} and options as "
                        f"text; rename the field: -F {AUDIO_FIELD}=@FILE"
                    )
    except (HTTPException, ValueError) as error:
        raise InputError(_form_fault(str(getattr(error, "detail", error)))) from None
    except OSError as error:  # of the temporary file that holds a large part
        logger.error("a form's file can't be stored: %s", error.strerror)
        raise StorageError("the service has no room on disk for a form; send the recording as the body") from None
    if audio is None:
        raise InputError(f"the multipart body holds no whole file {AUDIO_FIELD!r}; {SEND_FILE}")
    return _Sent(audio, pairs, file)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _form_fault(fault: str) -> str:
    """What is wrong with a form, from the message of Starlette."""
    if "boundary" in fault and "Missing" in fault:
        return "malformed multipart body: its Content-Type has no boundary; let the HTTP client write that header"
    if "exceeded maximum size" in fault or "codec can't decode" in fault:
        return (
            f"malformed multipart body: a part without a file name is text of at most {MAX_FIELD_BYTES} bytes; if "
            f"it is the recording, {SEND_FILE}"
        )
    if "Too many files" in fault:
        return f"the form has several files; expected one, {AUDIO_FIELD!r}: send each recording in its own request"
    if "Too many fields" in fault:
        return f"the form has more than {MAX_FIELDS} fields; expected one file {AUDIO_FIELD!r} and options as text"
    return (
        f"malformed multipart body: {fault.rstrip('.')}; expected parts between the boundary that the Content-Type "
        "names: let the HTTP client write that header and the body"
    )


def _check_urlencoded(body: bytes) -> None:
    """Refuse a file from which `curl -d` has removed zero bytes and line breaks.

    A decoder may read the rest as other audio. Any whole file of that size has such a byte. Text such as base64 has
    none of its own accord, and is refused with its own remedy where it would be decoded.
    """
    is_text = parsing.kind_of(body) not in (None, parsing.RECORDING)
    if len(body) >= LOSSY_BYTES and not is_text and not any(byte in body for byte in b"\0\r\n"):
        raise InputError(
            "the body has neither zero bytes nor line breaks, as `curl -d` and --data remove them; send the file "
            "with --data-binary @FILE"
        )


async def _read_body(request: Request, max_bytes: float = math.inf) -> bytes:
    """The body; HTTPException if it is compressed, TooLargeError if it is larger than this route allows."""
    _refuse_encoding(request)
    body = io.BytesIO()  # joining the pieces at the end would take the memory twice
    async for piece in request.stream():
        if body.tell() + len(piece) > max_bytes:
            raise TooLargeError(f"the body is too large; expected at most {max_bytes} bytes here")
        body.write(piece)
    return body.getvalue()


async def _read_small_body(request: Request) -> bytes:
    """The body of a request that is parsed on the event loop, which a large JSON document would block."""
    return await _read_body(request, CONTROL_BYTES)


def _refuse_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise HTTPException(
            415,
            "compressed requests are not supported; send the body without Content-Encoding: FLAC makes recordings "
            "smaller",
        )


# -- recordings and embeddings --------------------------------------------------------------------------------------

Question = Callable[[Repository, pipeline.Audio, Query], object]


async def _ask(question: Question, options: Collection[str], front: Front, request: Request) -> Response:
    sent = await _read_recording(request)
    query = parsing.query_from_text(sent.options, options)
    return await _send_document(question, front, _opening(sent), query)


async def _predict(front: Front, request: Request) -> Response:
    sent = await _read_recording(request)
    form, options = forms.choose(sent.options, request.headers.get("accept", ""), sent.file)
    query = parsing.query_from_text(options, openapi.PREDICT)
    if form.format == forms.DOCUMENT:
        return await _send_document(pipeline.predict, front, _opening(sent), query)
    if form.format == forms.LINES:
        return await forms.send_lines(front, about.PREDICT, _opening(sent), query)
    return await forms.send_table(front, form, sent.audio, _opening(sent), query)


def _opening(sent: _Sent) -> pipeline.Audio:
    return partial(parsing.open_recording, data=sent.audio, remedy=SEND_BODY)


async def _send_document(question: Question, front: Front, recording: pipeline.Audio, query: Query) -> Response:
    def answer() -> bytes:
        # Encoded in the thread as well: the embeddings of a long recording take seconds.
        return msgspec.json.encode(known(question(front.repository, recording, query)))

    return Response(await front.admission.run(answer), media_type="application/json")


async def _classify(front: Front, request: Request) -> Response:
    if names := list(request.query_params):
        raise InputError(
            f"option {names[0][: parsing.QUOTED]!r} is in the URL; expected it in the JSON, next to embeddings: "
            f"{', '.join(openapi.CLASSIFY)}"
        )
    body = await _read_body(request)

    def classify() -> bytes:
        asked = parsing.document(openapi.ClassifyRequest, body)
        embeddings = parsing.from_numbers("embeddings", asked.embeddings)
        return msgspec.json.encode(known(pipeline.classify(front.repository, embeddings, asked.query())))

    return Response(await front.admission.run(classify), media_type="application/json")


async def _wav(front: Front, request: Request) -> Response:
    sent = await _read_recording(request)
    query = parsing.query_from_text(sent.options, openapi.WAV)
    make = partial(page.decode, _opening(sent), query.channel)
    return await forms.send_pieces(front, page.WAV, make, page.WAV_TYPE)


async def _tables(front: Front, request: Request) -> Response:
    body = await _read_body(request)

    def write() -> tuple[bytes, str]:
        return page.write_table(front.repository, parsing.document(page.TableRequest, body))

    content, name = await front.admission.run(write)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
    return Response(content, media_type="application/octet-stream", headers=headers)


# -- the Open Inference Protocol ------------------------------------------------------------------------------------


def _model(front: Front, request: Request) -> Any:
    path = request.path_params
    return protocol.leased_model(front.repository, path["name"], path.get("version"))


async def _server_metadata(_: Front, __: Request) -> Response:
    return _json(protocol.server_metadata())


async def _live(_: Front, __: Request) -> Response:
    return _json({"live": True})


async def _ready(front: Front, _: Request) -> Response:
    ready = front.ready()
    return _json({"ready": ready}, 200 if ready else 503)


async def _model_metadata(front: Front, request: Request) -> Response:
    with _model(front, request) as model:
        return _json(model.metadata())


async def _model_ready(front: Front, request: Request) -> Response:
    with _model(front, request) as model:
        ready = front.ready()
        return _json({"name": model.name, "ready": ready}, 200 if ready else 503)


async def _model_config(front: Front, request: Request) -> Response:
    with _model(front, request) as model:
        return _json(model.config())


async def _infer(front: Front, request: Request) -> Response:
    body = await _read_body(request)

    def infer() -> json.ResponseBody:
        with _model(front, request) as model:
            length = request.headers.get(json.JSON_LENGTH)
            asked = json.parse_request(body, length, request.query_params.keys())
            return json.dump_answer(model, asked, model.infer(asked.infer))

    answer = await front.admission.run(infer)
    if answer.json_length is None:
        return Response(answer.content, media_type="application/json")
    headers = {json.JSON_LENGTH: str(answer.json_length)}
    return Response(answer.content, media_type="application/octet-stream", headers=headers)


async def _index(front: Front, request: Request) -> Response:
    ready = json.parse_index_request(await _read_small_body(request))
    return _json(protocol.index(front.repository, ready=ready))


async def _load(front: Front, request: Request) -> Response:
    front.check_control()
    protocol.check_load_parameters(json.parse_control_request(await _read_small_body(request)))
    await front.load(request.path_params["name"])
    return _json({})


async def _unload(front: Front, request: Request) -> Response:
    front.check_control()
    json.parse_control_request(await _read_small_body(request))
    await front.unload(request.path_params["name"])
    return _json({})


async def _refuse(reason: str, _: Front, __: Request) -> Response:
    raise UnsupportedError(reason)


# -- the table ------------------------------------------------------------------------------------------------------


async def _document(_: Front, __: Request) -> Response:
    return Response(_description(), media_type="application/json")


@cache
def _description() -> bytes:
    paths = {e.path: {e.methods[0].lower(): e.operation} for e in ENDPOINTS if e.operation is not None}
    return msgspec.json.encode(openapi.document(paths, HEALTH))


def _recordings(path: str, question: Question, options: openapi.Options, summary: str, answer: str) -> Endpoint:
    operation = openapi.recording(summary, options, answer)
    return Endpoint(("POST",), path, partial(_ask, question, options), operation)


def _get(path: str, handler: Handler | None, operation: dict[str, Any]) -> Endpoint:
    return Endpoint(("GET",), path, handler, operation)


def _post(path: str, handler: Handler, operation: dict[str, Any]) -> Endpoint:
    return Endpoint(("POST",), path, handler, operation)


def _models(path: str, *names: str) -> list[Endpoint]:
    return [
        _get(path, _model_metadata, openapi.model("Inputs and outputs of a model", "ModelMetadata", names)),
        _get(f"{path}/ready", _model_ready, openapi.model("Whether a model is ready", "ModelReady", names)),
        _get(f"{path}/config", _model_config, openapi.model("How a model is served", None, names)),
        _post(f"{path}/infer", _infer, openapi.infer(names)),
    ]


REPOSITORY: Final = "/v2/repository/models/{name}"
ENDPOINTS: Final = (
    _get("/", about.home, openapi.home()),
    _post(about.PREDICT, _predict, openapi.predict()),
    _recordings(
        "/predict_all",
        pipeline.predict_all,
        openapi.PREDICT_ALL,
        "The sounds that all heads of a bundle find in a recording",
        "Predictions",
    ),
    _recordings(about.EMBED, pipeline.embed, openapi.EMBED, "Embeddings of a recording, one a window", "Embedding"),
    _post(about.CLASSIFY, _classify, openapi.classify()),
    _post(page.WAV, _wav, openapi.wav()),
    _post(page.TABLES, _tables, openapi.tables()),
    Endpoint(("GET",), page.ASSETS, page.asset, None),
    _get(about.DESCRIPTION, about.model, openapi.description()),
    _get("/v2", _server_metadata, openapi.get("Name, version and extensions of the server", "ServerMetadata")),
    _get("/v2/health/live", _live, openapi.flag("Whether the process is alive", "live")),
    _get("/v2/health/ready", _ready, openapi.flag("Whether requests are accepted", "ready", unready=True)),
    _post("/v2/repository/index", _index, openapi.index()),
    _post(f"{REPOSITORY}/load", _load, openapi.control("Load a model, or load it again")),
    _post(f"{REPOSITORY}/unload", _unload, openapi.control("Stop serving a model")),
    # Before the models: one of these paths looks like a model's.
    *(
        Endpoint(("GET", "POST"), f"/v2{path}", partial(_refuse, reason), None)
        for path, reason in protocol.REFUSED_PATHS.items()
    ),
    *_models(about.MODEL, "name"),
    *_models(f"{about.MODEL}/versions/{{version}}", "name", "version"),
    _get("/livez", None, openapi.text("Whether the process is alive")),
    _get("/healthz", None, openapi.text("As /livez")),
    _get("/readyz", about.readyz, openapi.text("As /v2/health/ready", unready=True)),
    _get(METRICS, about.metrics, openapi.text("Metrics in Prometheus' text format")),
    _get("/docs.json", _document, openapi.get("This document", None)),
    _get("/schema.json", None, openapi.get("The schema that BentoML's client reads", None)),
)
