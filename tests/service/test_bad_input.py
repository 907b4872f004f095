"""Whatever a client sends wrongly gets a clear refusal; the fixtures see to it that no traceback is logged."""

import contextlib
import http.server
import json
import socket
import struct
import threading

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.answers import program
from tests.bundles import DIM, WINDOW
from tests.service.conftest import encode

INFER = "/v2/models/tiny/infer"
WAV = encode(0.37, 44100, 2, "WAV")


def floats(samples):
    """A WAV of 32-bit floats at 16 kHz."""
    data = np.asarray(samples, "<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, 16000, 64000, 4, 32)
    chunks = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(chunks)) + chunks


INTEGERS = 20_000 * np.sin(np.arange(4000, dtype=np.float32))  # 16-bit integers that nobody divided
BAD_AUDIO = {
    "empty": b"",
    "truncated header": WAV[:20],
    "no samples": WAV[:44],
    "not audio": b"this is no audio",
    "a program": program(),
    "text in UTF-16": "this is no audio".encode("utf-16"),
    "a url": b"http://127.0.0.1:9/a.wav",
    "a quoted url": b'"http://127.0.0.1:9/a.wav"',
    "a path": b"/etc/passwd",
    "nan": floats([0, np.nan]),
    "overflow": floats([3e38] * 3200),
    "integers": floats(INTEGERS),
    "rate too high": WAV[:24] + struct.pack("<I", 2**31 - 1) + WAV[28:],
    # libsndfile seeks before the start of this one
    "cut aiff": encode(0.1, 16000, 1, "AIFF")[:30],
    "rate 0": WAV[:24] + struct.pack("<I", 0) + WAV[28:],
}
BAD_OPTIONS = [
    ({"threshold": "abc"}, 400, "threshold is 'abc'"),
    ({"threshold": "nan"}, 400, "threshold is nan"),
    ({"threshold": "inf"}, 400, "threshold is inf"),
    ({"threshold": "[1]"}, 400, "threshold is '[1]'"),
    ({"threshold": "50"}, 400, "threshold is 50, and no sigmoid score is above 1"),
    ({"threshold": "1.5"}, 400, "threshold is 1.5"),
    ({"top_k": "abc"}, 400, "top_k is 'abc'"),
    ({"top_k": "1.5"}, 400, "top_k is '1.5'"),
    ({"top_k": "nan"}, 400, "top_k is 'nan'"),
    ({"top_k": "0"}, 400, "top_k is 0"),
    ({"top_k": "-3"}, 400, "top_k is -3"),
    ({"top_k": "9" * 5000}, 400, "top_k is '999"),
    ({"overlap": "abc"}, 400, "overlap is 'abc'"),
    ({"overlap": "nan"}, 400, "overlap is nan"),
    ({"overlap": "-0.01"}, 400, "overlap is -0.01"),
    ({"overlap": "0.1"}, 400, "overlap is 0.1"),
    ({"probe": "nothing"}, 404, "no probe 'nothing'"),
    ({"probe": '"nothing"'}, 404, "no probe 'nothing'"),
    (
        {"topk": "1"},
        400,
        "unknown option 'topk'; did you mean top_k? known: threshold, top_k, label,",
    ),
]


def test_more_labels_than_numpy_can_count(audio_server):
    """Whoever asks for all labels may write any number."""
    answers = [audio_server.post("/predict", content=WAV, params={"top_k": k}).json() for k in (100, 2**63, 10**30)]
    assert answers[0]["detections"]
    assert answers[1:] == answers[:1] * 2


def refused(answer, status, text=""):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert text in answer.json()["error"]
    return True


@pytest.mark.parametrize("audio", BAD_AUDIO.values(), ids=BAD_AUDIO)
def test_bad_audio(audio_server, audio):
    for path in ("/predict", "/embed"):
        assert refused(audio_server.post(path, content=audio), 400)
        assert refused(audio_server.post(path, files={"audio": audio}), 400)
    assert refused(audio_server.post(INFER, **binary_request([audio])), 400)
    assert rpc_error(audio_server, infer_recording(audio)) == "INVALID_ARGUMENT"


def test_samples_of_another_scale(audio_server):
    """A few times beyond full scale is answered with a warning, and 16-bit integers are refused, in any form."""
    expected = "the samples reach 8, and sound is in [-1, 1]: their scale may be wrong"
    for samples, doubtful in ((np.clip(INTEGERS, -1, 1), False), (np.clip(INTEGERS, -8, 8), True)):
        loud, window = floats(samples), np.float32(samples[:WINDOW])
        expected_list = [expected] * doubtful
        for answer in (
            audio_server.post("/predict", content=loud),
            audio_server.post("/embed", content=loud),
        ):
            assert answer.json()["warnings"] == expected_list
        (prediction,) = audio_server.post("/predict_all", content=loud).json()["predictions"]
        assert prediction["warnings"] == expected_list
        tensor = {"name": "waveform", "shape": [1, WINDOW], "datatype": "FP32", "data": window.tolist()}
        for answer in (
            audio_server.post(INFER, **binary_request([loud])),
            audio_server.post(INFER, json={"inputs": [tensor]}),
        ):
            assert json.loads(answer.json().get("parameters", {}).get("warnings", "[]")) == expected_list
        for request in (infer_recording(loud), infer_windows(raw=[window.tobytes()])):
            parameters = service_pb2.ModelInferResponse.FromString(
                call(audio_server, "ModelInfer", request.SerializeToString())
            ).parameters
            assert ("warnings" in parameters) is doubtful
            assert json.loads(parameters["warnings"].string_param or "[]") == expected_list
    window = np.float32(INTEGERS[:WINDOW]).tobytes()
    assert rpc_error(audio_server, infer_windows(raw=[window])) == "INVALID_ARGUMENT"
    two = audio_server.post(INFER, **binary_request([WAV, floats(np.clip(INTEGERS, -8, 8))]))
    assert json.loads(two.json()["parameters"]["warnings"]) == [f"recording 2: {expected}"]


@pytest.mark.parametrize(("options", "status", "text"), BAD_OPTIONS)
def test_bad_options(audio_server, options, status, text):
    assert refused(audio_server.post("/predict", content=WAV, params=options), status, text)
    assert refused(audio_server.post("/predict", files={"audio": WAV}, data=options), status, text)


def test_options_of_embed(audio_server):
    assert refused(audio_server.post("/embed", content=WAV, params={"overlap": "x"}), 400, "overlap is 'x'")
    assert refused(audio_server.post("/embed", content=WAV, params={"top_k": "1"}), 400, "unknown option 'top_k'")


@pytest.mark.parametrize("place", ["inputs", "outputs"])
def test_names_of_megabytes_are_not_repeated(audio_server, place):
    document = {"inputs": [{"name": "waveform", "shape": [1], "datatype": "FP32", "data": [0]}], "outputs": []}
    document[place] = [{"name": "\u0378" * 2**20, "shape": [1], "datatype": "FP32", "data": [0]}]
    answer = audio_server.post(INFER, content=json.dumps(document, ensure_ascii=False))
    assert refused(answer, 400, f"{place}[0].name: expected text of length <= 1000")
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("name", "value", "status", "code"),
    [
        ("overlap", "abc", 400, "INVALID_ARGUMENT"),
        ("overlap", "nan", 400, "INVALID_ARGUMENT"),
        ("overlap", "-1", 400, "INVALID_ARGUMENT"),
        ("probe", "nothing", 404, "NOT_FOUND"),
        ("probe", "n" * 100_000, 404, "NOT_FOUND"),
    ],
)
def test_bad_parameters_of_infer(audio_server, name, value, status, code):
    assert refused(audio_server.post(INFER, **binary_request([WAV], parameters={name: value})), status)
    request = infer_recording(WAV)
    request.parameters[name].string_param = value
    assert rpc_error(audio_server, request) == code


def multipart(body, content_type="multipart/form-data; boundary=b"):
    return {"content": body, "headers": {"content-type": content_type}}


PART = b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a.wav"\r\n\r\n' + WAV
MALFORMED_FORMS = {
    "no boundary": multipart(PART + b"\r\n--b--\r\n", "multipart/form-data"),
    "empty": multipart(b""),
    "no parts": multipart(b"--b--\r\n"),
    "garbage": multipart(b"\x00\xff garbage"),
    "unfinished": multipart(PART),
    "no name": multipart(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
    "bad header": multipart(b"--b\r\n\x00: \xff\r\n\r\nx\r\n--b--\r\n"),
    "audio as text": multipart(b'--b\r\nContent-Disposition: form-data; name="audio"\r\n\r\nx\r\n--b--\r\n'),
    "no audio": {"files": {"file": WAV}},
    "audio twice": {"files": [("audio", WAV), ("audio", WAV)]},
    "option as file": {"files": {"audio": WAV, "top_k": b"1"}},
    "option twice": {"files": {"audio": WAV}, "data": {"top_k": "1"}, "params": {"top_k": "2"}},
}


@pytest.mark.parametrize("form", MALFORMED_FORMS.values(), ids=MALFORMED_FORMS)
def test_malformed_multipart(audio_server, form):
    assert refused(audio_server.post("/predict", **form), 400)


def test_compressed_body(audio_server):
    for path in ("/predict", "/classify", INFER):
        assert refused(audio_server.post(path, content=b"x", headers={"content-encoding": "gzip"}), 415)


@pytest.fixture
def visits():
    """A web server on this machine: its address and the requests that it got."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a.wav", seen
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/predict", "/predict%0A", "/%70redict", "/predict/", "//predict", "/embed%0a"])
def test_no_url_is_fetched_and_no_path_opened(audio_server, visits, path, tmp_path):
    url, seen = visits
    local = tmp_path / "local.wav"
    local.write_bytes(WAV)
    for text in (url, str(local), local.as_uri()):
        for request in (
            {"content": text},
            {"content": json.dumps(text)},
            {"json": {"audio": text}},
            {"files": {"audio": (None, text)}},
            {"files": {"audio": text.encode()}},
            {"data": {"audio": text}},
        ):
            answer = audio_server.post(path, **request, follow_redirects=True)
            assert 400 <= answer.status_code < 500, answer.text
    assert seen == []


JSON_BODIES = {
    "malformed": b'{"embeddings": [[1, 2',
    "empty": b"",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "missing": b"{}",
    "unknown field": b'{"embeddings": [[0,0,0,0]], "overlap": 1}',
    "text": b'{"embeddings": "abc"}',
    "text inside": b'{"embeddings": [["1","2","3","4"]]}',
    "null inside": b'{"embeddings": [[null,0,0,0]]}',
    "true inside": b'{"embeddings": [[true,true,true,true]]}',
    "nan": b'{"embeddings": [[NaN,0,0,0]]}',
    "infinity": b'{"embeddings": [[1e999,0,0,0]]}',
    "too large for float32": b'{"embeddings": [[1e300,0,0,0]]}',
    "huge integer": b'{"embeddings": [[' + b"9" * 1000 + b",0,0,0]]}",
    "ragged": b'{"embeddings": [[0,0,0,0],[0]]}',
    "wrong width": b'{"embeddings": [[0,0,0]]}',
    "wrong rank": b'{"embeddings": [0,0,0,0]}',
    "no rows": b'{"embeddings": []}',
    "empty row": b'{"embeddings": [[]]}',
    "threshold text": b'{"embeddings": [[0,0,0,0]], "threshold": "0.5"}',
    "threshold nan": b'{"embeddings": [[0,0,0,0]], "threshold": NaN}',
    "top_k negative": b'{"embeddings": [[0,0,0,0]], "top_k": -1}',
    "top_k fraction": b'{"embeddings": [[0,0,0,0]], "top_k": 1.5}',
}


@pytest.mark.parametrize("body", JSON_BODIES.values(), ids=JSON_BODIES)
def test_bad_classify(embedding_server, body):
    assert refused(embedding_server.post("/classify", content=body), 400)


def test_lists_in_lists(embedding_server):
    deep = b'{"embeddings": ' + b"[" * 100 + b"0" + b"]" * 100 + b"}"
    assert refused(
        embedding_server.post("/classify", content=deep), 400, "lists in lists, 100 deep; expected at most"
    )


def test_classify_with_unknown_probe(embedding_server):
    body = {"embeddings": [[0] * DIM], "probe": "nothing"}
    assert refused(embedding_server.post("/classify", json=body), 404, "no probe 'nothing'")


def test_wrong_kind_of_bundle(audio_server, embedding_server):
    assert refused(audio_server.post("/classify", json={"embeddings": [[0] * DIM]}), 400, "takes audio")
    for path in ("/predict", "/embed"):
        assert refused(embedding_server.post(path, content=WAV), 400, "takes embeddings")
    path = "/v2/models/tiny-offline/infer"
    assert refused(embedding_server.post(path, **binary_request([WAV], name="embedding")), 400, "takes embeddings")
    request = infer_recording(WAV)
    request.model_name, request.inputs[0].name = "tiny-offline", "embedding"
    assert rpc_error(embedding_server, request) == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("PUT", "/embed", 405),
        ("GET", "/classify", 405),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/tiny", 405),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/repository/index", 405),
        ("POST", "/v2/repository/nothing", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/tiny/versions/2", 404),
        ("GET", "/v2/models/tiny/versions/2/ready", 404),
        ("POST", "/v2/models/tiny/versions/2/infer", 404),
    ],
)
def test_unknown_paths_methods_models_and_versions(audio_server, method, path, status):
    assert refused(audio_server.client.request(method, path), status)


def fp32(**changes):
    tensor = {"name": "waveform", "shape": [1, WINDOW], "datatype": "FP32", "data": [0.0] * WINDOW}
    return json.dumps({"inputs": [{**tensor, **changes}]})


def recording_as_text(data, shape=(1,)):
    return fp32(datatype="BYTES", shape=shape, data=data)


INFER_BODIES = {
    "malformed": "{",
    "empty": "",
    "deep": '{"inputs": ' + "[" * 100_000,
    "a list": "[]",
    "no inputs": "{}",
    "inputs empty": '{"inputs": []}',
    "wrong name": fp32(name="other"),
    "wrong width": fp32(shape=[1, 3], data=[0, 0, 0]),
    "wrong rank": fp32(shape=[WINDOW]),
    "shape without its data": fp32(shape=[2, WINDOW]),
    "negative shape": fp32(shape=[-1, -WINDOW]),
    "huge shape": fp32(shape=[2**62, 2**62]),
    "huge shape of no elements": fp32(shape=[0, 2**64], data=[]),
    "too many dimensions": fp32(shape=[1] * 100, data=[0]),
    "shape text": fp32(shape="abc"),
    "shape no text": fp32(shape=["abc"]).encode().replace(b"abc", b"\xff"),
    "no rows": fp32(shape=[0, WINDOW], data=[]),
    "nan": fp32(data=[float("nan")] * WINDOW),
    "text": fp32(data=["0"] * WINDOW),
    "text in place of a list": fp32(data="abc"),
    "an object": fp32(data={"a": 1}),
    "null": fp32(data=None),
    "ragged": fp32(data=[[0], [0, 0]]),
    "other type": fp32(datatype="FP64"),
    "unknown output": fp32()[:-1] + ', "outputs": [{"name": "nothing"}]}',
    "classification": fp32()[:-1] + ', "outputs": [{"name": "logits", "parameters": {"classification": -1}}]}',
    "shared memory": fp32(parameters={"shared_memory_region": "a"}),
    "binary size without data": fp32(parameters={"binary_data_size": 4}),
    "binary size text": fp32(parameters={"binary_data_size": "4"}),
    "binary size negative": fp32(parameters={"binary_data_size": -4}),
    "id no text": '{"id": 7, "inputs": []}',
    "overlap text": fp32()[:-1] + ', "parameters": {"overlap": "abc"}}',
    "parameter beyond all ranges": fp32()[:-1] + ', "parameters": {"a": 1e400}}',
    "parameter no text": fp32()[:-1].encode() + b', "parameters": {"a": "\xff"}}',
    "recording no text": recording_as_text([1]),
    "recording no base64": recording_as_text(["http://127.0.0.1:9/a.wav"]),
    "recording empty": recording_as_text([""]),
    "recordings none": recording_as_text([], [0]),
    "recordings nested": recording_as_text(["AAAA"], [1, 1]),
}


@pytest.mark.parametrize("body", INFER_BODIES.values(), ids=INFER_BODIES)
def test_bad_infer_over_http(audio_server, body):
    assert refused(audio_server.post(INFER, content=body), 400)


def binary_request(recordings, name="waveform", parameters=None):
    raw = b"".join(len(each).to_bytes(4, "little") + each for each in recordings)
    tensor = {
        "name": name,
        "shape": [len(recordings)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": parameters or {}}).encode()
    return {"content": head + raw, "headers": {"Inference-Header-Content-Length": str(len(head))}}


@pytest.mark.parametrize("length", ["abc", "-1", "1e3", "99999999", "٣", "9" * 5000, ""])
def test_bad_length_of_the_json_part(audio_server, length):
    request = binary_request([WAV])
    request["headers"] = {"Inference-Header-Content-Length": length.encode()}
    assert refused(audio_server.post(INFER, **request), 400)


@pytest.mark.parametrize(
    "tail", [b"", b"\x01", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00\x00"], ids=["none", "cut", "too long", "extra"]
)
def test_bad_binary_tensor(audio_server, tail):
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "waveform",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(tail)},
                }
            ]
        }
    ).encode()
    for body in (head + tail, head + tail + b"rest"):
        headers = {"Inference-Header-Content-Length": str(len(head))}
        assert refused(audio_server.post(INFER, content=body, headers=headers), 400)


def infer_recording(audio):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(audio).to_bytes(4, "little") + audio)
    return request


def infer_windows(**changes):
    request = service_pb2.ModelInferRequest(model_name=changes.pop("model", "tiny"))
    request.model_version = changes.pop("version", "")
    raw = changes.pop("raw", [bytes(4 * WINDOW)])
    request.raw_input_contents.extend(raw)
    for output in changes.pop("outputs", []):
        request.outputs.add(name=output)
    request.inputs.add(**{"name": "waveform", "datatype": "FP32", "shape": [1, WINDOW], **changes})
    return request


def call(server, method, data, service="inference.GRPCInferenceService"):
    with grpc.insecure_channel(server.grpc) as channel:
        return channel.unary_unary(f"/{service}/{method}")(data, timeout=20)


def rpc_error(server, request, method="ModelInfer"):
    """The status of the refusal, which must say something."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        call(server, method, data)
    assert caught.value.details()
    return caught.value.code().name


BAD_RPCS = {
    "unknown model": (infer_windows(model="other"), "NOT_FOUND"),
    "no model": (infer_windows(model=""), "NOT_FOUND"),
    "unknown version": (infer_windows(version="2"), "NOT_FOUND"),
    "unknown output": (infer_windows(outputs=["nothing"]), "INVALID_ARGUMENT"),
    "wrong name": (infer_windows(name="other"), "INVALID_ARGUMENT"),
    "other type": (infer_windows(datatype="FP64"), "INVALID_ARGUMENT"),
    "wrong width": (infer_windows(shape=[1, 3], raw=[bytes(12)]), "INVALID_ARGUMENT"),
    "shape without its data": (infer_windows(shape=[2, WINDOW]), "INVALID_ARGUMENT"),
    "negative shape": (infer_windows(shape=[-1, -WINDOW]), "INVALID_ARGUMENT"),
    "no rows": (infer_windows(shape=[0, WINDOW], raw=[b""]), "INVALID_ARGUMENT"),
    "odd bytes": (infer_windows(raw=[bytes(7)]), "INVALID_ARGUMENT"),
    "no data": (infer_windows(raw=[]), "INVALID_ARGUMENT"),
    "too much data": (infer_windows(raw=[bytes(4 * WINDOW)] * 2), "INVALID_ARGUMENT"),
    "raw and typed": (infer_windows(contents={"fp32_contents": [0.0]}), "INVALID_ARGUMENT"),
    "nan": (infer_windows(raw=[np.full(WINDOW, np.nan, "<f4").tobytes()]), "INVALID_ARGUMENT"),
    "overflow": (infer_windows(raw=[np.full(WINDOW, 3e38, "<f4").tobytes()]), "INVALID_ARGUMENT"),
    "cut recording": (infer_windows(datatype="BYTES", shape=[1], raw=[b"\xff\xff\xff\xffabc"]), "INVALID_ARGUMENT"),
    "cut length": (infer_windows(datatype="BYTES", shape=[1], raw=[b"\x01"]), "INVALID_ARGUMENT"),
    "shared memory": (
        infer_windows(parameters={"shared_memory_region": service_pb2.InferParameter(string_param="a")}),
        "UNIMPLEMENTED",
    ),
    "no message": (b"\xff\xff\xff", "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize(("request_", "code"), BAD_RPCS.values(), ids=BAD_RPCS)
def test_bad_infer_over_grpc(audio_server, request_, code):
    assert rpc_error(audio_server, request_) == code


@pytest.mark.parametrize(
    ("shape", "raw", "text"),
    [
        ([1], b"\x01\0\0\0a" * 2, "more than the 1 elements of its shape"),
        ([2], bytes(8), "an element of BYTES is empty"),
        ([2**62] * 65, b"\x01\0\0\0a", "an impossible shape of 65 dimensions"),
    ],
)
def test_recordings_that_are_not_looked_for(audio_server, shape, raw, text):
    """Millions of them would be, in a body of the size that is taken."""
    request = infer_windows(datatype="BYTES", shape=shape, raw=[raw])
    with pytest.raises(grpc.RpcError) as caught:
        call(audio_server, "ModelInfer", request.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in caught.value.details()
    tensor = {"name": "waveform", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    assert refused(audio_server.post(INFER, content=head + raw, headers=headers), 400, text)


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata"])
def test_unknown_model_over_grpc(audio_server, method):
    for name, version in (("other", ""), ("tiny", "2")):
        assert (
            rpc_error(audio_server, service_pb2.ModelReadyRequest(name=name, version=version), method) == "NOT_FOUND"
        )


def test_garbage_over_grpc(audio_server):
    for method in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata"):
        assert rpc_error(audio_server, b"\xff\xff", method) == "INVALID_ARGUMENT"
    with grpc.insecure_channel(audio_server.grpc) as channel:
        for ask in (
            channel.unary_unary("/grpc.health.v1.Health/Check"),
            lambda data: next(channel.unary_stream("/grpc.health.v1.Health/Watch")(data)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert rpc_error(audio_server, b"", "Nothing") == "UNIMPLEMENTED"
    with pytest.raises(grpc.RpcError) as caught:
        call(audio_server, "Check", b"\xff\xff", service="grpc.health.v1.Health")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_client_that_leaves_early(audio_server):
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nRIFF"
    for end in (socket.SHUT_WR, None):
        with socket.create_connection(("127.0.0.1", audio_server.http_port)) as connection:
            connection.sendall(head)
            if end is not None:
                connection.shutdown(end)
                with contextlib.suppress(ConnectionError):
                    connection.recv(1000)
    assert audio_server.get("/readyz").status_code == 200
