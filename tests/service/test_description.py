"""What clients can learn from the service alone: labels, windows, audio needs, and the methods of gRPC."""

import json
import time

import grpc
import jsonschema
import numpy as np
import pytest
import tritonclient.grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2

from avex_serve.service.grpc import reflection
from avex_serve.service.grpc.reflection import MAX_QUESTION, REFLECTION
from tests.bundles import LABELS, NOISES, make_probes_bundle
from tests.service.conftest import running_server

SERVICE = "inference.GRPCInferenceService"
RECORDINGS = "send whole files (WAV, FLAC, OGG, MP3), of any rate and length, as BYTES of shape [files] in waveform"
DETECTIONS = (
    "name the output 'detections' for a JSON object (start, end, label, score) of each sound found in recordings"
)
REQUEST = json.dumps(
    ["overlap", "hop", "final_clip", "channel", "probe", "threshold", "top_k", "label", "merge", "merge_score"]
)
AUDIO = {
    "detections": DETECTIONS,
    "recordings": RECORDINGS,
    "sample_rate": 16000,
    "channels": 1,
    "window_seconds": 0.1,
    "window_samples": 1600,
}
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def channel(audio_server):
    with grpc.insecure_channel(audio_server.grpc) as channel:
        yield channel


# -- what a model is ------------------------------------------------------------------------------------------------


def reflected(channel):
    """Make the class of a message by its name, as a client does that has nothing but the service's address."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))


def call(channel, method, request, answer):
    serializer, parser = type(request).SerializeToString, answer.FromString
    return channel.unary_unary(f"/{SERVICE}/{method}", serializer, parser)(request, timeout=30)


def grpc_parameters(answer):
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in answer.parameters.items()}


def test_metadata_over_both_transports(audio_server, channel):
    expected = {
        "trained": True,
        "request_parameters": REQUEST,
        **AUDIO,
        "labels": json.dumps(LABELS, ensure_ascii=False),
        "score_scale": "sigmoid",
        "threshold": 0.5,
    }
    assert audio_server.get("/v2/models/tiny").json()["parameters"] == expected
    message = reflected(channel)
    answer = call(
        channel, "ModelMetadata", message("ModelMetadataRequest")(name="tiny"), message("ModelMetadataResponse")
    )
    assert grpc_parameters(answer) == expected


def test_the_configuration_has_the_same(audio_server):
    """Triton's gRPC client drops the parameters of the metadata, and keeps those of the configuration."""
    expected = audio_server.get("/v2/models/tiny").json()["parameters"]
    expected = {name: value if isinstance(value, str) else json.dumps(value) for name, value in expected.items()}
    with tritonclient.grpc.InferenceServerClient(audio_server.grpc) as client:
        parameters = client.get_model_config("tiny").config.parameters
    assert {name: value.string_value for name, value in parameters.items()} == expected
    over_http = audio_server.get("/v2/models/tiny/config").json()["parameters"]
    assert {name: value["string_value"] for name, value in over_http.items()} == expected


def test_a_model_that_takes_embeddings(embedding_server):
    parameters = embedding_server.get("/v2/models/tiny-offline").json()["parameters"]
    assert parameters == {
        "trained": True,
        "request_parameters": REQUEST,
        "labels": json.dumps(LABELS, ensure_ascii=False),
        "score_scale": "softmax",
        "threshold": 0.5,
    }
    described = embedding_server.get("/models/tiny-offline").json()
    assert (described["audio"], described["embeddings"]) == (None, [])
    assert (described["routes"], described["inputs"]) == (["/classify"], [{"name": "embedding", "shape": [-1, 4]}])


def test_several_probes_have_labels_of_their_own(tmp_path):
    make_probes_bundle(tmp_path / "bundle")
    with running_server(tmp_path, AVEX_BUNDLE=str(tmp_path / "bundle")) as server:
        described = server.get("/models/tiny-probes").json()
        parameters = server.get("/v2/models/tiny-probes").json()["parameters"]
    assert {probe["name"]: probe["labels"] for probe in described["probes"]} == {
        "birds": list(LABELS),
        "noise": list(NOISES),
    }
    for probe in described["probes"]:
        assert json.loads(parameters[f"{probe['name']}.labels"]) == probe["labels"]
        assert parameters[f"{probe['name']}.score_scale"] == probe["score_scale"]
        assert parameters[f"{probe['name']}.threshold"] == probe["threshold"]


def test_a_model_in_one_document(audio_server):
    described = audio_server.get("/models/tiny").json()
    assert described["audio"] == {"sample_rate": 16000, "channels": 1, "window": 0.1, "shortest": 0.1}
    probe = {"name": "linear", "labels": list(LABELS), "score_scale": "sigmoid", "threshold": 0.5, "trained": True}
    assert described["probes"] == [probe]
    assert described["embeddings"] == [{"output": "embedding", "shape": [4], "layers": ["last"]}]
    assert described["versions"] == ["1"]
    assert described["routes"] == ["/predict", "/embed"]
    assert described["inputs"] == [{"name": "waveform", "shape": [-1, 1600]}]
    assert audio_server.get("/models/tiny?version=1").json() == described
    document = audio_server.get("/docs.json").json()
    schema = document["paths"]["/models/{name}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(described, {**schema, "components": document["components"]})
    schemas = document["components"]["schemas"]
    assert described.keys() == schemas["Model"]["properties"].keys()
    (listed,) = audio_server.client.get("/", headers={"Accept": "application/json"}).json()["models"]
    assert listed.keys() == schemas["Home"]["properties"]["models"]["items"]["properties"].keys()


def test_what_accept_may_name_is_described(audio_server):
    operation = audio_server.get("/docs.json").json()["paths"]["/predict"]["post"]
    (described,) = (each["description"] for each in operation["parameters"] if each["name"] == "format")
    assert "stream for application/x-ndjson, csv for text/csv, raven for text/tab-separated-values" in described
    content = operation["responses"]["200"]["content"]
    assert content["application/vnd.apache.parquet"]["schema"]["format"] == "binary", "not text"


@pytest.mark.parametrize(
    ("path", "expected"), [("/models/other", "no model 'other'"), ("/models/tiny?version=2", "no version '2'")]
)
def test_an_unknown_model(audio_server, path, expected):
    answer = audio_server.get(path)
    assert answer.status_code == 404
    assert expected in answer.json()["error"]


def test_an_answer_explains_itself(audio_server, channel, wav, predict):
    """From an address alone: labels and windows of a recording's scores."""
    message = reflected(channel)
    metadata = grpc_parameters(
        call(
            channel, "ModelMetadata", message("ModelMetadataRequest")(name="tiny"), message("ModelMetadataResponse")
        )
    )
    request = message("ModelInferRequest")(model_name="tiny")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1]).contents.bytes_contents.append(wav)
    request.outputs.add(name="scores")
    answer = call(channel, "ModelInfer", request, message("ModelInferResponse"))
    scores = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
    labels, spans = json.loads(metadata["labels"]), json.loads(grpc_parameters(answer)["spans"])
    found = {
        (start, end, labels[index], float(scores[row, index]))
        for row, (start, end) in enumerate(spans)
        for index in np.flatnonzero(scores[row] >= 0.5)
    }
    expected = predict(wav)["detections"]
    assert found == {(each["start"], each["end"], each["label"], each["score"]) for each in expected}


# -- reflection -----------------------------------------------------------------------------------------------------


def ask(channel, questions, version=REFLECTION[0], **options):
    stream = channel.stream_stream(
        f"/{version}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return stream(iter(questions), timeout=30, **options)


def question(**fields):
    return reflection_pb2.ServerReflectionRequest(**fields)


@pytest.mark.parametrize("version", REFLECTION)
def test_reflection_lists_what_is_served(channel, version):
    files, services, nothing, missing = ask(
        channel,
        [
            question(file_containing_symbol=f"{SERVICE}.ModelInfer"),
            question(list_services=""),
            question(),
            question(file_by_filename="nothing.proto"),
        ],
        version,
    )
    names = [service.name for service in services.list_services_response.service]
    assert names == sorted([SERVICE, "grpc.health.v1.Health", *REFLECTION])
    assert len(files.file_descriptor_response.file_descriptor_proto) == 1
    assert nothing.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    for answer, name in zip(
        ask(channel, [question(file_containing_symbol=name) for name in names]), names, strict=True
    ):
        assert answer.file_descriptor_response.file_descriptor_proto, name


def test_the_described_methods_are_those_that_are_served(audio_server, channel):
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    methods = {method.name for method in pool.FindServiceByName(SERVICE).methods}
    theirs = {method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert methods <= theirs
    for method in theirs:
        offered = True
        try:
            channel.unary_unary(f"/{SERVICE}/{method}")(b"\xff", timeout=30)
        except grpc.RpcError as error:
            offered = error.code() is not grpc.StatusCode.UNIMPLEMENTED
        assert offered == (method in methods), method


def test_reflection_passes_the_front(tmp_path):
    with (
        running_server(tmp_path, AVEX_API_KEYS=KEY) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(ask(channel, [question(list_services="")]))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {KEY}"), ("x-request-id", "asked-1"))
        stream = ask(channel, [question(list_services="")], metadata=metadata)
        assert len(list(stream)) == 1
        assert dict(stream.initial_metadata())["x-request-id"] == "asked-1"
        metrics = server.client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        route = f'route="{REFLECTION[0]}/ServerReflectionInfo"'
        for status in ("OK", "UNAUTHENTICATED"):
            assert f'avex_requests_total{{{route},status="{status}",transport="grpc"}} 1.0' in metrics
        assert "asked-1" in server.log


@pytest.mark.parametrize(
    ("data", "code"), [(b"\xff", "INVALID_ARGUMENT"), (b"x" * (MAX_QUESTION + 1), "INVALID_ARGUMENT")]
)
def test_what_is_no_question(channel, data, code):
    stream = channel.stream_stream(f"/{REFLECTION[0]}/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([data]), timeout=30))
    assert caught.value.code().name == code


def test_streams_that_ask_nothing_end_and_are_bounded(channel):
    def pausing():
        yield question(list_services="")
        time.sleep(reflection.IDLE_SECONDS + 5)

    streams = [ask(channel, pausing()) for _ in range(reflection.MAX_STREAMS)]
    assert all(len(next(stream).list_services_response.service) == 4 for stream in streams)
    with pytest.raises(grpc.RpcError) as caught:
        list(ask(channel, [question(list_services="")]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [list(stream) for stream in streams] == [[]] * len(streams)
    assert len(list(ask(channel, [question(list_services="")]))) == 1
