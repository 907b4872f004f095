"""What clients do by mistake, and the remedy that the answer names. See test_bad_input.py for the rest."""

import base64
import io
import json
import shutil
import subprocess
from urllib.parse import unquote

import grpc
import numpy as np
import pytest
import soundfile
from tritonclient.grpc import service_pb2

from avex_serve import decode
from tests.bundles import DIM, WINDOW
from tests.service.conftest import encode

INFER = "/v2/models/tiny/infer"
WAV = encode(0.37, 44100, 2, "WAV")
BASE64 = base64.b64encode(WAV).decode()
FORM = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"
CURL = shutil.which("curl")


def error(answer, status=400):
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    return answer.json()["error"]


def rpc(channel):
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelInferResponse.FromString,
    )


def form(disposition, data=WAV):
    return b"--b\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + data + b"\r\n--b--\r\n"


BODIES = {
    "a part without a file name": (form(b'name="audio"', b"x" * 100), FORM, "-F audio=@FILE"),
    "the same, large": (form(b'name="audio"', bytes(200_000)), FORM, "-F audio=@FILE"),
    "the same, no text": (form(b'name="audio"', b"\xff\xfe\xfa" * 20), FORM + "; charset=utf-8", "-F audio=@FILE"),
    "a file name by RFC 5987 alone": (form(b"name=\"audio\"; filename*=utf-8''a.wav"), FORM, "-F audio=@FILE"),
    "the path of a file": (form(b'name="audio"', b"recording.wav"), FORM, "-F audio=@FILE"),
    "a file of another name": (form(b'name="file"; filename="a.wav"'), FORM, "rename the field: -F audio=@FILE"),
    "two files": (
        2 * form(b'name="audio"; filename="a.wav"').replace(b"--b--\r\n", b""),
        FORM,
        "in its own request",
    ),
    "a boundary that isn't there": (form(b'name="audio"'), FORM + "c", "between the boundary that the Content-Type"),
    "no boundary": (form(b'name="audio"; filename="a.wav"'), "multipart/form-data", "has no boundary"),
    "a form without its type": (form(b'name="audio"; filename="a.wav"'), "audio/wav", "without its Content-Type"),
    "JSON": (b'{"audio": "UklGRg=="}', "application/json", "this is JSON, so send the file itself: as the body"),
    "JSON of another type": (b'[{"a": 1}]', "audio/wav", "this is JSON"),
    "base64": (base64.b64encode(WAV), "text/plain", "this is base64"),
    "a data URL": (b"data:audio/wav;base64," + base64.b64encode(WAV), "text/plain", "this is a data URL"),
    "a web page": (b"<!DOCTYPE html><html>", "audio/wav", "this is a web page"),
    "a zip": (b"PK\x03\x04" + bytes(30), "audio/wav", "this is a compressed file"),
    "a path": (b"recordings/dawn 1.wav\n", "audio/wav", "this is a path or a URL, so send the file itself"),
    "a URL": (b"https://example.org/a?b=c", "audio/wav", "this is a path or a URL"),
    "another kind of multipart": (
        b"--b\r\n\r\nx\r\n--b--\r\n",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
    ),
    "nothing": (b"", "audio/wav", "is empty"),
    "curl -d": (WAV.translate(None, b"\0\r\n"), URLENCODED, "--data-binary @FILE"),
    "curl -d of a FLAC": (encode(2, 44100, 1, "FLAC").translate(None, b"\0\r\n"), URLENCODED, "--data-binary @FILE"),
    "base64 as a form": (base64.b64encode(20 * WAV), URLENCODED, "this is base64"),
    "base64 in a form as text": (b"audio=" + base64.b64encode(20 * WAV), URLENCODED, "this is a form as text"),
    "fields of a form as text": (b"audio=recording.wav", URLENCODED, "this is a form as text"),
}


@pytest.mark.parametrize(("body", "content_type", "expected"), BODIES.values(), ids=BODIES)
def test_what_is_no_recording_is_named_with_the_remedy(audio_server, body, content_type, expected):
    for path in ("/predict", "/embed"):
        said = error(audio_server.post(path, content=body, headers={"Content-Type": content_type}))
        assert expected in said
        assert "Convert it" not in said, "no remedy for what is no recording"


def test_a_recording_of_any_declared_type_is_read(audio_server):
    for content_type in (URLENCODED, "application/json", "text/plain"):
        answer = audio_server.post("/predict", content=WAV, headers={"Content-Type": content_type})
        assert answer.status_code == 200


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data-binary", "@a.wav"], '"detections"'),
        (["-F", "audio=@a.wav"], '"detections"'),
        (["-d", "@a.wav"], "--data-binary @FILE"),
        (["-F", "audio=<a.wav"], "-F audio=@FILE"),
        (["-T", "a.wav"], "takes POST, not PUT; curl sends it with --data-binary @FILE"),
        (["--json", '{"audio": "a.wav"}'], "this is JSON"),
    ],
)
def test_as_curl_sends_it(audio_server, tmp_path, options, expected):
    (tmp_path / "a.wav").write_bytes(WAV)
    command = [CURL, "-sS", *options, f"{audio_server.url}/predict"]
    assert expected in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (WAV, "it is a recording. Send recordings to /predict"),
        (form(b'name="audio"; filename="a.wav"'), "it is a form. Send recordings to /predict"),
        (b"", "it is empty"),
        (b"\x1f\x8b", "compressed file"),
    ],
)
def test_what_is_no_json_is_named(audio_server, body, expected):
    assert expected in error(audio_server.post(INFER, content=body))
    assert expected in error(audio_server.post("/classify", content=body))


@pytest.mark.parametrize("filling", [b":" * 2**13, bytes(2**23)])
def test_a_long_recording_in_place_of_json_is_named(audio_server, filling):
    """It isn't measured as JSON would be."""
    expected = "it is a recording. Send recordings to /predict"
    assert expected in error(audio_server.post(INFER, content=WAV + filling))


def test_an_output_nearly_right(audio_server):
    body = {"inputs": [], "outputs": [{"name": "detection"}]}
    assert error(audio_server.post(INFER, json=body)).endswith("has logits, embedding, scores, detections")


def test_a_recording_by_the_input_of_another_model(embedding_server):
    tensor = {"name": "waveform", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(WAV).decode()]}
    answer = embedding_server.post("/v2/models/tiny-offline/infer", json={"inputs": [tensor]})
    assert error(answer) == "inputs are 'waveform'; expected one, 'embedding', for recordings too"


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_numbers_that_json_lacks(audio_server, number):
    head = '{"inputs": [{"name": "waveform", "datatype": "FP32", "shape": [1, 2], "data": '
    for path, start, end in ((INFER, head, "}]}"), ("/classify", '{"embeddings": ', "}")):
        answer = audio_server.post(path, content=f"{start}[0.5, {number}]{end}")
        assert "JSON has no NaN or Infinity" in error(answer)


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("PUT", "/predict", 405, "/predict takes POST, not PUT; curl sends it with --data-binary @FILE"),
        ("GET", "/predict", 405, "/predict takes POST, not GET"),
        ("OPTIONS", "/predict", 405, "must be started with CORS (docs/securing.md)"),
        ("POST", "/livez", 405, "/livez takes GET, HEAD, not POST"),
        ("POST", "/v2/models/tiny", 405, "/v2/models/{name} takes GET, HEAD, not POST"),
        ("POST", "/predicts", 404, "no /predicts here; did you mean /predict; /docs.json has all paths"),
        ("GET", "/nothing/of/this/kind", 404, "no /nothing/of/this/kind here; /docs.json has all paths, and / the"),
        ("GET", "/v2/models", 404, "did you mean /v2/models/{name};"),
        ("POST", "/predict/a.wav", 404, "no /predict/a.wav here"),
        ("POST", "/PREDICT", 404, "did you mean /predict;"),
        (
            "POST",
            "/v1/models/tiny:predict",
            404,
            "/v2/models/{name}/infer, of the Open Inference Protocol, or /predict",
        ),
        ("POST", "/v1/models/tiny/versions/1:predict", 404, "did you mean /v2/models/{name}/infer,"),
        ("GET", "/v1/models/tiny", 404, "did you mean /v2/models/{name};"),
        ("GET", "/v1/models", 404, "did you mean /v2/repository/index;"),
        ("POST", "/predictions/tiny", 404, "did you mean /predict;"),
        ("POST", "/invocations", 404, "did you mean /predict;"),
        ("GET", "/ping", 404, "did you mean /livez;"),
        ("GET", "/labels", 404, "did you mean /models/{name};"),
        ("GET", "/v2/models/tiny/labels", 404, "did you mean /models/{name};"),
        ("GET", "/openapi.json", 404, "did you mean /docs.json;"),
        ("GET", "/swagger/index.html", 404, "did you mean /docs.json;"),
    ],
)
def test_another_method_or_path(audio_server, method, path, status, expected):
    answer = audio_server.client.request(method, path)
    assert expected in error(answer, status)
    if status == 405:
        assert f"takes {answer.headers['Allow']}, not {method}" in answer.json()["error"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_a_compressed_body(audio_server, encoding):
    said = error(audio_server.post("/predict", content=WAV, headers={"Content-Encoding": encoding}), 415)
    assert "without Content-Encoding: FLAC makes recordings smaller" in said


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_an_encoding_that_is_none(audio_server, encoding):
    assert audio_server.post("/predict", content=WAV, headers={"Content-Encoding": encoding}).status_code == 200


def test_a_misspelt_option(audio_server):
    said = error(audio_server.post("/predict", content=WAV, params={"treshold": 0.3}))
    assert said.startswith("unknown option 'treshold'; did you mean threshold? known: ")


def test_options_of_classify_in_the_url(embedding_server):
    said = error(embedding_server.post("/classify", json={"embeddings": [[0] * DIM]}, params={"top_k": 1}))
    assert said.startswith(
        "option 'top_k' is in the URL; expected it in the JSON, next to embeddings: model, version,"
    )


def test_embeddings_without_rows(embedding_server):
    said = error(embedding_server.post("/classify", json={"embeddings": [0] * DIM}))
    assert said == f"input 'embedding' has shape [{DIM}]; expected [-1, {DIM}]: a row for each embedding"


def test_a_misspelt_option_of_a_model(audio_server):
    said = error(audio_server.get("/models/tiny?versoin=1"))
    assert said == "unknown option 'versoin'; did you mean version? known: version"


def test_a_put_to_what_is_only_read(audio_server):
    assert error(audio_server.client.put("/"), 405) == "/ takes GET, HEAD, not PUT"


@pytest.mark.parametrize(
    "path", ["/predict/", "/v2/models/tiny/infer/", "/readyz/", "/docs.json/", "/predict//", "/v2/models/tiny%2F"]
)
def test_a_slash_at_the_end(audio_server, path):
    method = "POST" if "predict" in path or "infer" in path else "GET"
    answer = audio_server.client.request(method, path)
    assert error(answer, 307) == f"no {unquote(path)} here; leave out the slash at its end"
    assert answer.url.join(answer.headers["Location"]).path == unquote(path).rstrip("/")


def test_a_client_that_follows_the_slash(audio_server):
    options = {"top_k": 1, "channel": "mix", "label": "é&=1 +"}
    answer = audio_server.client.post("/predict/", params=options, content=WAV, follow_redirects=True)
    without = audio_server.client.post("/predict", params=options, content=WAV)
    assert answer.url == without.url
    assert (answer.status_code, answer.text) == (without.status_code, without.text)


# -- the protocol ---------------------------------------------------------------------------------------------------


def infer_json(*texts, shape=None, **parameters):
    shape = [len(texts)] if shape is None else shape
    tensor = {"name": "waveform", "datatype": "BYTES", "shape": shape, "data": texts}
    return {"inputs": [tensor], "parameters": parameters}


@pytest.mark.parametrize(
    "text",
    [
        base64.encodebytes(WAV).decode(),
        BASE64.replace("A", "A\r\n"),
        f"data:audio/wav;base64,{BASE64}",
        f"data:audio/x-wav;codecs=1;BASE64,\n{base64.encodebytes(WAV).decode()}",
        base64.urlsafe_b64encode(WAV).decode(),
    ],
    ids=["lines", "Windows' lines", "data URL", "both", "for URLs"],
)
def test_base64_as_programs_write_it(audio_server, text):
    expected = audio_server.post(INFER, json=infer_json(BASE64)).json()
    assert audio_server.post(INFER, json=infer_json(text)).json() == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([BASE64, "http://127.0.0.1/a.wav"], "recording 2 is no base64"),
        ([BASE64[:-1]], "recording 1 is no base64"),
        (["recordings/a.wav"], "neither its path nor its URL"),
        (["data:audio/wav,RIFF"], "recording 1 is a data URL without base64"),
        ([[BASE64]], "one list of strings, each a recording as base64, and the shape [recordings]"),
    ],
)
def test_what_is_no_base64(audio_server, texts, expected):
    assert expected in error(audio_server.post(INFER, json=infer_json(*texts)))


def wav(rate, samples):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples), rate, format="WAV")
    return file.getvalue()


BAD = {
    "no audio": (b"this is no audio", "can't be decoded"),
    "a rate that can't be": (wav(48, 9600), "the sample rate is 48"),
    "too little": (wav(192_000, 1), "less than one"),
    "base64": (base64.b64encode(WAV), "this is base64, so send the file's own bytes"),
}


@pytest.mark.parametrize(("bad", "expected"), BAD.values(), ids=BAD)
def test_which_of_several_recordings_is_bad(audio_server, bad, expected):
    body = infer_json(BASE64, base64.b64encode(bad).decode(), BASE64)
    over_http = error(audio_server.post(INFER, json=body))
    assert over_http.startswith("recording 2: ")
    assert expected in over_http
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[3]).contents.bytes_contents.extend([WAV, bad, WAV])
    with grpc.insecure_channel(audio_server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc(channel)(request, timeout=30)
    assert caught.value.details() == over_http
    alone = error(audio_server.post(INFER, json=infer_json(base64.b64encode(bad).decode())))
    assert not alone.startswith("recording")


def test_an_option_is_about_no_recording(audio_server):
    answer = audio_server.post(INFER, json=infer_json(BASE64, BASE64, overlap=3))
    assert error(answer).startswith("overlap is 3")


def test_windows_of_the_wrong_length(audio_server):
    tensor = {"name": "waveform", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}
    said = error(audio_server.post(INFER, json={"inputs": [tensor]}))
    assert f"expected [-1, {WINDOW}]: a row for each window of {WINDOW} samples at 16000 Hz" in said
    assert "send their files as BYTES" in said
    tensor |= {"shape": [1, WINDOW]}
    assert error(audio_server.post(INFER, json={"inputs": [tensor]})).endswith(f"has 3 elements; expected {WINDOW}")


def test_hexadecimal_digits_are_no_form(audio_server):
    said = error(audio_server.post(INFER, json=infer_json(WAV.hex())))
    assert "can't be decoded" in said
    assert "form" not in said.replace("format", "").replace("another form that", "")


def test_raw_bytes_without_their_length(audio_server):
    request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[WAV])
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    with grpc.insecure_channel(audio_server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc(channel)(request, timeout=30)
    assert "expected before each the number of its bytes, in 4 bytes, little-endian" in caught.value.details()


def test_numbers_in_the_field_of_another_type(audio_server):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="waveform", datatype="FP32", shape=[1, WINDOW])
    tensor.contents.fp64_contents.extend([0] * WINDOW)
    with grpc.insecure_channel(audio_server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc(channel)(request, timeout=30)
    assert caught.value.details().endswith("has fp64_contents; expected fp32_contents, or raw_input_contents")


def test_binary_tensors_without_their_header(audio_server):
    tensor = {"name": "waveform", "datatype": "FP32", "shape": [1, WINDOW]}
    tensor["parameters"] = {"binary_data_size": 4 * WINDOW}
    said = error(audio_server.post(INFER, content=json.dumps({"inputs": [tensor]}).encode() + bytes(4 * WINDOW)))
    assert said.endswith("if these are binary tensors, send the header Inference-Header-Content-Length")


def warnings(answer):
    assert answer.status_code == 200
    return json.loads(answer.json().get("parameters", {}).get("warnings", "[]"))


KNOWN = "known: overlap, hop, final_clip, channel, probe, threshold, top_k, label, merge, merge_score"


def test_parameters_that_change_nothing_are_named(audio_server):
    def ask(body, **options):
        return warnings(audio_server.post(INFER, json=body, **options))

    assert ask(infer_json(BASE64, overlap=0.05, binary_data_output=False, timeout=3)) == []
    assert ask(infer_json(BASE64, overlp=0.05)) == [f"unknown parameters were ignored: 'overlp'; {KNOWN}"]
    (many,) = ask(infer_json(BASE64, **{f"p{number}": 1 for number in range(9)}))
    assert many == f"unknown parameters were ignored: 'p0', 'p1', 'p2', 'p3' and 5 more; {KNOWN}"
    (in_url,) = ask(infer_json(BASE64), params={"overlap": 0.05})
    assert in_url == "options in the URL were ignored: 'overlap'; send parameters in the request"
    tensor = {"name": "waveform", "datatype": "FP32", "shape": [1, WINDOW], "data": [0] * WINDOW}
    (of_windows,) = ask({"inputs": [tensor], "parameters": {"overlap": 0.05, "probe": "linear"}})
    assert of_windows == "parameters for recordings were ignored: 'overlap'; the input is FP32, not BYTES"
    (of_scores,) = ask(infer_json(BASE64, threshold=0.3))
    assert of_scores == "parameters for detections were ignored: 'threshold'; ask for the output 'detections'"
    assert ask({**infer_json(BASE64, threshold=0.3), "outputs": [{"name": "detections"}]}) == []
    (twice,) = ask({**infer_json(BASE64, probe="linear"), "output": [], "model_version": "0"})
    assert twice.startswith("unknown fields were ignored: 'output', 'model_version'; known: id, inputs, outputs,")
    assert "options belong in parameters, the version in the path" in twice
    of_tensors = {**infer_json(BASE64), "outputs": [{"name": "scores", "class_count": 2}]}
    of_tensors["inputs"][0] |= {"rate": 8000, "parameters": {"sample_rate": 8000}}
    fields, parameters = ask(of_tensors)
    assert fields.startswith("unknown fields were ignored: 'inputs.rate', 'outputs.class_count'; known: id,")
    assert parameters.startswith("unknown parameters of inputs and outputs were ignored: 'sample_rate'; known:")
    misplaced = {**infer_json(BASE64), "outputs": [{"name": "detections", "parameters": {"top_k": 1}}]}
    misplaced["inputs"][0]["parameters"] = {"overlap": 0.05, "content_type": "audio/wav"}
    said = "parameters of inputs and outputs were ignored: 'overlap', 'top_k'; send them as those of the request"
    assert ask(misplaced) == [said]
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1]).contents.bytes_contents.append(WAV)
    request.inputs[0].parameters["overlap"].double_param = 0.05
    request.outputs.add(name="detections").parameters["top_k"].int64_param = 1
    with grpc.insecure_channel(audio_server.grpc) as channel:
        answer = rpc(channel)(request, timeout=30)
    assert json.loads(answer.parameters["warnings"].string_param) == [said]


TRUTHS = ["threshold", "top_k", "overlap", "hop", "channel", "merge"]


@pytest.mark.parametrize("name", TRUTHS)
def test_a_truth_value_is_no_number(audio_server, name):
    """It counted as 1."""
    body = {**infer_json(BASE64, **{name: True}), "outputs": [{"name": "detections"}]}
    assert error(audio_server.post(INFER, json=body)).startswith(f"{name} is true; expected")
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1]).contents.bytes_contents.append(WAV)
    request.parameters[name].bool_param = True
    with grpc.insecure_channel(audio_server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc(channel)(request, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"{name} is true; expected")
    assert f"{name} is 'true'; expected" in error(audio_server.post("/predict", params={name: "true"}, content=WAV))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("threshold", "{robin: 0.7}", 'expected a number, or JSON of numbers by label such as {"robin": 0.7}'),
        ("threshold", {"a": "high"}, "threshold is an object; expected a number, or JSON of numbers by label"),
        ("label", ["a", 1], "label is a list; expected a list of texts alone"),
        ("label", [], "label is an empty list; expected one label or more"),
    ],
)
def test_options_of_the_wrong_kind(audio_server, name, value, expected):
    body = {**infer_json(BASE64, **{name: value}), "outputs": [{"name": "detections"}]}
    assert expected in error(audio_server.post(INFER, json=body))


def test_null_stands_for_the_default(audio_server):
    names = [
        "overlap",
        "hop",
        "final_clip",
        "channel",
        "probe",
        "threshold",
        "top_k",
        "label",
        "merge",
        "merge_score",
    ]
    plain, null = (
        audio_server.post(INFER, json={**infer_json(BASE64, **options), "outputs": [{"name": "detections"}]}).json()
        for options in ({}, dict.fromkeys(names))
    )
    assert null == plain


@pytest.mark.parametrize("options", ["label=nix", "label=nix&format=csv", 'threshold={"nix": 0.5}'])
def test_an_unknown_label_says_where_the_labels_are(audio_server, options):
    said = error(audio_server.post(f"/predict?{options}", content=WAV), 404)
    where = "All are in GET /models/NAME, in ModelConfig over gRPC, and in `avex-serve info BUNDLE`"
    assert said.startswith("no probe has the label 'nix'; ")
    assert said.endswith(where)
    labels = audio_server.client.get("/models/tiny").json()["probes"][0]["labels"]
    joined = error(audio_server.post("/predict", params={"label": ",".join(labels[:2])}, content=WAV), 404)
    assert "; name each label by an option of its own. All are in" in joined


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(audio_server, encoding):
    said = error(audio_server.post(INFER, content=json.dumps(infer_json(BASE64)).encode(encoding)))
    assert said.endswith("; write it as UTF-8 without a byte order mark")


def test_a_warning_of_all_recordings_is_given_once(audio_server):
    opposite, plain = io.BytesIO(), io.BytesIO()
    noise = np.random.default_rng(4).uniform(-0.5, 0.5, 4000)
    soundfile.write(opposite, np.stack([noise, -noise], 1), 16000, format="WAV", subtype="FLOAT")
    soundfile.write(plain, noise, 16000, format="WAV")
    one, other = (base64.b64encode(each.getvalue()).decode() for each in (opposite, plain))
    (warning,) = warnings(audio_server.post(INFER, json=infer_json(one)))
    assert warnings(audio_server.post(INFER, json=infer_json(one, one))) == [warning]
    assert warnings(audio_server.post(INFER, json=infer_json(other, one))) == [f"recording 2: {warning}"]


# -- channels, and messages about them ------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [1, 2, "mix"])
def test_the_channel_that_is_asked_for_is_read_over_both_transports(audio_server, audio_engine, channel):
    file = io.BytesIO()
    noise = np.random.default_rng(4).uniform(-0.5, 0.5, (4000, 2))
    soundfile.write(file, noise, 16000, format="WAV", subtype="FLOAT")
    expected = audio_engine.score(*decode(file.getvalue(), channel)).scores
    answer = audio_server.post(
        "/predict", params={"channel": channel, "threshold": -1}, files={"audio": file.getvalue()}
    )
    found = {(each["start"], each["label"]): each["score"] for each in answer.json()["detections"]}
    assert sorted(found.values()) == pytest.approx(sorted(expected.ravel().tolist()))
    for inputs in ([file.getvalue()], [file.getvalue()] * 2):
        body = infer_json(*(base64.b64encode(each).decode() for each in inputs), channel=channel)
        scores = next(
            output for output in audio_server.post(INFER, json=body).json()["outputs"] if output["name"] == "scores"
        )
        assert scores["data"] == pytest.approx(np.concatenate([expected] * len(inputs)).ravel().tolist())


def test_a_channel_that_is_not_there(audio_server):
    told = error(audio_server.post("/predict", params={"channel": 3}, content=WAV))
    assert told.startswith("channel is 3; expected 1 to 2")
    told = error(audio_server.post("/predict", params={"channel": 1}, content=b""))
    assert told.startswith("the audio is empty")
    told = error(audio_server.post(INFER, json=infer_json(BASE64, BASE64, channel=3)))
    assert told.startswith("recording 1: channel is 3; expected 1 to 2")
