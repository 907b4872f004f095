"""The Open Inference Protocol over gRPC, and the server, on the event loop of a BentoML worker."""

import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import Message

from avex_serve.errors import InputError, TensorError, UnsupportedError
from avex_serve.service import parsing
from avex_serve.service.credentials import server_credentials
from avex_serve.service.front import Call, Front, GrpcFront
from avex_serve.service.grpc.health import Health
from avex_serve.service.grpc.messages import SERVICE, check_parts, message, message_class
from avex_serve.service.oip import protocol
from avex_serve.service.parsing import BOOL, BYTES
from avex_serve.service.settings import Settings

GRACE_SECONDS: Final = 1.0  # for answers to leave: calls have ended by then, see `avex_serve.service.drain`


class GrpcServer:
    """A running server; `start` makes one."""

    def __init__(self, server: grpc.aio.Server, health: Health) -> None:
        self._server = server
        self._health = health

    @classmethod
    async def start(cls, front: Front) -> "GrpcServer":
        """Serve behind the front.

        Raises:
            InputError: the address or the certificate can't be used.
        """
        settings = front.settings
        credentials = server_credentials(settings)
        server = grpc.aio.server(
            interceptors=[GrpcFront(front)],
            options=[
                ("grpc.so_reuseport", 1),  # workers share the port
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        health = Health(front.ready)
        server.add_generic_rpc_handlers((_Methods(front).handlers(), health.handlers()))
        try:
            if credentials is None:
                server.add_insecure_port(settings.grpc_address)
            else:
                server.add_secure_port(settings.grpc_address, credentials)
        except RuntimeError as error:
            raise InputError(f"gRPC can't listen on {settings.grpc_address}: {error}") from None
        await server.start()
        return cls(server, health)

    def announce_end(self) -> None:
        """Notify those that watch the health that the service is no longer ready."""
        self._health.announce()

    async def stop(self) -> None:
        """Stop; streams of watchers are cut off."""
        await self._server.stop(GRACE_SECONDS)


def check_port_is_free(settings: Settings) -> None:
    """Raise InputError if the port of gRPC is taken.

    Workers share it by SO_REUSEPORT. A forgotten server would silently get a part of the requests. A socket without
    that option can't be bound to the same port.
    """
    family = socket.AF_INET6 if settings.grpc_host.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT are no server
        try:
            probe.bind((str(settings.grpc_host), settings.grpc_port))
        except OSError as error:
            raise InputError(
                f"gRPC can't listen on {settings.grpc_address}: {error.strerror}; "
                "stop what listens there, or set AVEX_GRPC_PORT or AVEX_GRPC_HOST"
            ) from None


class _Methods:
    """The methods of the protocol. Each takes its message as bytes; the front answers their errors."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._repository = front.repository

    def handlers(self) -> grpc.GenericRpcHandler:
        """The handlers of all methods, also of those that are refused."""
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
        handlers["ModelStreamInfer"] = grpc.stream_unary_rpc_method_handler(_refused(protocol.NO_STREAM))
        for name, reason in protocol.REFUSED_METHODS.items():
            handlers[name] = grpc.unary_unary_rpc_method_handler(_refused(reason))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

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
        del fields["parameters"]
        return message_class("ModelMetadataResponse")(**fields)

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
        response: Message = await self._front.infer(partial(self._infer_now, data))
        return response

    def _infer_now(self, data: bytes) -> Any:
        check_parts(data)
        request: Any = message(message_class("ModelInferRequest"), data)
        with self._model(request.model_name, request.model_version) as model:
            answer = model.infer(_parse(request))
        response: Any = message_class("ModelInferResponse")(
            model_name=model.name, model_version=model.version, id=request.id
        )
        for key, parameter in answer.parameters.items():
            field = "bool_param" if isinstance(parameter, bool) else "string_param"
            setattr(response.parameters[key], field, parameter)
        for name, tensor in answer.outputs.items():
            response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
            response.raw_output_contents.append(protocol.to_raw(tensor))
        return response

    def _model(self, name: str, version: str) -> AbstractContextManager[protocol.Model]:
        return protocol.leased_model(self._repository, name, version)


def _parse(request: Any) -> protocol.InferRequest:
    for tensor in request.inputs:
        protocol.refuse_shared_memory(tensor.name, tensor.parameters)
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise TensorError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; send one for each")
    inputs = []
    for index, tensor in enumerate(request.inputs):
        if raw and tensor.HasField("contents"):
            raise TensorError(f"input {tensor.name!r} has both contents and raw_input_contents; send one of them")
        data = (
            parsing.from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index])
            if raw
            else _typed_contents(tensor)
        )
        inputs.append(protocol.InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    return protocol.InferRequest(
        inputs=inputs,
        outputs=[protocol.parse_output(output.name, _parameters(output)) for output in request.outputs],
        query=protocol.parse_parameters(_parameters(request)),
    )


def _typed_contents(tensor: Any) -> np.ndarray | list[bytes]:
    parsing.check_datatype(tensor.name, tensor.datatype)
    if tensor.datatype == BYTES:
        return list(tensor.contents.bytes_contents)
    if tensor.datatype == BOOL:
        return np.array(tensor.contents.bool_contents, dtype=bool)
    return np.array(tensor.contents.fp32_contents, dtype=np.float32)


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
