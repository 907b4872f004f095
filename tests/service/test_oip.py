"""The Open Inference Protocol, asked with Triton's clients and with hand-written requests."""

import base64
import json
import struct
import subprocess
import sys

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2

from avex_serve.audio.reader import decode
from avex_serve.errors import ClientGoneError
from avex_serve.inference.scores import activate
from avex_serve.scheduling.request import Request, answering
from avex_serve.service.grpc.messages import DESCRIPTORS, message_class
from avex_serve.service.parsing import from_raw

OUTPUTS = ["logits", "embedding", "scores"]


@pytest.fixture(params=["http", "grpc"])
def triton(request, audio_server):
    """Triton's client module and a client."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    client = module.InferenceServerClient(getattr(audio_server, request.param))
    yield module, client
    client.close()


@pytest.fixture(scope="session")
def windows():
    """A batch of windows, (5, 1600) float32."""
    return np.random.default_rng(1).uniform(-0.5, 0.5, (5, 1600)).astype(np.float32)


@pytest.fixture(scope="session")
def expected(audio_engine, windows):
    """What the engine says of the windows."""
    return with_scores(audio_engine.infer(windows))


def with_scores(outputs):
    return {**outputs, "scores": activate(outputs["logits"], "sigmoid")}


def tensor(module, array, datatype, **arguments):
    made = module.InferInput("waveform", list(array.shape), datatype)
    made.set_data_from_numpy(array, **arguments)
    return made


def response_parameters(result):
    response = result.get_response()
    if isinstance(response, dict):
        return response.get("parameters", {})
    return {key: value.string_param for key, value in response.parameters.items()}


def check(result, expected, names=OUTPUTS):
    for name in OUTPUTS:
        got = result.as_numpy(name)
        if name in names:
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, expected[name])
        else:
            assert got is None


def test_health_and_metadata(triton):
    module, client = triton
    as_json = {"as_json": True} if module is tritonclient.grpc else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    server = client.get_server_metadata(**as_json)
    assert server["name"] == "avex-serve"
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("tiny", "1", **as_json)
    assert (model["name"], model["versions"], model["platform"]) == ("tiny", ["1"], "onnxruntime_onnx")
    assert [(i["name"], i["datatype"], [int(n) for n in i["shape"]]) for i in model["inputs"]] == [
        ("waveform", "FP32", [-1, 1600])
    ]
    assert [(o["name"], o["datatype"], [int(n) for n in o["shape"]]) for o in model["outputs"]] == [
        ("logits", "FP32", [-1, 3]),
        ("embedding", "FP32", [-1, 4]),
        ("scores", "FP32", [-1, 3]),
    ]


@pytest.mark.parametrize("names", [[], ["scores"], ["embedding", "logits"]])
def test_infer_windows(triton, windows, expected, names):
    module, client = triton
    outputs = [module.InferRequestedOutput(name) for name in names]
    result = client.infer("tiny", [tensor(module, windows, "FP32")], outputs=outputs, request_id="7")
    check(result, expected, names or OUTPUTS)
    response = result.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "7"


def test_infer_recordings(triton, audio_engine, wav, recording):
    module, client = triton
    recordings = np.array([recording, wav, recording], dtype=np.object_)
    parameters = {"overlap": "0.02", "probe": "linear"}
    result = client.infer("tiny", [tensor(module, recordings, "BYTES")], parameters=parameters)
    parts = [audio_engine.infer_recording(*decode(each), overlap=0.02) for each in recordings]
    check(result, with_scores({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}))
    parameters = response_parameters(result)
    assert json.loads(parameters["windows"]) == [len(part["logits"]) for part in parts]
    spans = [audio_engine.embed(*decode(each), overlap=0.02).spans.tolist() for each in recordings]
    assert json.loads(parameters["spans"]) == [span for each in spans for span in each]


def test_scores_of_recordings_are_those_of_predict(triton, audio_engine, wav):
    module, client = triton
    result = client.infer("tiny", [tensor(module, np.array([wav], dtype=np.object_), "BYTES")])
    np.testing.assert_array_equal(result.as_numpy("scores"), audio_engine.score(*decode(wav)).scores)


def test_one_window_as_samples_and_as_recording(triton, windows):
    module, client = triton
    pcm = np.round(windows[:1] * 32768).astype("<i2")
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + pcm.nbytes,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        16000,
        32000,
        2,
        16,
        b"data",
        pcm.nbytes,
    )
    encoded = np.array([header + pcm.tobytes()], dtype=np.object_)
    from_bytes = client.infer("tiny", [tensor(module, encoded, "BYTES")])
    from_samples = client.infer("tiny", [tensor(module, pcm.astype(np.float32) / 32768, "FP32")])
    np.testing.assert_array_equal(from_bytes.as_numpy("logits"), from_samples.as_numpy("logits"))


def test_embedding_bundle(embedding_server, embedding_engine):
    embeddings = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    with tritonclient.grpc.InferenceServerClient(embedding_server.grpc) as client:
        made = tritonclient.grpc.InferInput("embedding", [3, 4], "FP32").set_data_from_numpy(embeddings)
        result = client.infer("tiny-offline", [made])
    logits = embedding_engine.infer(embeddings)["logits"]
    np.testing.assert_array_equal(result.as_numpy("logits"), logits)
    np.testing.assert_array_equal(result.as_numpy("scores"), activate(logits, "softmax"))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("path", ["/v2/models/tiny/infer", "/v2/models/tiny/versions/1/infer"])
def test_plain_json(audio_server, windows, expected, path, flat):
    data = windows.ravel().tolist() if flat else windows.tolist()
    answer = audio_server.post(
        path, json={"inputs": [{"name": "waveform", "shape": [5, 1600], "datatype": "FP32", "data": data}]}
    ).json()
    assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
    assert "id" not in answer
    for output in answer["outputs"]:
        got = np.array(output["data"], dtype=np.float32).reshape(output["shape"])
        np.testing.assert_array_equal(got, expected[output["name"]])
    assert [output["name"] for output in answer["outputs"]] == OUTPUTS


def test_recording_in_json_is_base64(audio_server, audio_engine, wav):
    text = base64.b64encode(wav).decode()
    answer = audio_server.post(
        "/v2/models/tiny/infer",
        json={
            "inputs": [{"name": "waveform", "shape": [1], "datatype": "BYTES", "data": [text]}],
            "outputs": [{"name": "logits"}],
        },
    ).json()
    np.testing.assert_array_equal(
        np.array(answer["outputs"][0]["data"], np.float32),
        audio_engine.infer_recording(*decode(wav))["logits"].ravel(),
    )
    spans = [[0.0, 0.1], [0.1, 0.2], [0.2, 0.3], [0.3, 0.37]]
    assert answer["parameters"] == {"windows": "[4]", "spans": json.dumps(spans)}


def test_triton_http_without_binary_tensors(audio_server, windows, expected):
    module = tritonclient.http
    client = module.InferenceServerClient(audio_server.http)
    outputs = [module.InferRequestedOutput("logits", binary_data=False), module.InferRequestedOutput("scores")]
    result = client.infer("tiny", [tensor(module, windows, "FP32", binary_data=False)], outputs=outputs)
    client.close()
    check(result, expected, ["logits", "scores"])
    assert "data" in result.get_output("logits")
    assert "data" not in result.get_output("scores")


def test_typed_contents(audio_server, windows, expected, wav, audio_engine):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="waveform", datatype="FP32", shape=windows.shape)
    request.inputs[0].contents.fp32_contents.extend(windows.ravel().tolist())
    recordings = service_pb2.ModelInferRequest(model_name="tiny")
    recordings.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    recordings.inputs[0].contents.bytes_contents.append(wav)
    with grpc.insecure_channel(audio_server.grpc) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            service_pb2.ModelInferRequest.SerializeToString,
            service_pb2.ModelInferResponse.FromString,
        )
        logits = np.frombuffer(infer(request).raw_output_contents[0], np.float32)
        np.testing.assert_array_equal(logits, expected["logits"].ravel())
        logits = np.frombuffer(infer(recordings).raw_output_contents[0], np.float32)
        np.testing.assert_array_equal(logits, audio_engine.infer_recording(*decode(wav))["logits"].ravel())


def test_recording_larger_than_grpc_takes_by_default(audio_server, audio_engine):
    batch = np.zeros((1000, 1600), np.float32)  # 6.4 MB
    with tritonclient.grpc.InferenceServerClient(audio_server.grpc) as client:
        result = client.infer("tiny", [tensor(tritonclient.grpc, batch, "FP32")])
    np.testing.assert_array_equal(result.as_numpy("logits"), audio_engine.infer(batch)["logits"])


def test_standard_health_service(audio_server):
    with grpc.insecure_channel(audio_server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_messages_have_the_fields_of_tritons(subtests):
    for name in (
        "ServerLiveResponse",
        "ServerReadyResponse",
        "ServerMetadataResponse",
        "ModelReadyRequest",
        "ModelReadyResponse",
        "ModelMetadataRequest",
        "ModelMetadataResponse",
        "InferParameter",
        "InferTensorContents",
        "ModelInferRequest",
        "ModelInferResponse",
    ):
        with subtests.test(name):
            ours, triton = message_class(name).DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR
            found = fields(ours)
            if name == "ModelMetadataResponse":
                assert found.pop(6)[0] == "parameters"  # which MLServer adds
            assert found == fields(triton)


def fields(descriptor):
    """Every field of a message and of those inside it, but for the names of map entries."""
    found = {}
    for field in descriptor.fields:
        inner = fields(field.message_type) if field.message_type else None
        found[field.number] = (field.name, field.type, field.is_repeated, inner)
    return found


def test_many_recordings_are_told_apart_in_steps():
    """So that a request that nobody waits for ends, and others get their turn meanwhile."""
    request, steps = Request(), []

    def yield_slot():
        steps.append(1)
        if len(steps) == 3:
            request.abandon()

    request.yield_slot = yield_slot
    with answering(request), pytest.raises(ClientGoneError):
        from_raw("waveform", "BYTES", [10_000], b"\x01\0\0\0a" * 10_000)


def test_the_committed_descriptors_are_those_of_the_proto(tmp_path):
    """`make proto` has been run since the file of the messages changed."""
    source, compiled = DESCRIPTORS.with_name("open_inference.proto"), tmp_path / "compiled.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={source.parent}"]
    subprocess.run([*command, f"--descriptor_set_out={compiled}", source.name], check=True)
    found, expected = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (DESCRIPTORS, compiled)
    )
    assert found == expected
    assert found.file[0].message_type
