"""Bytes that may be no HTTP/2, and messages that may be no protobuf: gRPC refuses them, and goes on."""

import contextlib
import os
import random
import struct

import grpc
import pytest
from tritonclient.grpc import service_pb2

from avex_serve import open_bundle
from tests import http2
from tests.bundles import WINDOW
from tests.clients import SERVICE, Question, Worker, rpc
from tests.fuzz import mutations
from tests.service.conftest import RECORDINGS, running_server

COUNT = int(os.environ.get("AVEX_FUZZ_REQUESTS", "3000"))  # of each kind
SEED = os.environ.get("AVEX_FUZZ_SEED", "0")
CHECK_EVERY = 500
GROWN = 100 * 2**20  # bytes by which a worker may grow, pools and caches included
NEVER = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"}
FORGED = "2026-01-01 [ERROR] forged"
PATHS = (
    *(f"/{SERVICE}/{method}".encode() for method in ("ModelInfer", "ModelInfer", "ServerReady", "ModelMetadata")),
    *(b"/grpc.health.v1.Health/Check", b"/grpc.health.v1.Health/Watch", f"/{SERVICE}/ModelStreamInfer".encode()),
    *(
        b"/\xff",
        b"",
        b"/",
        b"x",
        b"/a/b",
        b"/" + b"x" * 3000,
        f"/x\n{FORGED}\n".encode(),
        "/\u202e\U0001f426".encode(),
    ),
)
METADATA = (
    (b"x-request-id", f"a\n{FORGED}".encode()),
    (b"x-text", b"\xff\xfe"),
    (b"x-\xff", b"a"),
    (b"x-bin", b"!!"),
    (b"authorization", b"Bearer \xff"),
    (b"grpc-timeout", b"99999999999999S"),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-timeout", b"10S"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"\xff"),
    (b"grpc-accept-encoding", b"x" * 500),
    (b"content-type", b"text/plain"),
    (b"traceparent", b"00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-01"),
    (b"te", b""),
    (b":path", b"/again"),
    (b"", b""),
    (b"x" * 2000, b"y" * 20000),
)
VARINTS = (0, 1, 2, 127, 128, WINDOW, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**70)


def hostile_frames(random):
    """Bytes for a connection of HTTP/2: frames that may be out of place, lie about themselves, or are damaged."""
    data = random.choice((http2.PREFACE,) * 9 + (b"", http2.PREFACE[:10], mutations.spoilt(random, http2.PREFACE)))
    for number in range(random.randrange(1, 5)):
        stream = random.choice((2 * number + 1,) * 8 + (0, 1, 2, 2**31 - 1))
        match random.randrange(8):
            case 0 | 1 | 2:
                more = random.sample(METADATA, random.choice((0, 1, 1, 2)))
                message = random.choice((b"", hostile_message(random)))
                data += http2.call(stream, random.choice(PATHS), message, *more, compressed=random.random() < 0.1)
            case 3:
                block = http2.head(random.choice(PATHS)) + random.choice(
                    (b"", b"\x40\x01a\x01b" + b"\xbe" * random.randrange(9000))
                )
                flags = random.choice((0, 1, 4, 5, 8, 13, 0x20, 0x2D, 255))
                data += http2.frame(http2.HEADERS, flags, stream, block[: http2.MAX_FRAME])
            case 4:
                length = random.choice((0, 5, 2**16, 2**31, 2**32 - 1))
                body = bytes([random.choice((0, 1, 2, 255))]) + struct.pack(">I", length) + random.randbytes(5)
                data += http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.head(random.choice(PATHS)))
                data += http2.frame(http2.DATA, random.choice((0, 1, 8, 9)), stream, body)
            case 5:
                payload = struct.pack(">HI", random.randrange(10), random.choice((0, 1, 2**14, 2**31, 2**32 - 1)))
                data += http2.frame(http2.SETTINGS, random.choice((0, 1)), stream, payload * random.randrange(50))
            case 6:
                kind, payload = random.choice((
                    (http2.PING, bytes(8)), (http2.WINDOW_UPDATE, b"\x7f\xff\xff\xff"), (http2.RST_STREAM, bytes(4)),
                    (http2.CONTINUATION, http2.fields(METADATA[0])), (5, bytes(9)), (2, bytes(5)), (7, bytes(8)),
                ))  # fmt: skip
                data += http2.frame(kind, random.choice((0, 1, 4)), stream, payload) * random.choice((1, 1, 2, 100))
            case 7:
                data += http2.frame(random.randrange(256), random.randrange(256), stream, random.randbytes(20))
    return mutations.spoilt(random, data) if random.random() < 0.3 else data


def hostile_message(random):
    """A ModelInferRequest, or what may have been one on the wire of protobuf."""
    if random.random() < 0.4:
        request = service_pb2.ModelInferRequest(model_name="tiny", parameters={"overlap": {"double_param": 0.01}})
        request.inputs.add(name="waveform", datatype=random.choice(("FP32", "BYTES")), shape=[1, WINDOW])
        request.raw_input_contents.append(random.randbytes(4 * WINDOW))
        return mutations.spoilt(random, request.SerializeToString())
    return _fields(random, 0)


def _fields(random, depth):
    data = b""
    for _ in range(random.choice((0, 1, 2, 3, 5, 200 >> 3 * depth))):
        number, wire_type = (
            random.choice((1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 15, 2**29)),
            random.choice((2,) * 6 + (0, 1, 5, 3, 4, 7)),
        )
        data += http2.varint(number << 3 | wire_type)
        match wire_type:
            case 0:
                data += http2.varint(random.choice(VARINTS))
            case 1 | 5:
                data += random.randbytes(8 if wire_type == 1 else 4)
            case 2:
                content = _content(random, depth)
                size = random.choice((len(content),) * 30 + VARINTS)
                data += http2.varint(size) + content
    return data


def _content(random, depth):
    match random.randrange(8):
        case 0 | 1 | 2 if depth < 4:
            return _fields(random, depth + 1)
        case 3:
            return random.choice((b"tiny", b"waveform", b"FP32", b"BYTES", b"BOOL", b"logits", b"overlap"))
        case 4:
            return random.choice((b"\xff", b"\xed\xa0\x80", b"\0", "\U0001f426".encode() * 3000, b"%" * 5000))
        case 5:
            return b"".join(http2.varint(random.choice(VARINTS)) for _ in range(random.choice((1, 2, 3000))))
        case 6:
            return random.randbytes(random.choice((0, 3, 4 * WINDOW)))
    return random.choice(mutations.RECORDINGS)


@pytest.fixture(scope="module")
def server(tmp_path_factory, audio_bundle):
    with running_server(tmp_path_factory.mktemp("bytes"), AVEX_BUNDLE=str(audio_bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def question(audio_bundle):
    with open_bundle(audio_bundle) as engine:
        return Question(engine, RECORDINGS["stereo 44.1 kHz"])


@contextlib.contextmanager
def stands(server, question):
    """Afterwards the server is the same, answers rightly, and its log and metrics hold nothing that clients wrote.

    What isn't HTTP/2 at all never reaches the service: gRPC's own library may answer INTERNAL.
    """
    worker = Worker(server)
    question.check(server)
    before = worker.memory
    yield
    question.check(server)
    assert Worker(server).process == worker.process
    assert worker.memory <= before + GROWN
    log = server.log_path.read_text(errors="surrogateescape")
    assert "Traceback" not in log
    assert not any(line.startswith(FORGED[:10] + " [") for line in log.splitlines())
    assert log.isascii()
    counted = [line for line in server.get("/metrics").text.splitlines() if line.startswith("avex_requests_total")]
    assert not [line for line in counted if 'status="INTERNAL"' in line or 'status="UNKNOWN"' in line]
    assert len({line.partition('route="')[2].partition('"')[0] for line in counted}) < 30


def test_hostile_frames(server, question):
    source = random.Random(f"{SEED} frames")
    with stands(server, question):
        for number in range(COUNT):
            http2.send(server.grpc_port, hostile_frames(source))
            if number % CHECK_EVERY == 0:
                question.check(server)


def test_hostile_messages(server, question):
    source = random.Random(f"{SEED} messages")
    with stands(server, question), grpc.insecure_channel(server.grpc) as channel:
        for number in range(COUNT):
            message = hostile_message(source)
            method = source.choice(("ModelInfer",) * 8 + ("ModelMetadata", "RepositoryModelLoad"))
            status = "OK"
            try:
                rpc(channel, method, message)
            except grpc.RpcError as error:
                status = error.code().name
            assert status not in NEVER, (number, message)
            if number % CHECK_EVERY == 0:
                question.check(server)
