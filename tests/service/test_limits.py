"""What is too large, too long, too slow or too much is refused, and leaves nothing behind."""

import contextlib
import io
import json
import socket
import struct
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import soundfile
from tritonclient.grpc import service_pb2

from tests.bundles import DIM, SAMPLE_RATE, WINDOW
from tests.clients import until
from tests.service.conftest import encode, running_server

MAX_BODY = 2 * 2**20
PATIENCE = 20  # seconds until a test that hangs fails
WAV = encode(0.37, 44100, 2, "WAV")
INFER = "/v2/models/tiny/infer"
GRPC_INFER = "/inference.GRPCInferenceService/ModelInfer"
BODY_LIMIT = f"expected at most {MAX_BODY} bytes"


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The server's folder for temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(tmp_path_factory, temporary, audio_bundle):
    with running_server(
        tmp_path_factory.mktemp("limited"),
        AVEX_BUNDLE=str(audio_bundle),
        AVEX_MAX_BODY_BYTES=str(MAX_BODY),
        AVEX_MAX_HELD_BYTES=str(MAX_BODY + 1000),
        AVEX_MAX_SECONDS="60",
        AVEX_MAX_DECODED_BYTES="10000000",
        AVEX_MAX_CHANNELS="4",
        AVEX_MAX_WINDOWS="1000",
        AVEX_MAX_JSON_BYTES="100000",
        AVEX_MAX_ANSWER_BYTES="100000",
        AVEX_READ_TIMEOUT_SECONDS="2",
        TMPDIR=str(temporary),
    ) as server:
        yield server


def refused(answer, status, text):
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]
    return True


@contextlib.contextmanager
def connection(server, *head, body=b""):
    """A request whose body the test sends."""
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join([*head, "Host: a", "", ""]).encode() + body)
        yield connection


def received(connection):
    """The answer, a JSON document."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += (piece := connection.recv(1000))
        assert piece
    return answer


def recording_request(*recordings):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[len(recordings)])
    request.raw_input_contents.append(b"".join(len(each).to_bytes(4, "little") + each for each in recordings))
    return request.SerializeToString()


def call(server, data, method=GRPC_INFER):
    with grpc.insecure_channel(server.grpc) as channel:
        return channel.unary_unary(method)(data, timeout=PATIENCE)


def rpc_error(server, data, method=GRPC_INFER):
    with pytest.raises(grpc.RpcError) as caught:
        call(server, data, method)
    return caught.value.code().name, caught.value.details()


# Bodies


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict"),
        ("POST", "/embed"),
        ("POST", "/classify"),
        ("POST", INFER),
        ("PUT", "/predict"),
        ("POST", "/predict%0a"),
        ("POST", "/predict/"),
        ("POST", "/nothing"),
        ("POST", "/schema.json"),
        ("GET", "/metrics"),
        ("GET", "/livez"),
    ],
)
def test_body_that_says_it_is_too_large_is_not_waited_for(server, method, path):
    with connection(server, f"{method} {path} HTTP/1.1", f"Content-Length: {MAX_BODY + 1}") as connection_:
        answer = received(connection_)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert BODY_LIMIT.encode() in answer


@pytest.mark.parametrize("content_type", ["audio/wav", "multipart/form-data; boundary=b"])
def test_chunked_body_is_cut_off_at_the_limit(server, content_type):
    sent = 0

    def endless():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        for _ in range(100):
            sent += 2**16
            yield bytes(2**16)

    answer = server.post("/predict", content=endless(), headers={"content-type": content_type})
    assert refused(answer, 413, BODY_LIMIT)


def test_body_of_the_limit(server, predict):
    wav = WAV + bytes(MAX_BODY - len(WAV))
    assert server.post("/predict", content=wav).json() == predict(WAV)
    assert refused(server.post("/predict", content=wav + b"\0"), 413, BODY_LIMIT)


def test_message_over_grpc(server):
    assert call(server, recording_request(WAV + bytes(MAX_BODY // 2)))
    assert rpc_error(server, recording_request(bytes(MAX_BODY)))[0] == "RESOURCE_EXHAUSTED"
    assert rpc_error(server, bytes(MAX_BODY + 1), "/grpc.health.v1.Health/Check")[0] == "RESOURCE_EXHAUSTED"


def test_bodies_held_at_once_are_bounded(server):
    """While one client uploads and pauses there is no room for another large body, and there is for small ones."""
    head = ("POST /predict HTTP/1.1", f"Content-Length: {MAX_BODY}")
    with connection(server, *head, body=bytes(MAX_BODY // 2)):
        until(lambda: refused_without_body(server, *head))
        other = server.post("/predict", content=bytes(MAX_BODY))
        assert refused(other, 503, "the service is busy: other requests hold all but")
        assert other.headers["retry-after"] == "1"
        assert server.post("/predict", content=WAV).status_code == 200
    until(lambda: server.post("/predict", content=WAV + bytes(MAX_BODY - len(WAV))).status_code == 200)


def refused_without_body(server, *head):
    with connection(server, *head) as other:
        time.sleep(0.1)
        return readable(other) and received(other).startswith(b"HTTP/1.1 503 ")


def test_slow_body(server):
    """It ends with the connection, and others are answered meanwhile."""
    with connection(server, "POST /predict HTTP/1.1", "Content-Length: 1000", body=b"RIFF") as slow:
        assert server.post("/predict", content=WAV).status_code == 200
        answer = received(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body arrives too slowly: 4 bytes" in answer
        assert slow.recv(1000) == b""


def test_body_that_drips(server):
    """A byte now and then doesn't keep it alive."""
    with connection(server, "POST /predict HTTP/1.1", "Content-Length: 1000") as slow:
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                slow.sendall(b"x")
                time.sleep(0.05)
                if readable(slow):
                    break
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_body_that_stalls_after_a_fast_start(server):
    """What was sent fast doesn't buy a long silence: the limit is 2 s, and so much would have given it 16 s more."""
    with connection(server, "POST /predict HTTP/1.1", f"Content-Length: {2**17 + 1}", body=bytes(2**17)) as stalled:
        start = time.monotonic()
        assert received(stalled).startswith(b"HTTP/1.1 408 ")
        assert 1.5 < time.monotonic() - start < 8


def readable(connection):
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        connection.settimeout(PATIENCE)


EMPTY_INPUT, EMPTY_OUTPUT, EMPTY_RAW, EMPTY_PARAMETER = b"*\0", b"2\0", b":\0", b'"\0'


def grpc_field(number, content):
    """A field of a message as it travels, with up to 2**21 bytes."""
    size = len(content)
    return bytes([number << 3 | 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content


SMALL_PARTS = {
    "inputs": EMPTY_INPUT * 20_000,
    "outputs": EMPTY_OUTPUT * 20_000,
    "raw contents": EMPTY_RAW * 20_000,
    "parameters": EMPTY_PARAMETER * 20_000,
    "parameters of inputs": grpc_field(5, EMPTY_PARAMETER * 9000) * 2,
    "parameters of outputs": grpc_field(6, b"\x12\0" * 9000) * 2,
    "recordings": grpc_field(5, grpc_field(5, b"B\0" * 20_000)),
    "dimensions": grpc_field(5, grpc_field(3, bytes(20_000))),
    "integers": grpc_field(5, grpc_field(5, grpc_field(3, bytes(20_000)))),
}


@pytest.mark.parametrize("parts", SMALL_PARTS.values(), ids=SMALL_PARTS)
def test_message_of_many_small_parts(server, parts):
    """It would take many times its size in memory."""
    code, details = rpc_error(server, service_pb2.ModelInferRequest(model_name="tiny").SerializeToString() + parts)
    assert code == "INVALID_ARGUMENT"
    assert details.startswith("the message has more than 16384 fields")


@pytest.mark.parametrize("data", [b"*\x05", b"\x2b\x2c", b"\xff" * 11, b"\x0d\0", b"\x80" * 9 + b"\x01\0", b"\0\0"])
def test_message_that_is_none(server, data):
    assert rpc_error(server, data) == ("INVALID_ARGUMENT", "the request is not a ModelInferRequest")


def test_numbers_of_a_tensor_are_no_parts(server):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="waveform", datatype="FP32", shape=[20, WINDOW])
    tensor.contents.fp32_contents.extend([0.5] * (20 * WINDOW))
    assert call(server, request.SerializeToString())


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryIndex", "ModelMetadata", "ServerLive"])
def test_small_message_that_is_large(server, method):
    code, details = rpc_error(server, bytes(2**16 + 1), f"/inference.GRPCInferenceService/{method}")
    assert (code, details) == ("INVALID_ARGUMENT", "the message has 65537 bytes; expected at most 65536 here")


def test_slow_message_over_grpc(server):
    ended = threading.Event()

    def never():
        ended.wait(PATIENCE)
        yield from ()

    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(GRPC_INFER)(never(), timeout=PATIENCE)
    ended.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.details() == "the message didn't arrive within 2 s; send it faster"


def test_call_without_a_message(server):
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(GRPC_INFER)(iter(()), timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# Heads

MAX_HEAD = 2**16
START = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
LARGE_HEADS = {
    "header that doesn't end": START + b"X-A: " + b"a" * MAX_HEAD,
    "name that doesn't end": START + b"a" * MAX_HEAD,
    "path that doesn't end": b"GET /" + b"a" * MAX_HEAD,
    "header": START + b"X-A: " + b"a" * MAX_HEAD + b"\r\n\r\n",
    "path": b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "headers": START + b"a: b\r\n" * (MAX_HEAD // 6) + b"\r\n",
}


@pytest.mark.parametrize("piece", [2**10, 2**20], ids=["in pieces", "at once"])
@pytest.mark.parametrize("head", LARGE_HEADS.values(), ids=LARGE_HEADS)
def test_head_that_is_too_large(server, head, piece):
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(head), piece):
                connection.sendall(head[start : start + piece])
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"expected at most 65536 bytes" in answer
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1000) == b""


def test_head_of_the_limit(server):
    assert server.client.get("/livez", headers={"x-a": "a" * (MAX_HEAD - 1000)}).status_code == 200
    assert server.client.get("/livez", headers={"x-a": "a" * MAX_HEAD}).status_code == 431


@pytest.mark.parametrize("opening", [b"1\r\nx\r\n0\r\nA: ", b"1\r\nx\r\n1;a="], ids=["trailer", "extension"])
def test_chunked_body_with_endless_additions(server, opening):
    with connection(server, "POST /predict HTTP/1.1", "Transfer-Encoding: chunked", body=opening) as connection_:
        for _ in range(1000):
            connection_.sendall(b"a" * 2**14)
        assert received(connection_).startswith(b"HTTP/1.1 431 ")
        assert connection_.recv(1000) == b""  # the service has ended the connection


def test_body_in_many_small_pieces(server, predict):
    """Who sends little at a time gets there."""
    pieces = (WAV[start : start + 1000] for start in range(0, len(WAV), 1000))
    assert server.post("/predict", content=pieces).json() == predict(WAV)


# Recordings


def flac(seconds, rate=SAMPLE_RATE, channels=1):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((int(seconds * rate), channels), np.float32), rate, format="FLAC")
    return file.getvalue()


def patched(data, start, new):
    return data[:start] + new + data[start + len(new) :]


SILENCE = flac(600)
TOO_LARGE = {
    "longer than is taken": (SILENCE, "longer than 60 s"),
    "promises 2**36 samples": (
        patched(SILENCE, 21, bytes([SILENCE[21] | 15]) + b"\xff" * 4),
        "longer than 60 s",
    ),
    "doesn't say how long it is": (
        patched(SILENCE, 21, bytes([SILENCE[21] & 0xF0]) + bytes(4)),
        "in pieces",
    ),
    "large once decoded": (flac(30, 48000, 2), "more than 10000000 bytes once decoded"),
    "too many channels": (encode(0.1, 16000, 5, "WAV"), "5 channels; expected at most 4"),
}


@pytest.mark.parametrize(("audio", "text"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_recording_that_is_too_large(server, audio, text):
    assert len(audio) < 100_000
    for path in ("/predict", "/embed"):
        assert refused(server.post(path, content=audio), 413, text)
        assert refused(server.post(path, files={"audio": audio}), 413, text)
    code, details = rpc_error(server, recording_request(audio))
    assert code == "INVALID_ARGUMENT"
    assert text in details


@pytest.mark.parametrize("rate", [99, 10_000_001])
def test_sample_rate(server, rate):
    wav = patched(encode(0.1, SAMPLE_RATE, 1, "WAV"), 24, struct.pack("<I", rate))
    assert refused(server.post("/predict", content=wav), 400, "expected 100 to 10000000 Hz")


def test_too_many_windows(server):
    options = {"overlap": WINDOW / SAMPLE_RATE - 1 / SAMPLE_RATE}
    assert refused(server.post("/predict", content=WAV, params=options), 413, "windows; expected at most 1000")


def test_answer_that_would_be_too_large(server):
    """The limit is that of the whole answer, however it is written, and what the message advises helps."""
    long = flac(55)  # 550 windows, 3 labels, embeddings of 4 numbers
    for path in ("/predict", "/predict_all"):
        assert refused(server.post(path, content=long, params={"threshold": 0}), 413, "raise threshold")
        assert server.post(path, content=long, params={"threshold": 1}).status_code == 200
        assert server.post(path, content=flac(2), params={"threshold": 0}).status_code == 200
    assert refused(server.post("/embed", content=long), 413, "send the recording in pieces")

    def infer(output=None, **parameters):
        tensor = {"name": "waveform", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        outputs = [output] if output else []
        head = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()
        return server.post(INFER, content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))})

    long = flac(12)  # 120 windows, whose starts and ends are part of the answer
    raw = len(long).to_bytes(4, "little") + long
    size = len(raw)
    assert infer(binary_data_output=True).status_code == 200
    assert refused(infer(), 413, "ask for outputs in binary")
    best = {"name": "logits", "parameters": {"classification": 2, "binary_data": True}}
    assert refused(infer(best), 413, "a lower classification")
    assert call(server, recording_request(long))
    code, details = rpc_error(server, recording_request(long, long))
    assert code == "INVALID_ARGUMENT"
    assert "send fewer recordings at once" in details


def test_json(server):
    numbers = [0.0] * WINDOW
    tensor = {"name": "waveform", "shape": [1, WINDOW], "datatype": "FP32", "data": numbers}
    assert server.post(INFER, json={"inputs": [tensor]}).status_code == 200
    many = {"inputs": [{**tensor, "shape": [20, WINDOW], "data": numbers * 20}]}
    assert refused(server.post(INFER, json=many), 413, "expected at most 100000")
    assert refused(
        server.post("/classify", json={"embeddings": [[0.0] * DIM] * 10_000}), 413, "expected at most 100000"
    )
    head = json.dumps({"inputs": [{**tensor, "data": None, "parameters": {"binary_data_size": 4 * WINDOW * 20}}]})
    binary = httpx.Headers({"Inference-Header-Content-Length": str(len(head))})
    answer = server.post(INFER, content=head.encode() + bytes(4 * WINDOW * 20), headers=binary)
    assert refused(answer, 400, "has 32000 elements")  # the JSON alone counts


def test_json_that_is_parsed_on_the_event_loop(server):
    large = b'{"a": [' + b"[]," * 2**15 + b"[]]}"
    assert len(large) < 100_000  # which is taken elsewhere
    assert refused(server.post("/v2/repository/index", content=large), 413, "expected at most 65536 bytes here")
    for change in ("load", "unload"):  # forbidden here: the body isn't waited for
        head = (f"POST /v2/repository/models/tiny/{change} HTTP/1.1", "Content-Length: 1000")
        with connection(server, *head) as connection_:
            assert received(connection_).startswith(b"HTTP/1.1 403 ")


# Forms

OPENING = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n'
FORMS = {
    "two files": OPENING + b"\r\nx\r\n" + OPENING + b"\r\nx\r\n--b--\r\n",
    "many fields": b"".join(
        b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % i for i in range(100_000 // 50)
    )
    + b"--b--\r\n",
    "large field": b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n' + b"1" * 2**17 + b"\r\n--b--\r\n",
    "large header": OPENING + b"X-A: " + b"a" * 2**20 + b"\r\n\r\nx\r\n--b--\r\n",
    "many headers": OPENING + b"X-A: a\r\n" * 50_000 + b"\r\nx\r\n--b--\r\n",
    "large header name": OPENING + b"X" * 2**20 + b": a\r\n\r\nx\r\n--b--\r\n",
    "large file name": OPENING[:-3] + b"a" * 2**20 + b'"\r\n\r\nx\r\n--b--\r\n',
}


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS)
def test_form_that_is_too_much(server, body):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert refused(server.post("/predict", content=body, headers=headers), 400, "")


# What is left behind


def open_files(folder):
    """Names in the folder, and files in it without a name that some process holds open."""
    found = [path.name for path in folder.iterdir()]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            if target.startswith(f"{folder}/"):
                found.append(target)
    return sorted(found)


def test_no_temporary_file_stays(server, temporary):
    before = open_files(temporary)  # BentoML's
    large = WAV + bytes(MAX_BODY - len(WAV) - 1000)  # more than a form keeps in memory
    assert server.post("/predict", files={"audio": large}).status_code == 200
    assert server.post("/predict", files={"audio": large[1:]}).status_code == 400
    assert server.post("/predict", files=[("audio", large[: MAX_BODY // 2])] * 2).status_code in (400, 413)
    assert server.post("/predict", files={"audio": large + bytes(2000)}).status_code == 413
    head = ("POST /predict HTTP/1.1", "Content-Type: multipart/form-data; boundary=b", f"Content-Length: {MAX_BODY}")
    with connection(server, *head, body=OPENING + b"\r\n" + bytes(MAX_BODY - 10_000)):
        until(lambda: len(open_files(temporary)) > len(before))
    until(lambda: open_files(temporary) == before)


def test_body_of_a_client_that_left_is_held_no_more(server):
    for _ in range(5):
        head = ("POST /predict HTTP/1.1", f"Content-Length: {MAX_BODY}")
        with connection(server, *head, body=bytes(MAX_BODY - 1000)):
            pass
    until(lambda: server.post("/predict", content=WAV + bytes(MAX_BODY - len(WAV))).status_code == 200)


# What a client names is neither fetched nor opened


@pytest.fixture
def listener():
    """A port that notices whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/a.wav", listening


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "POST"])
def test_nothing_is_fetched_whatever_the_method_and_path(server, listener, method, tmp_path):
    url, listening = listener
    local = tmp_path / "local.wav"
    local.write_bytes(WAV)
    for path in (
        "/predict",
        "/embed/submit",
        "/predict/submit",
        "/predict/get",
        "/schema.json",
        "/api/predict",
        INFER,
    ):
        for text in (url, str(local), local.as_uri()):
            for request in (
                {"json": {"audio": text}},
                {"json": [text]},
                {"files": {"audio": (None, text)}},
                {"files": {"audio": (text, b"x")}},
                {"data": {"audio": text}},
                {"content": json.dumps(text), "headers": {"content-type": "application/vnd.bentoml+pickle"}},
                {"content": text, "headers": {"content-type": "text/uri-list"}},
                {"params": {"audio": text, "url": text}},
                {"content": b"", "headers": {"content-location": text, "referer": text}},
            ):
                answer = server.client.request(method, path, **request)
                assert answer.status_code >= 400 or (method == "GET" and path == "/schema.json")
                assert answer.status_code < 500, answer.text
    with pytest.raises(TimeoutError):
        listening.accept()


def test_nothing_is_unpickled(server, tmp_path):
    """BentoML's own services send each other pickles."""
    import pickle

    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return Path.touch, (marker,)

    for path in ("/predict", "/predict%0a", "/embed", "/classify", INFER, "/schema.json", "/nothing"):
        for kind in (
            "application/vnd.bentoml+pickle",
            "application/vnd.bentoml.pickled",
            "application/octet-stream",
        ):
            answer = server.post(path, content=pickle.dumps(Touch()), headers={"content-type": kind})
            assert 400 <= answer.status_code < 500
    assert not marker.exists()


def test_recordings_as_text_are_not_opened(server, listener):
    url, listening = listener
    for text in (url, "/etc/passwd", "file:///etc/passwd"):
        tensor = {"name": "waveform", "shape": [1], "datatype": "BYTES", "data": [text]}
        assert server.post(INFER, json={"inputs": [tensor]}).status_code == 400
        assert rpc_error(server, recording_request(text.encode()))[0] == "INVALID_ARGUMENT"
    with pytest.raises(TimeoutError):
        listening.accept()
