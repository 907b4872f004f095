"""gRPC: calls whose message is damaged, has wrong tensors, or is none on the wire of protobuf."""

from tritonclient.grpc import service_pb2

from tests import http2
from tests.bundles import WINDOW
from tests.clients import SERVICE
from tests.fuzz import mutations, recordings
from tests.fuzz.mutations import MODEL

WINDOW_BYTES = 60_000  # that a client of HTTP/2 may send before the server has allowed more
VARINTS = [http2.varint(number) for number in (0, 1, 2, 127, 128, WINDOW, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**70)]


# Methods, with an honest message to each.
HONEST = (
    (SERVICE, "ModelMetadata", service_pb2.ModelMetadataRequest(name=MODEL, version="1")),
    (SERVICE, "ModelConfig", service_pb2.ModelConfigRequest(name=MODEL)),
    (SERVICE, "ModelReady", service_pb2.ModelReadyRequest(name=MODEL)),
    (SERVICE, "RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)),
    (SERVICE, "RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=MODEL)),
    (SERVICE, "RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="absent")),
    (SERVICE, "ServerReady", service_pb2.ServerReadyRequest()),
    (SERVICE, "SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="a")),
    ("grpc.health.v1.Health", "Check", service_pb2.ModelReadyRequest(name=SERVICE)),
)
SHAPES = (
    [1, WINDOW], [1, WINDOW], [1, WINDOW], [1], [1], [], [0], [-1], [-1, -1], [2**62, 4], [2**63 - 1], [WINDOW],
    [1, 1, WINDOW],
)  # fmt: skip


def connection(random):
    """A connection with one call."""
    service, method, data = SERVICE, random.choice(("ModelInfer", "ModelInfer", "ModelStreamInfer")), message(random)
    while len(data) > WINDOW_BYTES:
        data = message(random)
    if random.random() < 0.15:
        service, method, honest = random.choice(HONEST)
        data = mutations.spoilt(random, honest.SerializeToString()) if random.random() < 0.7 else data
    return http2.PREFACE + http2.call(1, f"/{service}/{method}".encode(), data)


def message(random):
    """A ModelInferRequest that has faults, or what may have been one on the wire of protobuf."""
    match random.randrange(10):
        case 0 | 1 | 2 | 3:
            return _infer(random).SerializeToString()
        case 4 | 5:
            request = service_pb2.ModelInferRequest(model_name=MODEL)
            request.inputs.add(name="waveform", datatype=random.choice(("FP32", "BYTES")), shape=[1, WINDOW])
            request.raw_input_contents.append(random.randbytes(4 * WINDOW))
            return mutations.spoilt(random, request.SerializeToString())
    return _fields(random, 0)


def _infer(random):
    request = service_pb2.ModelInferRequest(model_name=random.choice((MODEL,) * 5 + ("", "\x00", "x" * 9000)))
    request.model_version = random.choice(("", "", "", "1", "2", "x"))
    request.id = random.choice(("", "a", "\u2028" * 100))
    for _ in range(random.choice((1, 1, 1, 0, 2))):
        tensor = request.inputs.add(
            name=random.choice(("waveform",) * 5 + ("", "other")),
            datatype=random.choice(("FP32", "FP32", "BYTES", "BYTES", "BOOL", "FP64", "INT64", "", "fp32")),
            shape=random.choice(SHAPES),
        )
        match random.randrange(5):
            case 0:
                request.raw_input_contents.append(random.randbytes(random.choice((0, 3, 4 * WINDOW))))
            case 1:
                audio = recordings.audio(random)
                request.raw_input_contents.append(mutations.spoilt(random, len(audio).to_bytes(4, "little") + audio))
            case 2:
                number = random.choice((0.5, float("nan"), float("inf"), 1e38, -1e38))
                tensor.contents.fp32_contents.extend([number] * random.choice((0, 1, WINDOW)))
            case 3:
                tensor.contents.bytes_contents.extend([recordings.audio(random)] * random.choice((1, 1, 2)))
            case 4:
                tensor.contents.int64_contents.extend([2**62] * random.choice((1, WINDOW)))
    for _ in range(random.choice((0, 0, 1, 2))):
        request.outputs.add(name=random.choice(("logits", "scores", "embedding", "detections", "", "x")))
        request.outputs[-1].parameters["classification"].int64_param = random.choice((0, 1, -1, 2**62))
    names = ("overlap", "probe", "binary_data_output", "", "timeout", "hop", "label", "merge", "threshold", "top_k")
    for name in random.sample(names, random.choice((0, 0, 1, 2))):
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
    return request


def _fields(random, depth):
    data = []
    for _ in range(random.choice((0, 1, 2, 3, 5, 40 >> 2 * depth))):
        number = random.choice((1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 15, 2**29))
        wire_type = random.choice((2,) * 40 + (0, 1, 5) * 5 + (3, 4, 7))
        data.append(http2.varint(number << 3 | wire_type))
        match wire_type:
            case 0:
                data.append(random.choice(VARINTS))
            case 1 | 5:
                data.append(random.randbytes(8 if wire_type == 1 else 4))
            case 2:
                content = _content(random, depth)
                lies = random.random() < 0.03
                data += [random.choice(VARINTS) if lies else http2.varint(len(content)), content]
    return b"".join(data)


def _content(random, depth):
    match random.randrange(8):
        case 0 | 1 | 2 if depth < 4:
            return _fields(random, depth + 1)
        case 3:
            return random.choice((MODEL.encode(), b"waveform", b"FP32", b"BYTES", b"BOOL", b"logits", b"overlap"))
        case 4:
            return random.choice((b"\xff", b"\xed\xa0\x80", b"\0", "\U0001f426".encode() * 3000, b"%" * 5000))
        case 5:
            return b"".join(random.choices(VARINTS, k=random.choice((1, 2, 3000))))
        case 6:
            return random.randbytes(random.choice((0, 3, 4 * WINDOW)))
    return random.choice(mutations.RECORDINGS)
