"""The HTTP routes that answer clients, in front of BentoML's own.

BentoML's handlers of the same paths are never reached over the network: see docs/decisions/serving-own-routes.md.

    POST /predict, /predict_all,    the audio as the body, or as the file ``audio`` of a multipart form
         /embed
    POST /classify                  JSON, for embedding bundles
    /v2…                            the Open Inference Protocol

Every error is ``{"error": "<what was wrong>"}``.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from avex_serve.audio.reader import open_audio
from avex_serve.errors import (
    AvexServeError,
    InputError,
    NotFoundError,
    StorageError,
    TooLargeError,
    UnsupportedError,
)
from avex_serve.inference import pipeline
from avex_serve.inference.results import Classification, Embedding, Prediction, Predictions
from avex_serve.service import oip, oip_json, oip_repository
from avex_serve.service.desk import Desk
from avex_serve.service.gate import CONTROL_BYTES
from avex_serve.service.options import (
    AudioOptions,
    ClassifyRequest,
    EmbedOptions,
    PredictAllOptions,
    PredictOptions,
    validated,
)

logger = logging.getLogger("bentoml.avex_serve")  # BentoML drops the information of loggers that are not its own

Options = TypeVar("Options", bound=AudioOptions)

AUDIO_FIELD: Final = "audio"
MAX_FIELDS: Final = 16  # of a form, besides the file; there are fewer options
MAX_FIELD_BYTES: Final = 2**16
MODEL: Final = "/v2/models/{name}"
VERSION: Final = "/v2/models/{name}/versions/{version}"


class OwnRoutes:
    """ASGI middleware: answers its routes and passes everything else on.

    It matches with Starlette's own router, as BentoML does behind it, so that no spelling of a path slips through
    to the handlers that it covers.
    """

    def __init__(self, app: ASGIApp, desk: Callable[[], Desk], ready: Callable[[], bool]) -> None:
        """Both are called with each request, for the bundles are opened after the application is built.

        Args:
            app: what answers other requests.
            desk: what answers these.
            ready: whether the service takes requests.
        """
        self._app = app
        self._desk = desk
        self._is_ready = ready
        self._router = ExceptionMiddleware(
            Router(self._routes(), default=self._pass_on, redirect_slashes=False),
            {HTTPException: _answer_fault, Exception: _answer_fault},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app = self._router if scope["type"] == "http" else self._app
        await app(scope, receive, send)

    def _routes(self) -> list[Route]:
        routes = [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/predict_all", self._predict_all, methods=["POST"]),
            Route("/embed", self._embed, methods=["POST"]),
            Route("/classify", self._classify, methods=["POST"]),
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self._load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self._unload, methods=["POST"]),
        ]
        for path, reason in oip_repository.REFUSED_PATHS.items():
            routes.append(Route(f"/v2{path}", partial(_refuse, reason), methods=["GET", "POST"]))
        for path in (MODEL, VERSION):
            routes += [
                Route(path, self._model_metadata),
                Route(f"{path}/ready", self._model_ready),
                Route(f"{path}/config", self._model_config),
                Route(f"{path}/infer", self._infer, methods=["POST"]),
            ]
        return routes

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/v2/"):
            raise NotFoundError(f"no {scope['path']} in the Open Inference Protocol as served here")
        await self._app(scope, receive, send)

    async def _predict(self, request: Request) -> Response:
        audio, options = await _read_audio(request, PredictOptions)
        desk = self._desk()

        def predict() -> Prediction:
            return pipeline.predict(desk.repository, partial(open_audio, audio), options.query())

        return await _document_of(desk, predict)

    async def _predict_all(self, request: Request) -> Response:
        audio, options = await _read_audio(request, PredictAllOptions)
        desk = self._desk()

        def predict_all() -> Predictions:
            return pipeline.predict_all(desk.repository, partial(open_audio, audio), options.query())

        return await _document_of(desk, predict_all)

    async def _embed(self, request: Request) -> Response:
        audio, options = await _read_audio(request, EmbedOptions)
        desk = self._desk()

        def embed() -> Embedding:
            return pipeline.embed(desk.repository, partial(open_audio, audio), options.query())

        return await _document_of(desk, embed)

    async def _classify(self, request: Request) -> Response:
        body = await _read_body(request)
        desk = self._desk()

        def classify() -> Classification:
            asked = validated(ClassifyRequest, body)
            embeddings = oip.from_numbers("embeddings", asked.embeddings)
            return pipeline.classify(desk.repository, embeddings, asked.query())

        return await _document_of(desk, classify)

    async def _server_metadata(self, _: Request) -> Response:
        return JSONResponse(oip.server_metadata())

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _: Request) -> Response:
        ready = self._is_ready()
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def _model_metadata(self, request: Request) -> Response:
        with self._model(request) as model:
            return JSONResponse(oip_json.dump_metadata(model.metadata()))

    async def _model_ready(self, request: Request) -> Response:
        with self._model(request) as model:
            ready = self._is_ready()
            return JSONResponse({"name": model.name, "ready": ready}, status_code=200 if ready else 503)

    async def _model_config(self, request: Request) -> Response:
        with self._model(request) as model:
            return JSONResponse(model.config())

    async def _infer(self, request: Request) -> Response:
        body = await _read_body(request)

        def infer() -> oip_json.Body:
            with self._model(request) as model:
                asked = oip_json.parse_request(body, request.headers.get(oip_json.JSON_LENGTH))
                return oip_json.dump_answer(model, asked, model.infer(asked.infer))

        answer = await self._desk().serve(infer)
        if answer.json_length is None:
            return Response(answer.content, media_type="application/json")
        headers = {oip_json.JSON_LENGTH: str(answer.json_length)}
        return Response(answer.content, media_type="application/octet-stream", headers=headers)

    async def _index(self, request: Request) -> Response:
        asked = oip_json.parse_index_request(await _read_small_body(request))
        return JSONResponse(oip_repository.index(self._desk().repository, ready=asked.ready))

    async def _load(self, request: Request) -> Response:
        desk = self._desk()
        desk.check_control()
        asked = oip_json.parse_control_request(await _read_small_body(request))
        oip_repository.check_load_parameters(asked.parameters)
        await desk.load(request.path_params["name"])
        return JSONResponse({})

    async def _unload(self, request: Request) -> Response:
        desk = self._desk()
        desk.check_control()
        oip_json.parse_control_request(await _read_small_body(request))
        await desk.unload(request.path_params["name"])
        return JSONResponse({})

    def _model(self, request: Request) -> AbstractContextManager[oip.Model]:
        path = request.path_params
        return oip_repository.leased_model(self._desk().repository, path["name"], path.get("version"))


async def _refuse(reason: str, _: Request) -> Response:
    raise UnsupportedError(reason)


async def _read_audio(request: Request, options: type[Options]) -> tuple[bytes, Options]:
    """The encoded recording and the options, which may stand in the query and in form fields."""
    pairs = request.query_params.multi_items()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return await _read_body(request), options.from_text(pairs)
    audio: bytes | None = None
    _refuse_encoding(request)
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                if name != AUDIO_FIELD and isinstance(value, str):
                    pairs.append((name, value))
                elif name == AUDIO_FIELD and isinstance(value, UploadFile) and audio is None:
                    audio = await value.read()
                else:
                    raise InputError(f"form field {name!r}: expected one file {AUDIO_FIELD!r} and options as text")
    except (MultiPartException, ValueError) as error:
        raise InputError(f"malformed multipart body: {error}") from None
    except OSError as error:  # of the temporary file that holds a large part
        logger.error("a form's file can't be stored: %s", error.strerror)
        raise StorageError("the service has no room on disk for a form; send the recording as the body") from None
    if audio is None:
        raise InputError(
            f"the multipart body holds no whole file {AUDIO_FIELD!r}; send it as -F {AUDIO_FIELD}=@FILE"
        )
    return audio, options.from_text(pairs)


async def _read_body(request: Request) -> bytes:
    _refuse_encoding(request)
    return await request.body()


async def _read_small_body(request: Request) -> bytes:
    """The body of a request that is answered on the event loop, which a large JSON document would block."""
    _refuse_encoding(request)
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > CONTROL_BYTES:
            raise TooLargeError(f"the body is larger than the {CONTROL_BYTES} bytes that are taken here")
    return body


def _refuse_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "compressed requests are not taken; send the body without Content-Encoding")


async def _document_of(desk: Desk, work: Callable[[], object]) -> Response:
    # Written in the thread as well: the embeddings of a long recording take seconds.
    document = await desk.serve(lambda: msgspec.json.encode(work()))
    return Response(document, media_type="application/json")


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


async def _answer_fault(request: Request, error: Exception) -> Response:
    match error:
        case AvexServeError():
            if error.http_status == 500:
                logger.error("%s: %s", request.url.path, error)
            return _error(str(error), error.http_status, dict(error.http_headers))
        case HTTPException():
            return _error(error.detail, error.status_code, dict(error.headers or {}))
        case ClientDisconnect():
            return _error("the client closed the connection before its request was complete", 400)
        case _:
            logger.error("unexpected error in %s", request.url.path, exc_info=error)
            return _error("unexpected error; the server's log has the details", 500)
