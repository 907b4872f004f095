"""A server of several bundles, asked with Triton's clients: the repository, versions, loading and unloading."""

import asyncio
import contextlib
import json
import shutil
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.bundles.manifest import ONNX
from avex_serve.inference.scores import activate
from avex_serve.service.grpc.health import MAX_WATCHERS
from avex_serve.service.grpc.messages import SERVICE, message_class
from tests.answers import as_json
from tests.bundles import (
    DIM,
    FINGERPRINT,
    LABELS,
    NOISES,
    WINDOW,
    change_manifest,
    make_audio_bundle,
    make_embedding_bundle,
    make_probes_bundle,
)
from tests.clients import until
from tests.service.conftest import running_server
from tests.service.test_http import bento_client
from tests.service.test_oip import fields

OPTIONS = {"AVEX_MODEL_CONTROL": "explicit", "AVEX_RELOAD_SECONDS": "0.1"}
WINDOWS = np.random.default_rng(1).uniform(-0.5, 0.5, (3, WINDOW)).astype(np.float32)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of bundles: two versions of one model, three others, and one that is broken."""
    folder = tmp_path_factory.mktemp("shelf")
    for version in ("9", "10"):
        change_manifest(make_audio_bundle(folder / "tiny" / version), version=version)
    make_audio_bundle(folder / "random", name="random", activation="softmax", trained=False)
    make_probes_bundle(folder / "probes", name="probes")
    make_embedding_bundle(folder / "offline", name="offline", reads=FINGERPRINT)
    (make_audio_bundle(folder / "broken", name="broken") / ONNX).write_bytes(b"changed")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, shelf):
    """A server of that folder whose clients may load and unload."""
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(shelf), **OPTIONS) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def triton(request, server):
    """Triton's client module and a client."""
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    client = module.InferenceServerClient(getattr(server, request.param))
    yield module, client
    client.close()


def as_dict(answer):
    """The answer of either client, as HTTP has it."""
    if isinstance(answer, dict | list):
        return answer
    return MessageToDict(answer, preserving_proto_field_name=True)


def index(client):
    answer = as_dict(client.get_model_repository_index())
    models = answer if isinstance(answer, list) else answer["models"]
    return {(each["name"], each.get("version", "")): (each["state"], each.get("reason", "")) for each in models}


def as_text(element):
    """An element of BYTES, which comes as text where the client asked for JSON."""
    return element.decode() if isinstance(element, bytes) else element


def windows(module, array=WINDOWS):
    return module.InferInput("waveform", list(array.shape), "FP32").set_data_from_numpy(array)


def message(caught):
    """The status and the text of a refusal, by both transports."""
    return str(caught.value.status()), caught.value.message()


def test_index(triton, server):
    _, client = triton
    models = index(client)
    once = {(name, "1") for name in ("random", "offline", "probes", "broken")}
    assert set(models) == {("tiny", "9"), ("tiny", "10"), *once}
    assert models["broken", "1"][0] == "UNAVAILABLE"
    assert "sha256 differs" in models["broken", "1"][1]
    del models["broken", "1"]
    assert set(models.values()) == {("READY", "")}
    assert {line["name"] for line in server.post("/v2/repository/index", json={"ready": True}).json()} == {
        "tiny",
        "random",
        "offline",
        "probes",
    }


def test_readiness(triton):
    module, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "9")
    assert not client.is_model_ready("broken")
    if module is tritonclient.grpc:
        with pytest.raises(InferenceServerException, match="no model 'nothing' here"):
            client.is_model_ready("nothing")
    else:
        assert not client.is_model_ready("nothing")
        assert not client.is_model_ready("tiny", "11")


def test_metadata_and_configuration(triton, server):
    _, client = triton
    for version, answered in (("", "10"), ("9", "9"), ("10", "10")):
        metadata = as_dict(client.get_model_metadata("tiny", version))
        assert metadata["versions"] == ["9", "10"]
        infer = client.infer("tiny", [windows(triton[0])], model_version=version).get_response()
        assert (infer["model_version"] if isinstance(infer, dict) else infer.model_version) == answered
    config = as_dict(client.get_model_config("random"))
    config = config.get("config", config)
    assert (config["name"], config["platform"], config["backend"]) == ("random", "onnxruntime_onnx", "onnxruntime")
    inputs = [(each["name"], each["data_type"], [int(size) for size in each["dims"]]) for each in config["input"]]
    assert inputs == [("waveform", "TYPE_FP32", [-1, WINDOW])]
    assert [each["name"] for each in config["output"]] == ["logits", "embedding", "scores"]
    assert config["parameters"]["trained"] == {"string_value": "false"}
    assert server.get("/v2/models/random").json()["parameters"]["trained"] is False
    extensions = as_dict(client.get_server_metadata())["extensions"]
    assert {"model_repository", "model_configuration", "classification", "binary_tensor_data"} <= set(extensions)


def test_random_weights_are_told(triton):
    module, client = triton
    for name in ("random", "tiny"):
        response = client.infer(name, [windows(module)]).get_response()
        if isinstance(response, dict):
            told = response.get("parameters", {}).get("trained")
        else:
            told = response.parameters["trained"].bool_param if "trained" in response.parameters else None
        assert told is (False if name == "random" else None)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_classification(triton, audio_engine, count):
    module, client = triton
    wanted = ("scores", "logits", "embedding")
    outputs = [module.InferRequestedOutput(name, class_count=count) for name in wanted]
    if module is tritonclient.http:
        outputs.append(module.InferRequestedOutput("logits", binary_data=False, class_count=count))
        del outputs[1]
    result = client.infer("tiny", [windows(module)], outputs=outputs)
    expected = audio_engine.infer(WINDOWS)
    for name in wanted:
        rows = result.as_numpy(name)
        width = DIM if name == "embedding" else len(LABELS)
        assert rows.shape == (len(WINDOWS), min(count, width))
        for texts, logits in zip(rows, expected["logits"], strict=True):
            parts = [as_text(text).split(":", 2) for text in texts]
            values = [float(part[0]) for part in parts]
            assert values == sorted(values, reverse=True)
            if name == "embedding":
                assert all(len(part) == 2 for part in parts)
                continue
            order = np.argsort(-logits)[:count]
            assert [int(part[1]) for part in parts] == list(order)
            assert [part[2] for part in parts] == [LABELS[i] for i in order]
            if name == "logits":
                np.testing.assert_allclose(values, logits[order], atol=1e-6)


def test_parameters_that_mean_nothing_here_are_ignored(triton):
    module, client = triton
    result = client.infer("tiny", [windows(module)], parameters={"mine": 3}, priority=1, timeout=10**9)
    assert result.as_numpy("logits").shape == (3, 3)


def test_what_is_not_offered(triton):
    module, client = triton
    status = "400" if module is tritonclient.http else "StatusCode.UNIMPLEMENTED"
    calls = [
        (client.get_inference_statistics, (), "statistics are not offered"),
        (client.get_inference_statistics, ("tiny",), "statistics are not offered"),
        (client.get_inference_statistics, ("tiny", "9"), "statistics are not offered"),
        (client.get_trace_settings, (), "settings are not offered"),
        (client.update_trace_settings, ("tiny", {"trace_level": ["OFF"]}), "settings are not offered"),
        (client.get_log_settings, (), "settings are not offered"),
        (client.update_log_settings, ({"log_info": True},), "settings are not offered"),
        (client.get_system_shared_memory_status, (), "shared memory is not offered"),
        (client.register_system_shared_memory, ("a", "/a", 8), "shared memory is not offered"),
        (client.unregister_system_shared_memory, ("a",), "shared memory is not offered"),
        (client.get_cuda_shared_memory_status, ("a",), "shared memory is not offered"),
        (client.register_cuda_shared_memory, ("a", b"aaaa", 0, 8), "shared memory is not offered"),
        (client.unregister_cuda_shared_memory, (), "shared memory is not offered"),
    ]
    for call, arguments, text in calls:
        with pytest.raises(InferenceServerException, match=text) as caught:
            call(*arguments)
        assert caught.value.status() == status, call


@pytest.mark.parametrize("module", [tritonclient.http.aio, tritonclient.grpc.aio])
def test_asynchronous_clients(server, audio_engine, module):
    async def ask():
        address = server.http if module is tritonclient.http.aio else server.grpc
        async with module.InferenceServerClient(address) as client:
            assert await client.is_model_ready("tiny", "10")
            results = await asyncio.gather(*(client.infer("tiny", [windows(module)]) for _ in range(8)))
            with pytest.raises(InferenceServerException, match="no model 'nothing' here"):
                await client.infer("nothing", [windows(module)])
            return results

    expected = audio_engine.infer(WINDOWS)["logits"]
    for result in asyncio.run(ask()):
        np.testing.assert_array_equal(result.as_numpy("logits"), expected)


def test_errors_of_models_that_are_not_served(triton):
    module, client = triton
    for name, version, http_status, grpc_status, text in (
        (
            "nothing",
            "",
            "404",
            "NOT_FOUND",
            "no model 'nothing' here; this server has 'offline', 'probes', 'random', 'tiny'",
        ),
        ("tiny", "11", "404", "NOT_FOUND", "model 'tiny' has no version '11'; it has '9', '10'"),
        ("broken", "", "503", "UNAVAILABLE", "model 'broken' is not served: "),
    ):
        for call in (
            lambda name, version: client.infer(name, [windows(module)], model_version=version),
            client.get_model_metadata,
            client.get_model_config,
        ):
            with pytest.raises(InferenceServerException) as caught:
                call(name, version)
            status = http_status if module is tritonclient.http else f"StatusCode.{grpc_status}"
            assert message(caught)[0] == status
            assert text in message(caught)[1]


def test_unload_and_load(triton):
    module, client = triton
    client.unload_model("random")
    assert not client.is_model_ready("random")
    assert index(client)["random", "1"][0] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="unloaded"):
        client.infer("random", [windows(module)])
    client.load_model("random")
    assert client.is_model_ready("random")
    client.infer("random", [windows(module)])
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="no model 'nothing'") as caught:
            change("nothing")
        assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")
    with pytest.raises(InferenceServerException, match="sha256 differs") as caught:
        client.load_model("broken")
    assert caught.value.status() in ("422", "StatusCode.FAILED_PRECONDITION")
    with pytest.raises(InferenceServerException, match="load takes no config") as caught:
        client.load_model("tiny", config="{}")
    assert caught.value.status() in ("400", "StatusCode.UNIMPLEMENTED")


def test_load_and_unload_are_forbidden_unless_allowed(audio_server):
    for module, address, status in (
        (tritonclient.http, audio_server.http, "403"),
        (tritonclient.grpc, audio_server.grpc, "StatusCode.PERMISSION_DENIED"),
    ):
        client = module.InferenceServerClient(address)
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="AVEX_MODEL_CONTROL=explicit allows it") as caught:
                change("tiny")
            assert caught.value.status() == status
        assert client.is_model_ready("tiny")
        client.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/index", b"{"),
        ("/v2/repository/index", b'{"ready": "perhaps"}'),
        ("/v2/repository/models/tiny/load", b"[]"),
        ("/v2/repository/models/tiny/load", b'{"parameters": 1}'),
        ("/v2/repository/models/tiny/unload", b"\xff"),
    ],
)
def test_bad_bodies(server, path, body):
    answer = server.post(path, content=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("change", ["load", "unload"])
def test_large_bodies(server, change):
    answer = server.post(f"/v2/repository/models/tiny/{change}", content=b" " * 2**16 + b"{}")
    assert answer.status_code == 413
    assert "expected at most 65536 bytes here" in answer.json()["error"]


def test_scores_and_labels_of_each_probe(triton, shelf):
    module, client = triton
    outputs = [module.InferRequestedOutput(f"{probe}.scores", class_count=9) for probe in ("birds", "noise")]
    result = client.infer("probes", [windows(module)], outputs=outputs)
    with open_bundle(shelf / "probes") as engine:
        raw = engine.infer(WINDOWS)
        for probe, labels in (("birds", LABELS), ("noise", NOISES)):
            scores = activate(raw[f"{probe}.logits"], engine.probe(probe).activation)
            for texts, row in zip(result.as_numpy(f"{probe}.scores"), scores, strict=True):
                order = np.argsort(-row)
                assert [as_text(text) for text in texts] == [f"{row[i]:f}:{i}:{labels[i]}" for i in order]
    outputs = [each["name"] for each in as_dict(client.get_model_metadata("probes"))["outputs"]]
    assert outputs == ["birds.logits", "noise.logits", "embedding", "birds.scores", "noise.scores"]


def test_a_bundle_that_takes_embeddings_is_asked_about_a_recording(server, shelf, wav):
    with open_bundle(shelf / "probes") as audio, open_bundle(shelf / "offline") as reader:
        spans, embeddings = audio.embed(*decode(wav))
        rows = reader.classify(embeddings, top_k=1).results
        own = [as_json(each) for each in audio.predict_all(*decode(wav), top_k=1)]
    answer = server.post("/predict", content=wav, params={"model": "offline", "top_k": 1}).json()
    assert (answer["bundle"], answer["probe"], answer["score_scale"]) == ("offline", "linear", "softmax")
    assert [(each["start"], each["end"], each["label"], each["score"]) for each in answer["detections"]] == [
        (start, end, row[0].label, row[0].score) for (start, end), row in zip(spans.tolist(), rows, strict=True)
    ]
    everything = {"predictions": [*own, answer]}
    for asked in (
        {"content": wav, "params": {"model": "probes", "top_k": 1}},
        {"files": {"audio": wav}, "data": {"model": "probes", "version": "1", "top_k": "1"}},
    ):
        assert server.post("/predict_all", **asked).json() == everything
    for options, status, text in (
        ({}, 400, "several models are served"),
        ({"model": "offline"}, 400, "takes embeddings, not audio"),
        ({"model": "probes", "probe": "birds"}, 400, "unknown option 'probe'"),
        ({"model": "probes", "top_k": "0"}, 400, "top_k is 0"),
        ({"model": "probes", "version": "2"}, 404, "has no version '2'"),
        ({"model": "broken"}, 503, "sha256 differs"),
    ):
        answer = server.post("/predict_all", content=wav, params=options)
        assert answer.status_code == status
        assert text in answer.json()["error"]
        assert ("retry-after" in answer.headers) is (status == 503)
    assert server.post("/predict_all", content=b"no audio", params={"model": "probes"}).status_code == 400


def test_recordings_for_a_bundle_that_takes_embeddings(triton, shelf, wav, recording):
    module, client = triton
    recordings = np.array([wav, recording], dtype=np.object_)
    audio = module.InferInput("embedding", [2], "BYTES").set_data_from_numpy(recordings)
    answer = client.infer("offline", [audio], parameters={"overlap": 0.05})
    with open_bundle(shelf / "probes") as maker, open_bundle(shelf / "offline") as reader:
        heard = [maker.embed(*decode(each), overlap=0.05).embeddings for each in recordings]
        expected = reader.infer(np.concatenate(heard))
        scores = activate(expected["logits"], reader.probe(None).activation)
    np.testing.assert_allclose(answer.as_numpy("logits"), expected["logits"], rtol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("scores"), scores, rtol=1e-6)
    told = as_dict(answer.get_response())["parameters"]["windows"]
    assert json.loads(told["string_param"] if isinstance(told, dict) else told) == [len(each) for each in heard]


def test_metadata_say_whether_a_bundle_of_embeddings_takes_recordings(server, embedding_server):
    parameters = server.get("/v2/models/offline").json()["parameters"]
    assert parameters["recordings"].endswith("as BYTES of shape [files] in embedding")
    assert "detections" in parameters
    assert "sample_rate" not in parameters
    assert "recordings" not in embedding_server.get("/v2/models/tiny-offline").json()["parameters"]
    assert server.get("/models/offline").json()["routes"] == ["/classify", "/predict"]
    assert embedding_server.get("/models/tiny-offline").json()["routes"] == ["/classify"]


def test_health_follows_the_models(tmp_path):
    make_audio_bundle(tmp_path / "bundles" / "tiny")
    variables = {"AVEX_BUNDLE": str(tmp_path / "bundles"), **OPTIONS}
    with (
        running_server(tmp_path / "server", **variables) as server,
        grpc.insecure_channel(server.grpc) as channel,
        tritonclient.grpc.InferenceServerClient(server.grpc) as client,
        contextlib.ExitStack() as stack,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == serving
        for change, ready in ((client.unload_model, False), (client.load_model, True)):
            change("tiny")
            assert server.get("/readyz").status_code == (200 if ready else 503)
            assert client.is_server_ready() is ready
            assert next(watch).status == (serving if ready else not_serving)
            for service in ("", SERVICE):
                answer = health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == (serving if ready else not_serving)
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="tiny"), timeout=60)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        # A connection has at most 100 calls at a time.
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [stack.enter_context(grpc.insecure_channel(server.grpc, options=own)) for _ in range(3)]
        stubs = [health_pb2_grpc.HealthStub(each) for each in channels]
        more = [
            stubs[index % 3].Watch(health_pb2.HealthCheckRequest(), timeout=60) for index in range(MAX_WATCHERS - 2)
        ]
        assert all(next(each).status == serving for each in more)
        with pytest.raises(grpc.RpcError) as refused:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        more[0].cancel()

        def watched():  # as soon as the service knows that a watcher has gone
            with contextlib.suppress(grpc.RpcError):
                return next(health.Watch(health_pb2.HealthCheckRequest(), timeout=60)).status == serving

        until(watched)


def test_models_by_bentomls_client(server, wav, tmp_path):
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    embeddings = np.eye(DIM).tolist()
    with bento_client(server) as client:
        for version in ("9", "10"):
            assert client.predict(audio=path, model="tiny", version=version)["version"] == version
            assert client.embed(audio=path, model="tiny", version=version)["version"] == version
        assert client.classify(embeddings=embeddings, model="offline")["bundle"] == "offline"
        names = [each["bundle"] for each in client.predict_all(audio=path, model="probes")["predictions"]]
    assert names == ["probes", "probes", "offline"]


def test_model_and_version_as_options(server, audio_engine, embedding_engine, wav):
    expected = as_json(audio_engine.predict(*decode(wav)))
    for options, version in (({"model": "tiny"}, "10"), ({"model": "tiny", "version": "9"}, "9")):
        for asked in (
            {"content": wav, "params": options},
            {"files": {"audio": wav}, "data": options},
        ):
            answer = server.post("/predict", **asked)
            assert answer.json() == {**expected, "version": version}
            answer = server.post("/embed", **asked)
            assert (answer.json()["bundle"], answer.json()["version"]) == ("tiny", version)
    embeddings = np.ones((2, DIM), np.float32)
    answer = server.post("/classify", json={"embeddings": embeddings.tolist(), "model": "offline", "version": "1"})
    assert answer.json()["results"] == as_json(embedding_engine.classify(embeddings))["results"]
    for path in ("/predict", "/embed"):
        answer = server.post(path, content=wav)
        assert answer.status_code == 400
        assert "several models are served: 'offline', 'probes', 'random', 'tiny'; name one" in answer.json()["error"]
        answer = server.post(path, content=wav, params={"model": "nothing"})
        assert answer.status_code == 404


def test_no_request_fails_while_bundles_are_replaced(server, shelf):
    """Requests by both transports, one after the other, while a bundle is replaced, removed and put back."""
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc) as by_grpc,
        tritonclient.http.InferenceServerClient(server.http) as by_http,
    ):

        def ask_until(expected):
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                versions = {
                    by_grpc.infer("tiny", [windows(tritonclient.grpc)]).get_response().model_version,
                    by_http.infer("tiny", [windows(tritonclient.http)]).get_response()["model_version"],
                }
                if versions == {expected}:
                    return
            raise AssertionError(f"version {expected} was not served in time")

        ask_until("10")
        newest = shelf / "tiny" / "11"
        change_manifest(make_audio_bundle(newest), version="11")
        ask_until("11")
        change_manifest(make_audio_bundle(newest, activation="softmax"), version="12")
        ask_until("12")
        shutil.rmtree(newest)
        ask_until("10")


def test_messages_have_the_fields_of_tritons(subtests):
    for name in (
        "RepositoryIndexRequest",
        "RepositoryIndexResponse",
        "RepositoryModelLoadRequest",
        "RepositoryModelLoadResponse",
        "RepositoryModelUnloadRequest",
        "RepositoryModelUnloadResponse",
        "ModelConfigRequest",
    ):
        with subtests.test(name):
            assert fields(message_class(name).DESCRIPTOR) == fields(getattr(service_pb2, name).DESCRIPTOR)
