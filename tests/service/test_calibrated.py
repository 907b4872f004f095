"""A calibrated bundle over HTTP, gRPC and BentoML's client."""

import csv
import json

import numpy as np
import pytest
import soundfile
import tritonclient.grpc
import tritonclient.http

from avex_serve.audio.reader import decode
from avex_serve.inference.backend import open_bundle
from tests.answers import as_json
from tests.bundles import LABELS, SAMPLE_RATE, calibrated_copy
from tests.service.conftest import bento_client, running_server

OPTIONS = [{}, {"threshold": 0.6}, {"threshold": {"robin": 0.6, "Zaunkönig": 0.1}}, {"threshold": {}}, {"top_k": 2}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, audio_bundle):
    return calibrated_copy(audio_bundle, tmp_path_factory.mktemp("bundles") / "calibrated")


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def engine(bundle):
    with open_bundle(bundle, "cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 8000), SAMPLE_RATE)
    return path


def texts(options):
    return {name: json.dumps(value) for name, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_predict(server, engine, path, options):
    expected = as_json(engine.predict(*decode(path), **options))
    known = [each["label"] for each in expected["detections"] if "probability" in each]
    assert set(known) <= set(LABELS[:2])
    body = path.read_bytes()
    answers = [
        server.post("/predict", content=body, params=texts(options)),
        server.post("/predict", files={"audio": body}, data=texts(options)),
        server.post("/predict_all", content=body, params=texts(options)),
    ]
    for answer in answers[:2]:
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected
    assert answers[2].json() == {"predictions": [expected]}
    with bento_client(server) as client:
        assert client.predict(audio=path, **options) == expected


@pytest.mark.parametrize(
    ("threshold", "status", "reason"),
    [
        ('{"owl": 0.5}', 404, "no probe has the label 'owl'"),
        ('{"robin": "high"}', 400, "threshold is"),
        ('{"robin": 2}', 400, "threshold of 'robin' is 2"),
        ('{"robin": 0.5', 400, "threshold is"),
        ("[0.5]", 400, "threshold is"),
    ],
)
def test_thresholds_that_can_not_be(server, path, threshold, status, reason):
    answer = server.post("/predict", content=path.read_bytes(), params={"threshold": threshold})
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_the_model_says_its_thresholds(server):
    (probe,) = server.get("/models/tiny").json()["probes"]
    assert probe["thresholds"] == {LABELS[0]: pytest.approx(1 / (1 + np.exp(-0.3)))}
    assert (probe["threshold"], probe["target_precision"]) == (0.5, 0.9)


def test_an_answer_names_the_model_whose_thresholds_it_was_selected_by(server, path):
    """A client that keeps an answer finds them by its bundle, version and probe."""
    body = path.read_bytes()
    every = server.post("/predict", content=body, params={"top_k": len(LABELS)}).json()["detections"]
    answer = server.post("/predict", content=body).json()
    model = server.get(f"/models/{answer['bundle']}?version={answer['version']}").json()
    (probe,) = [each for each in model["probes"] if each["name"] == answer["probe"]]
    selected = [
        each for each in every if each["score"] >= probe["thresholds"].get(each["label"], probe["threshold"])
    ]
    assert 0 < len(selected) < len(every)
    assert answer["detections"] == selected


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_the_protocol(server, engine, path, module):
    address = server.http if module is tritonclient.http else server.grpc
    client = module.InferenceServerClient(address)
    audio = module.InferInput("waveform", [1], "BYTES")
    audio.set_data_from_numpy(np.array([path.read_bytes()], dtype=np.object_))
    scores = engine.score(*decode(path)).scores
    wanted = [module.InferRequestedOutput(name) for name in ("scores", "probabilities", "detections")]
    for threshold, same in ((None, None), ('{"robin": 0.6}', {"robin": 0.6}), (0.6, 0.6)):
        parameters = None if threshold is None else {"threshold": threshold}
        result = client.infer("tiny", [audio], outputs=wanted, parameters=parameters)
        assert result.as_numpy("scores") == pytest.approx(scores, abs=1e-6)
        found = result.as_numpy("probabilities")
        assert found == pytest.approx(engine.calibrator().probabilities(scores), abs=1e-6, nan_ok=True)
        assert np.isnan(found[:, 2]).all()
        detections = [json.loads(each) for each in result.as_numpy("detections")]
        assert detections == as_json(engine.predict(*decode(path), threshold=same))["detections"]
    result = client.infer("tiny", [audio], outputs=[module.InferRequestedOutput("probabilities", class_count=1)])
    assert result.as_numpy("probabilities").shape == (5, 1)
    metadata = client.get_model_metadata("tiny")
    names = metadata["outputs"] if module is tritonclient.http else metadata.outputs
    assert "probabilities" in [each["name"] if isinstance(each, dict) else each.name for each in names]
    client.close()


def test_json_of_the_protocol_is_json(server, path):
    """NaN is no JSON: a probability that isn't known is null."""
    request = {"inputs": [{"name": "waveform", "datatype": "FP32", "shape": [1, 1600], "data": [0.1] * 1600}]}
    answer = server.post("/v2/models/tiny/infer", json=request)
    outputs = {each["name"]: each["data"] for each in json.loads(answer.text, parse_constant=pytest.fail)["outputs"]}
    assert outputs["probabilities"][2] is None
    assert 0 < outputs["probabilities"][0] < 1


def test_lines_and_tables(server, engine, path):
    expected = as_json(engine.predict(*decode(path)))["detections"]
    lines = map(json.loads, server.post("/predict?format=stream", content=path.read_bytes()).text.splitlines())
    assert [each for line in lines if line["event"] == "window" for each in line["detections"]] == expected
    rows = list(csv.DictReader(server.post("/predict?format=csv", content=path.read_bytes()).text.splitlines()))
    assert [row["label"] for row in rows] == [each["label"] for each in expected]
    for row, each in zip(rows, expected, strict=True):
        assert row["probability"] == "" or float(row["probability"]) == pytest.approx(each["probability"])
        assert (row["probability"] == "") == ("probability" not in each)
