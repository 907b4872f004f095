"""The Open Inference Protocol over gRPC, and the server, on the event loop of a BentoML worker."""

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import Message

from avex_serve.errors import AvexServeError, InputError, TensorError
from avex_serve.service import oip, oip_repository
from avex_serve.service.desk import Desk
from avex_serve.service.gate import Gate
from avex_serve.service.grpc_gate import GrpcGate
from avex_serve.service.grpc_health import Health
from avex_serve.service.grpc_messages import SERVICE, decoded, message_class
from avex_serve.service.grpc_parts import check_parts
from avex_serve.service.interception import Call
from avex_serve.service.options import validated
from avex_serve.service.settings import Settings
from avex_serve.service.tls import server_credentials

logger = logging.getLogger("bentoml.avex_serve")

# A status travels in a header, and clients take 8 KiB of headers: a longer one would arrive as another error.
MAX_DETAILS: Final = 1000
GRACE_SECONDS: Final = 1.0  # for answers to leave: calls have ended by then, see `avex_serve.service.drain`


class GrpcServer:
    """A running server; `start` makes one."""

    def __init__(self, server: grpc.aio.Server, health: Health) -> None:
        self._server = server
        self._health = health

    @classmethod
    async def start(
        cls,
        desk: Desk,
        settings: Settings,
        gate: Gate,
        ready: Callable[[], bool],
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> "GrpcServer":
        """Serve what the desk has.

        Args:
            desk: what answers.
            settings: where to listen.
            gate: what calls pass last.
            ready: whether the service takes requests.
            interceptors: what calls pass before the gate, the first one first.

        Raises:
            InputError: the address can't be listened on, or the certificate can't be used.
        """
        credentials = server_credentials(settings)
        server = grpc.aio.server(
            interceptors=[*interceptors, GrpcGate(gate)],
            options=[
                ("grpc.so_reuseport", 1),  # workers share the port
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        health = Health(ready)
        server.add_generic_rpc_handlers((_inference(desk, ready), health.handlers()))
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
        """Tell those who watch the health at once that the service is no longer ready."""
        self._health.look()

    async def stop(self) -> None:
        """Stop; streams of watchers are cut off."""
        await self._server.stop(GRACE_SECONDS)


def check_port_is_free(settings: Settings) -> None:
    """Raise InputError if somebody listens there already.

    Workers share the gRPC port by SO_REUSEPORT, by which a forgotten server would silently take a part of the
    requests. A socket without that option can't be bound beside it.
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


class _Servicer:
    """The methods of the protocol."""

    def __init__(self, desk: Desk, ready: Callable[[], bool]) -> None:
        self._desk = desk
        self._ready = ready
        self._repository = desk.repository

    async def server_live(self, _: Any) -> Message:
        return message_class("ServerLiveResponse")(live=True)

    async def server_ready(self, _: Any) -> Message:
        return message_class("ServerReadyResponse")(ready=self._ready())

    async def server_metadata(self, _: Any) -> Message:
        return message_class("ServerMetadataResponse")(**oip.server_metadata())

    async def model_ready(self, request: Any) -> Message:
        ready = oip_repository.model_ready(self._repository, request.name, request.version)
        return message_class("ModelReadyResponse")(ready=ready and self._ready())

    async def model_metadata(self, request: Any) -> Message:
        with self._model(request.name, request.version) as model:
            fields = asdict(model.metadata())
        del fields["parameters"]
        return message_class("ModelMetadataResponse")(**fields)

    async def model_config(self, request: Any) -> Message:
        with self._model(request.name, request.version) as model:
            return message_class("ModelConfigResponse")(config=model.config())

    async def repository_index(self, request: Any) -> Message:
        models = oip_repository.index(self._repository, ready=request.ready)
        return message_class("RepositoryIndexResponse")(models=models)

    async def repository_model_load(self, request: Any) -> Message:
        oip_repository.check_load_parameters(request.parameters)
        await self._desk.load(request.model_name)
        return message_class("RepositoryModelLoadResponse")()

    async def repository_model_unload(self, request: Any) -> Message:
        await self._desk.unload(request.model_name)
        return message_class("RepositoryModelUnloadResponse")()

    async def model_infer(self, data: bytes) -> Message:
        """Takes the message as it came: decoded, it would take its place in memory twice while it waits."""
        response: Message = await self._desk.serve(partial(self._infer, data))
        return response

    def _infer(self, data: bytes) -> Any:
        check_parts(data)
        request: Any = decoded(message_class("ModelInferRequest"), data)
        with self._model(request.model_name, request.model_version) as model:
            answer = model.infer(_parse(request))
        response: Any = message_class("ModelInferResponse")(
            model_name=model.name, model_version=model.version, id=request.id
        )
        for key, value in answer.parameters.items():
            field = "bool_param" if isinstance(value, bool) else "string_param"
            setattr(response.parameters[key], field, value)
        for name, tensor in answer.outputs.items():
            response.outputs.add(name=name, datatype=tensor.datatype, shape=tensor.array.shape)
            response.raw_output_contents.append(oip.to_raw(tensor))
        return response

    def _model(self, name: str, version: str) -> AbstractContextManager[oip.Model]:
        return oip_repository.leased_model(self._repository, name, version)


def _parse(request: Any) -> oip.InferRequest:
    for tensor in request.inputs:
        oip.refuse_shared_memory(tensor.name, tensor.parameters)
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise TensorError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; send one for each")
    inputs = []
    for index, tensor in enumerate(request.inputs):
        if raw and tensor.HasField("contents"):
            raise TensorError(f"input {tensor.name!r} has both contents and raw_input_contents; send one of them")
        data = (
            oip.from_raw(tensor.name, tensor.datatype, tensor.shape, raw[index]) if raw else _typed_contents(tensor)
        )
        inputs.append(oip.InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    return oip.InferRequest(
        inputs=inputs,
        outputs=[oip.parse_output(output.name, _parameters(output)) for output in request.outputs],
        parameters=validated(oip.InferParameters, _parameters(request)),
    )


def _typed_contents(tensor: Any) -> np.ndarray | list[bytes]:
    oip.check_datatype(tensor.name, tensor.datatype)
    if tensor.datatype == oip.BYTES:
        return list(tensor.contents.bytes_contents)
    if tensor.datatype == oip.BOOL:
        return np.array(tensor.contents.bool_contents, dtype=bool)
    return np.array(tensor.contents.fp32_contents, dtype=np.float32)


def _parameters(message: Any) -> dict[str, Any]:
    values = {}
    for key, parameter in message.parameters.items():
        if choice := parameter.WhichOneof("parameter_choice"):
            values[key] = getattr(parameter, choice)
    return values


def _inference(desk: Desk, ready: Callable[[], bool]) -> grpc.GenericRpcHandler:
    servicer = _Servicer(desk, ready)
    methods: dict[str, Callable[[Any], Awaitable[Message]]] = {
        "ServerLive": servicer.server_live,
        "ServerReady": servicer.server_ready,
        "ServerMetadata": servicer.server_metadata,
        "ModelReady": servicer.model_ready,
        "ModelMetadata": servicer.model_metadata,
        "ModelConfig": servicer.model_config,
        "RepositoryIndex": servicer.repository_index,
        "RepositoryModelLoad": servicer.repository_model_load,
        "RepositoryModelUnload": servicer.repository_model_unload,
    }
    handlers = {
        name: _handler(name, _decoding(message_class(f"{name}Request"), method)) for name, method in methods.items()
    }
    handlers["ModelInfer"] = _handler("ModelInfer", servicer.model_infer)
    handlers["ModelStreamInfer"] = grpc.stream_unary_rpc_method_handler(_refusal(oip_repository.NO_STREAM))
    for name, reason in oip_repository.REFUSED_METHODS.items():
        handlers[name] = grpc.unary_unary_rpc_method_handler(_refusal(reason))
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _decoding(
    request_class: type[Message], method: Callable[[Any], Awaitable[Message]]
) -> Callable[[bytes], Awaitable[Message]]:
    async def call(data: bytes) -> Message:
        return await method(decoded(request_class, data))

    return call


def _handler(name: str, method: Callable[[bytes], Awaitable[Message]]) -> grpc.RpcMethodHandler:
    """What answers a call, with every error as a status."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Message:
        try:
            return await method(data)
        except AvexServeError as error:
            status, details = grpc.StatusCode[error.grpc_status], str(error)[:MAX_DETAILS]
        except Exception as error:
            logger.error("unexpected error in %s", name, exc_info=error)
            status, details = grpc.StatusCode.INTERNAL, "unexpected error; the server's log has the details"
        await context.abort(status, details)
        raise AssertionError("abort raises")

    serializer = message_class(f"{name}Response").SerializeToString
    return grpc.unary_unary_rpc_method_handler(call, response_serializer=serializer)


def _refusal(reason: str) -> Call:
    async def call(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)

    return call
