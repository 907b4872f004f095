"""A padding mask and clips of any length over the Open Inference Protocol, by HTTP and gRPC."""

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.service.grpc.messages import message_class
from tests.bundles import SAMPLE_RATE, make_measuring_bundle
from tests.service.conftest import running_server

NAME = "measuring"
SHORTEST = 600
LONGEST = 5000
INFER = f"/v2/models/{NAME}/infer"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_measuring_bundle(tmp_path_factory.mktemp("bundles") / "bundle", NAME, SHORTEST)


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    options = {"AVEX_BUNDLE": str(bundle), "AVEX_MAX_CLIP_SECONDS": str(LONGEST / SAMPLE_RATE)}
    with running_server(tmp_path_factory.mktemp("server"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def engine(bundle):
    """The same bundle in this process: the oracle."""
    with open_bundle(bundle) as engine:
        yield engine


@pytest.fixture(params=["http", "grpc"])
def triton(request, server):
    """Triton's client module and a client."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    client = module.InferenceServerClient(getattr(server, request.param))
    yield module, client
    client.close()


def tensor(module, name, array, datatype, **arguments):
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **arguments)
    return made


def clips(samples):
    return np.random.default_rng(samples).uniform(-0.5, 0.5, (3, samples)).astype(np.float32)


def mask(samples):
    return np.arange(samples) >= np.array([[samples], [samples // 2], [1]])


def test_metadata_names_the_mask(triton):
    module, client = triton
    as_json = {"as_json": True} if module is tritonclient.grpc else {}
    inputs = client.get_model_metadata(NAME, "1", **as_json)["inputs"]
    assert [(i["name"], i["datatype"], [int(n) for n in i["shape"]]) for i in inputs] == [
        ("waveform", "FP32", [-1, -1]),
        ("padding_mask", "BOOL", [-1, -1]),
    ]
    config = client.get_model_config(NAME, "1", **as_json)
    types = [each["data_type"] for each in config.get("config", config)["input"]]
    assert types == ["TYPE_FP32", "TYPE_BOOL"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("samples", [SHORTEST, LONGEST])
def test_clips_with_their_mask_and_without(triton, engine, samples, binary):
    module, client = triton
    how = {"binary_data": binary} if module is tritonclient.http else {}
    wave, padded = clips(samples), mask(samples)
    inputs = [tensor(module, "waveform", wave, "FP32", **how), tensor(module, "padding_mask", padded, "BOOL", **how)]
    for sent, expected in (
        (inputs, engine.infer(wave, padded)),
        (inputs[::-1], engine.infer(wave, padded)),
        (inputs[:1], engine.infer(wave)),
    ):
        answer = client.infer(NAME, sent)
        for name in ("logits", "embedding"):
            np.testing.assert_array_equal(answer.as_numpy(name), expected[name])


def test_the_mask_as_typed_contents_of_grpc(server, engine):
    wave, padded = clips(SHORTEST), mask(SHORTEST)
    request = message_class("ModelInferRequest")(model_name=NAME)
    for name, datatype, array in (("waveform", "FP32", wave), ("padding_mask", "BOOL", padded)):
        added = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        field = "fp32_contents" if datatype == "FP32" else "bool_contents"
        getattr(added.contents, field).extend(array.ravel().tolist())
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        response = call(request)
    expected = engine.infer(wave, padded)
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name in expected:
            np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), expected[output.name].ravel())


def test_recordings_are_masked_and_cut_here(triton, engine, wav, recording):
    module, client = triton
    recordings = np.array([wav, recording], dtype=np.object_)
    answer = client.infer(NAME, [tensor(module, "waveform", recordings, "BYTES")])
    parts = [engine.infer_recording(*decode(each))["embedding"] for each in recordings]
    np.testing.assert_array_equal(answer.as_numpy("embedding"), np.concatenate(parts))


def test_what_is_wrong_is_told(triton):
    module, client = triton
    wave, padded = clips(SHORTEST), mask(SHORTEST)
    waveform = tensor(module, "waveform", wave, "FP32")
    recordings = tensor(module, "waveform", np.array([b"x"], dtype=np.object_), "BYTES")
    masked = tensor(module, "padding_mask", padded, "BOOL")
    for inputs, message in (
        ([tensor(module, "waveform", wave[:, 1:], "FP32")], "clips of 599 samples; expected at least 600"),
        ([tensor(module, "waveform", clips(LONGEST + 1), "FP32")], "5001 samples is longer than 0.3125 s"),
        ([masked], "inputs are 'padding_mask'; expected one, 'waveform', or 'padding_mask' too"),
        ([waveform, waveform], "inputs are 'waveform', 'waveform'"),
        ([waveform, tensor(module, "mask", padded, "BOOL")], "inputs are 'waveform', 'mask'"),
        (
            [waveform, tensor(module, "padding_mask", padded[:, 1:], "BOOL")],
            "the shape of the clips, .3, 600.",
        ),
        ([waveform, tensor(module, "padding_mask", padded.astype(np.float32), "FP32")], "type FP32 with FP32"),
        ([waveform, tensor(module, "padding_mask", padded | True, "BOOL")], "every sample of a clip as padding"),
        ([tensor(module, "waveform", padded, "BOOL")], "'waveform' has type BOOL"),
        ([recordings, masked], "type BOOL with BYTES; expected BOOL with FP32"),
    ):
        with pytest.raises(InferenceServerException, match=message) as error:
            client.infer(NAME, inputs)
        assert error.value.status() in ("413" if "longer" in message else "400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([0] * SHORTEST, "other values than true and false"),
        ([[True], [True, False]], "ragged"),
        ([True], "has 1 elements"),
    ],
    ids=["numbers", "ragged", "too few"],
)
def test_a_mask_in_json_that_is_none(server, data, message):
    inputs = [
        {"name": "waveform", "datatype": "FP32", "shape": [1, SHORTEST], "data": [0.5] * SHORTEST},
        {"name": "padding_mask", "datatype": "BOOL", "shape": [1, SHORTEST], "data": data},
    ]
    answer = server.post(INFER, json={"inputs": inputs})
    assert answer.status_code == 400
    assert message in answer.json()["error"]
