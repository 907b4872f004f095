"""The Open Inference Protocol over gRPC, and the server, on the event loop of a BentoML worker."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc._cython import cygrpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE

from avex_serve.errors import InputError, TensorError, TooLargeError, UnsupportedError
from avex_serve.scheduling.admission import Pieces
from avex_serve.scheduling.request import current
from avex_serve.service import parsing
from avex_serve.service.credentials import server_credentials
from avex_serve.service.front import LAST_SECONDS, OTHER, Front, deliver
from avex_serve.service.grpc.front import MAX_DETAILS, STREAM, Call, GrpcFront
from avex_serve.service.grpc.health import Health
from avex_serve.service.grpc.messages import MAX_PARTS, SERVICE, message, message_class, split
from avex_serve.service.grpc.reflection import REFLECTION, Reflection
from avex_serve.service.oip import protocol
from avex_serve.service.parsing import BOOL, BYTES, FP32

# gRPC's library writes what clients send into the log at the levels below, unescaped. It reads this when it starts.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

OPTIONS: Final = (
    ("grpc.so_reuseport", 1),  # workers share the port
    ("grpc.max_send_message_length", -1),
    # Compressed messages are refused (UNIMPLEMENTED): gRPC inflates one before anything looks at it.
    ("grpc.compression_enabled_algorithms_bitset", 1),  # only the lack of compression
    ("grpc.per_message_decompression", 0),
    ("grpc.max_allowed_incoming_connections", 1000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 100),  # of a connection; its client keeps further calls back
    # Calls that have arrived and wait for the event loop: of clients who ignore the limit on metadata, 2 MB each.
    ("grpc.server.max_pending_requests", 256),
    ("grpc.server.max_pending_requests_hard_limit", 256),
    # Connections that don't begin as HTTP/2 does, or whose client has gone without a word.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
NUMBERS: Final = 10_000  # which are copied from a message in less than a millisecond
_RAW_BYTES: Final = {FP32: 4, BOOL: 1}  # of an element
_CONTENTS: Final = {FP32: "fp32_contents", BOOL: "bool_contents", BYTES: "bytes_contents"}

GRACE_SECONDS: Final = 1.0  # for answers to leave: calls have ended by then, see `avex_serve.service.drain`


logger = logging.getLogger(__name__)


class GrpcServer:
    """A server that starts again if it ends by itself; `start` makes one."""

    _server: grpc.aio.Server
    _running: asyncio.Task[None]
    _stopping = False

    def __init__(self, front: Front) -> None:
        self._front = front
        self._health = Health(front.ready)
        self._reflection = Reflection()

    @classmethod
    async def start(cls, front: Front) -> "GrpcServer":
        """Serve behind the front.

        Raises:
            InputError: the address or the certificate can't be used.
        """
        server = cls(front)
        server._server = await server._listen()
        server._running = asyncio.create_task(server._keep_running())
        front.alive.append(lambda: not server._running.done())
        return server

    async def _listen(self) -> grpc.aio.Server:
        settings = self._front.settings
        credentials = server_credentials(settings)
        server = grpc.aio.server(
            interceptors=[GrpcFront(self._front)],
            options=[*OPTIONS, ("grpc.max_receive_message_length", settings.max_body_bytes)],
        )
        server.add_registered_method_handlers(SERVICE, _Methods(self._front).handlers())
        server.add_registered_method_handlers(HEALTH_SERVICE, self._health.handlers())
        for name in REFLECTION:
            server.add_registered_method_handlers(name, self._reflection.handlers())
        try:
            if credentials is None:
                server.add_insecure_port(settings.grpc_address)
            else:
                server.add_secure_port(settings.grpc_address, credentials)
        except RuntimeError as error:
            raise InputError(f"gRPC can't listen on {settings.grpc_address}: {error}") from None
        await server.start()
        return server

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._server.wait_for_termination()
            except Exception as error:
                logger.error("gRPC's server ended and is started again", exc_info=error)
            if self._stopping:
                return
            self._server = await self._listen()

    def announce_end(self) -> None:
        """Notify those that watch the health that the service is no longer ready."""
        self._health.announce()

    async def stop(self) -> None:
        """Stop; streams of watchers are cut off."""
        self._stopping = True
        await self._server.stop(GRACE_SECONDS)


class _Server(cygrpc.AioServer):  # type: ignore[misc]
    """grpc.aio's server with another way for unknown methods, which are those that aren't registered.

    grpc.aio decodes the path of their calls in the loop that accepts all calls: a path that was not UTF-8 ended the
    server. Here no path is read, and all are calls of one unknown method.
    """

    def __init__(self, loop: Any, pool: Any, handlers: Any, interceptors: Any, *others: Any) -> None:
        super().__init__(loop, pool, handlers, interceptors, *others)
        self._interceptors_of_unknown = tuple(interceptors or ())
        self._unknown: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            state = await super()._request_call()
            resolver = cygrpc._MethodResolver([], {})
            call = cygrpc._handle_rpc(OTHER, resolver, self._interceptors_of_unknown, state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(call, state, loop, OTHER))
            self._unknown.add(task)
            task.add_done_callback(self._unknown.discard)


def _is_fault(record: logging.LogRecord) -> bool:
    """Whether gRPC logs a fault of the service. It also logs a traceback of what clients cause."""
    return not str(record.msg).startswith(("Invalid encoding", "ExecuteBatchError"))


cygrpc.AioServer = _Server
logging.getLogger(cygrpc.__name__).addFilter(_is_fault)


class _Methods:
    """The methods of the protocol. Each takes its message as bytes; the front answers their errors."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._repository = front.repository

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handlers of all methods by name, also of those that are refused."""
        methods: dict[str, Callable[[Any], Awaitable[Message]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        handlers = {
            name: _handler(name, _parsed(message_class(f"{name}Request"), method))
            for name, method in methods.items()
        }
        handlers["ModelInfer"] = _handler("ModelInfer", self._infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        for name, reason in protocol.REFUSED_METHODS.items():
            handlers[name] = grpc.unary_unary_rpc_method_handler(_refused(reason))
        return handlers

    async def _server_live(self, _: Any) -> Message:
        return message_class("ServerLiveResponse")(live=True)

    async def _server_ready(self, _: Any) -> Message:
        return message_class("ServerReadyResponse")(ready=self._front.ready())

    async def _server_metadata(self, _: Any) -> Message:
        return message_class("ServerMetadataResponse")(**protocol.server_metadata())

    async def _model_ready(self, request: Any) -> Message:
        ready = protocol.model_ready(self._repository, request.name, request.version)
        return message_class("ModelReadyResponse")(ready=ready and self._front.ready())

    async def _model_metadata(self, request: Any) -> Message:
        with self._model(request.name, request.version) as model:
            fields = asdict(model.metadata())
        parameters = fields.pop("parameters")
        response = message_class("ModelMetadataResponse")(**fields)
        _set_parameters(response, parameters)
        return response

    async def _model_config(self, request: Any) -> Message:
        with self._model(request.name, request.version) as model:
            return message_class("ModelConfigResponse")(config=model.config())

    async def _index(self, request: Any) -> Message:
        index = protocol.index(self._repository, ready=request.ready)
        return message_class("RepositoryIndexResponse")(models=index)

    async def _load(self, request: Any) -> Message:
        protocol.check_load_parameters(request.parameters)
        await self._front.load(request.model_name)
        return message_class("RepositoryModelLoadResponse")()

    async def _unload(self, request: Any) -> Message:
        await self._front.unload(request.model_name)
        return message_class("RepositoryModelUnloadResponse")()

    async def _infer(self, data: bytes) -> Message:
        # Parsed only in its slot: a parsed message would take its memory twice while it waits.
        response: Message = await self._front.admission.run(partial(self._infer_now, data))
        return response

    def _infer_now(self, data: bytes) -> Any:
        request, raw = _request(data)
        with self._model(request.model_name, request.model_version) as model:
            answer = model.infer(_parse(request, raw))
        response = message_class("ModelInferResponse")()
        _fill(response, model, request.id, answer)
        return response

    async def _stream_infer(self, data: bytes, context: grpc.aio.ServicerContext) -> str:
        """Answer one request of a stream, with an error too; returns the status."""
        begun = False

        async def send(responses: list[bytes]) -> None:
            nonlocal begun
            for response in responses:
                await context.write(response)
                begun = True

        if (error := await deliver(self._front.admission.stream(partial(self._parts, data)), send, STREAM)) is None:
            return str(grpc.StatusCode.OK.name)
        text = f"{error}; the responses so far are a part of the answer" if begun else str(error)
        failure: Any = message_class("ModelStreamInferResponse")(error_message=text[:MAX_DETAILS])
        with contextlib.suppress(InputError):  # of a message that is none
            failure.infer_response.id = _request(data)[0].id
        _set_parameters(failure.infer_response, {protocol.FINAL: True})
        async with asyncio.timeout(LAST_SECONDS):  # a client that doesn't read must not keep the request
            await context.write(failure.SerializeToString())
        return error.grpc_status

    def _parts(self, data: bytes) -> Pieces:
        request, raw = _request(data)
        with self._model(request.model_name, request.model_version) as model:
            for answer in model.stream(_parse(request, raw)):
                response: Any = message_class("ModelStreamInferResponse")()
                _fill(response.infer_response, model, request.id, answer)
                yield response.SerializeToString()

    def _model(self, name: str, version: str) -> AbstractContextManager[protocol.Model]:
        return protocol.leased_model(self._repository, name, version)


def _request(data: bytes) -> tuple[Any, list[memoryview]]:
    """A ModelInferRequest, and its raw contents."""
    rest, raw = split(data)
    return message(message_class("ModelInferRequest"), rest), raw


def _fill(response: Any, model: protocol.Model, identity: str, answer: protocol.InferAnswer) -> None:
    """Make the answer to the request of that id a ModelInferResponse."""
    response.model_name, response.model_version, response.id = model.name, model.version, identity
    _set_parameters(response, answer.parameters)
    for name, tensor in answer.outputs.items():
        response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
        response.raw_output_contents.append(protocol.to_raw(tensor))


def _parse(request: Any, raw: Sequence[memoryview]) -> protocol.InferRequest:
    for tensor in request.inputs:
        protocol.refuse_shared_memory(tensor.name, tensor.parameters)
    if raw and len(raw) != len(request.inputs):
        raise TensorError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; send one for each")
    inputs = []
    for index, tensor in enumerate(request.inputs):
        if raw and tensor.HasField("contents"):
            raise TensorError(f"input {tensor.name!r} has both contents and raw_input_contents; send one of them")
        current().checkpoint()
        data = _raw_contents(tensor, raw[index]) if raw else _typed_contents(tensor)
        inputs.append(protocol.InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    parameters = _parameters(request)
    return protocol.InferRequest(
        inputs=inputs,
        outputs=[protocol.parse_output(output.name, _parameters(output)) for output in request.outputs],
        misplaced=protocol.find_misplaced([each.parameters for each in (*request.inputs, *request.outputs)]),
        query=protocol.parse_parameters(parameters),
        given=tuple(parameters),
    )


def _raw_contents(tensor: Any, raw: memoryview) -> np.ndarray | list[bytes]:
    if tensor.datatype in _RAW_BYTES:
        _check_count(tensor, len(raw) // _RAW_BYTES[tensor.datatype])
    elif tensor.datatype == BYTES and parsing.elements(tensor.name, tensor.shape) > MAX_PARTS:
        raise TooLargeError(
            f"input {tensor.name!r} has more than {MAX_PARTS} elements; send them in several requests"
        )
    return parsing.from_raw(tensor.name, tensor.datatype, tensor.shape, raw)


def _typed_contents(tensor: Any) -> np.ndarray | list[bytes]:
    parsing.check_datatype(tensor.name, tensor.datatype)
    field = _CONTENTS[tensor.datatype]
    values = getattr(tensor.contents, field)
    if not values and (sent := tensor.contents.ListFields()):
        raise TensorError(
            f"input {tensor.name!r} of type {tensor.datatype} has {sent[0][0].name}; expected {field}, or "
            "raw_input_contents"
        )
    if tensor.datatype == BYTES:
        return list(values)
    _check_count(tensor, len(values))
    array = np.empty(len(values), dtype=bool if tensor.datatype == BOOL else np.float32)
    for start in range(0, len(values), NUMBERS):
        current().checkpoint()
        array[start : start + NUMBERS] = values[start : start + NUMBERS]
    return array


def _check_count(tensor: Any, count: int) -> None:
    """Refuse elements that don't fit the shape, before they are copied."""
    if count != parsing.elements(tensor.name, tensor.shape):
        raise parsing.wrong_count(tensor.name, tensor.shape, count)


def _set_parameters(message: Any, parameters: protocol.Parameters) -> None:
    fields = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, parameter in parameters.items():
        setattr(message.parameters[key], fields[type(parameter)], parameter)


def _parameters(message: Any) -> dict[str, Any]:
    values = {}
    for key, parameter in message.parameters.items():
        if choice := parameter.WhichOneof("parameter_choice"):
            values[key] = getattr(parameter, choice)
    return values


def _parsed(
    kind: type[Message], method: Callable[[Any], Awaitable[Message]]
) -> Callable[[bytes], Awaitable[Message]]:
    async def call(data: bytes) -> Message:
        return await method(message(kind, data))

    return call


def _handler(name: str, method: Callable[[bytes], Awaitable[Message]]) -> grpc.RpcMethodHandler:
    async def call(data: bytes, _: grpc.aio.ServicerContext) -> Message:
        return await method(data)

    serializer = message_class(f"{name}Response").SerializeToString
    return grpc.unary_unary_rpc_method_handler(call, response_serializer=serializer)


def _refused(reason: str) -> Call:
    async def call(_: Any, __: grpc.aio.ServicerContext) -> None:
        raise UnsupportedError(reason)

    return call
