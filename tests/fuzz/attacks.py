"""Ways to send hostile requests, and what a service must never answer to them."""

import contextlib
import json
import socket
from urllib.parse import quote

import grpc
import httpx
from tritonclient.grpc import service_pb2

from tests.bundles import WINDOW
from tests.clients import SERVICE, rpc
from tests.fuzz import mutations

INFER = "/v2/models/tiny/infer"
CHECK_EVERY = 50  # hostile requests to an honest one
NEVER = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "ABORTED"}
PATHS = (
    "/", "/livez", "/readyz", "/metrics", "/docs.json", "/v2", "/v2/models/tiny", "/v2/models/tiny/config", INFER,
    "/v2/models/tiny/versions/1/infer", "/v2/repository/index", "/v2/repository/models/tiny/load", "/classify",
    "/v2/models/tiny/trace/setting", "/predict", "/embed", "/predict_all", "/schema.json", "/healthz", "/x",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
HTTP = (
    b"POST /predict?top_k=1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b",
    b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
    b"GET /%x HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\nX: %b\r\n\r\n",
)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # preface and empty SETTINGS


class Attacker:
    """Connections to a server."""

    def __init__(self, server, client, channel):
        self.server = server
        self._client = client
        self._channel = channel

    def http(self, method, path, **request):
        """Send it; whatever it is, the answer is right or says what was wrong with the request."""
        answer = self._client.request(method, path, **request)
        check_status(answer.status_code, answer.text)
        if answer.headers.get("content-type") == "application/json" and method != "HEAD":
            json.loads(answer.text, parse_constant=_no_json)

    def grpc(self, method, data, service=SERVICE):
        """Send it; a refusal has a status that blames the request."""
        status = "OK"
        try:
            rpc(self._channel, method, data, service)
        except grpc.RpcError as error:
            status = f"{error.code().name}: {error.details()}"
        assert status.partition(":")[0] not in NEVER, status

    def raw(self, port, data):
        """Send bytes, then nothing more, and read what comes."""
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(2**16):
                answer += piece
        if answer.startswith(b"HTTP/1.1 "):
            check_status(int(answer[9:12]), answer)


def check_status(status, text):
    assert status < 500 or status == 503, (status, text[:500])


def _no_json(name):
    raise AssertionError(f"{name} is no JSON")


def recordings(random, attacker):
    path = random.choice(("/predict", "/predict", "/embed", "/predict_all", "/classify"))
    params = mutations.query(random) if random.random() < 0.3 else None
    headers = mutations.headers(random) if random.random() < 0.2 else None
    attacker.http("POST", path, content=mutations.audio(random), params=params, headers=headers)


def forms(random, attacker):
    body, headers = mutations.form(random)
    attacker.http("POST", random.choice(("/predict", "/embed")), content=body, headers=headers)


def json_tensors(random, attacker):
    document = mutations.spoilt_document(random, mutations.tensors(random))
    attacker.http("POST", INFER, content=mutations.json_bytes(random, document))


def binary_tensors(random, attacker):
    body, headers = mutations.binary_request(random)
    attacker.http("POST", INFER, content=body, headers=headers)


def paths(random, attacker):
    path = mutations.spoilt(random, random.choice(PATHS).encode())
    path = "/" + quote(path.lstrip(b"/"), safe=random.choice(("", "/", "/%")))
    attacker.http(random.choice(METHODS), path, params=mutations.query(random), headers=mutations.headers(random))


def messages(random, attacker):
    """gRPC: inference with wrong tensors and recordings."""
    request = service_pb2.ModelInferRequest(
        model_name=random.choice(("tiny", "tiny", "tiny", "", "\x00", "x" * 9000))
    )
    request.model_version = random.choice(("", "", "", "1", "2", "x"))
    request.id = random.choice(("", "a", "\u2028" * 100))
    for _ in range(random.choice((1, 1, 1, 0, 2))):
        tensor = request.inputs.add(
            name=random.choice(("waveform", "waveform", "waveform", "", "other")),
            datatype=random.choice(("FP32", "FP32", "BYTES", "BYTES", "BOOL", "FP64", "INT64", "", "fp32")),
            shape=random.choice(
                (
                    [1, WINDOW],
                    [1, WINDOW],
                    [1],
                    [],
                    [0],
                    [-1],
                    [-1, -1],
                    [2**62, 4],
                    [2**63 - 1],
                    [WINDOW],
                    [1, 1, WINDOW],
                )
            ),
        )
        match random.randrange(5):
            case 0:
                request.raw_input_contents.append(random.randbytes(random.choice((0, 3, 4 * WINDOW))))
            case 1:
                audio = mutations.audio(random)
                request.raw_input_contents.append(mutations.spoilt(random, len(audio).to_bytes(4, "little") + audio))
            case 2:
                number = random.choice((0.5, float("nan"), float("inf"), 1e38, -1e38))
                tensor.contents.fp32_contents.extend([number] * random.choice((0, 1, WINDOW)))
            case 3:
                tensor.contents.bytes_contents.extend([mutations.audio(random)] * random.choice((1, 1, 2)))
            case 4:
                tensor.contents.int64_contents.extend([2**62] * random.choice((1, WINDOW)))
    for _ in range(random.choice((0, 0, 1, 2))):
        request.outputs.add(name=random.choice(("logits", "scores", "embedding", "", "x")))
        request.outputs[-1].parameters["classification"].int64_param = random.choice((0, 1, -1, 2**62))
    for name in random.sample(
        ("overlap", "probe", "binary_data_output", "", "timeout"), random.choice((0, 0, 1, 2))
    ):
        parameter = request.parameters[name]
        match random.randrange(5):
            case 0:
                parameter.double_param = random.choice((0.01, -1.0, 1e308, float("nan")))
            case 1:
                parameter.int64_param = random.choice((0, -1, 2**62))
            case 2:
                parameter.string_param = random.choice(("linear", "", "x" * 9000, "0.05", "\x00"))
            case 3:
                parameter.bool_param = True
    attacker.grpc("ModelInfer", request.SerializeToString())


def message_bytes(random, attacker):
    """gRPC: bytes that may be no message, to every method."""
    request = service_pb2.ModelInferRequest(model_name="tiny", parameters={"overlap": {"double_param": 0.01}})
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    audio = random.choice(mutations.RECORDINGS)
    request.raw_input_contents.append(len(audio).to_bytes(4, "little") + audio)
    service, method, message = random.choice(
        (
            *[(SERVICE, "ModelInfer", request)] * 6,
            (SERVICE, "ModelMetadata", service_pb2.ModelMetadataRequest(name="tiny", version="1")),
            (SERVICE, "ModelConfig", service_pb2.ModelConfigRequest(name="tiny")),
            (SERVICE, "ModelReady", service_pb2.ModelReadyRequest(name="tiny")),
            (SERVICE, "RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)),
            (SERVICE, "RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="tiny")),
            (SERVICE, "RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="tiny")),
            (SERVICE, "ServerReady", service_pb2.ServerReadyRequest()),
            (SERVICE, "SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="a")),
            ("grpc.health.v1.Health", "Check", service_pb2.ModelReadyRequest(name=SERVICE)),
        )
    )
    data = message.SerializeToString()
    attacker.grpc(method, mutations.spoilt(random, data) if data else random.randbytes(20), service)


def raw_http(random, attacker):
    """HTTP that may be none."""
    audio = random.choice(mutations.RECORDINGS)
    data = random.choice(HTTP) % (len(audio), audio)
    attacker.raw(attacker.server.http_port, mutations.spoilt(random, data))


def raw_grpc(random, attacker):
    """HTTP/2 that may be none."""
    frames = b"".join(
        random.randbytes(2).rjust(3, b"\0") + bytes([random.randrange(11)]) + random.randbytes(random.randrange(300))
        for _ in range(random.randrange(5))
    )
    attacker.raw(attacker.server.grpc_port, mutations.spoilt(random, HTTP2) + frames)


ATTACKS = {
    attack.__name__: attack
    for attack in (
        recordings, forms, json_tensors, binary_tensors, paths, messages, message_bytes, raw_http, raw_grpc
    )
}  # fmt: skip


def run(server, question, attack, random, count):
    """So many requests of one kind, with an honest one in between every so often, which is answered rightly."""
    with (
        httpx.Client(base_url=server.url, timeout=30) as client,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        attacker = Attacker(server, client, channel)
        for index in range(count):
            try:
                attack(random, attacker)
            except Exception as error:
                error.add_note(f"{attack.__name__}, request {index}")
                raise
            if index % CHECK_EVERY == 0:
                question.check(server)
