"""The service's own routes, asked with httpx, curl and BentoML's client."""

import json
import subprocess
from functools import partial

import numpy as np
import pytest

from avex_serve.audio.reader import open_audio
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from avex_serve.service import AvexService
from tests.answers import as_json
from tests.service.conftest import bento_client

OPTIONS = [
    {},
    {"threshold": 0.55},
    {"top_k": 2},
    {"threshold": 0.4, "top_k": 1, "overlap": 0.05, "probe": "linear"},
    {"threshold": -1.0},
]


def as_json_text(options):
    return {"threshold": "null", "top_k": "null", "overlap": "0.0", "probe": "null"} | {
        name: json.dumps(value) for name, value in options.items()
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_predict_from_body_and_forms(audio_server, predict, recording, options):
    expected = predict(recording, **options)
    answers = [
        audio_server.post("/predict", content=recording, params=options),
        audio_server.post("/predict", files={"audio": recording}, data=options),
        audio_server.post("/predict", files={"audio": recording}, data=as_json_text(options)),
        audio_server.post("/predict", files={"audio": recording}, params=options),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected


@pytest.mark.parametrize(
    "content_type", ["audio/wav", "application/json", "application/x-www-form-urlencoded", "text/plain", "nonsense"]
)
def test_body_is_the_audio_whatever_its_type(audio_server, predict, wav, content_type):
    answer = audio_server.post("/predict", content=wav, headers={"content-type": content_type})
    assert answer.json() == predict(wav)


def test_embed(audio_server, audio_engine, recording):
    expected = as_json(pipeline.embed(audio_engine, partial(open_audio, recording), Query(overlap=0.02)))
    assert audio_server.post("/embed", content=recording, params={"overlap": 0.02}).json() == expected
    assert audio_server.post("/embed", files={"audio": recording}, data={"overlap": "0.02"}).json() == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"threshold": 0.2, "top_k": None, "probe": "linear"}])
def test_classify(embedding_server, embedding_engine, options):
    embeddings = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = as_json(embedding_engine.classify(embeddings, **options))
    answer = embedding_server.post("/classify", json={"embeddings": embeddings.tolist(), **options})
    assert answer.json() == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_bentoml_client(audio_server, predict, wav, tmp_path, options):
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    with bento_client(audio_server) as client:
        assert client.predict(audio=path, **options) == predict(wav, **options)


def test_bentoml_client_embed_and_classify(
    audio_server, audio_engine, embedding_server, embedding_engine, wav, tmp_path
):
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    with bento_client(audio_server) as client:
        expected = pipeline.embed(audio_engine, partial(open_audio, wav), Query(overlap=0.0))
        assert client.embed(audio=path) == as_json(expected)
    with bento_client(embedding_server) as client:
        expected = embedding_engine.classify(np.eye(4, dtype=np.float32), top_k=1)
        assert client.classify(embeddings=np.eye(4).tolist(), top_k=1) == as_json(expected)


@pytest.mark.parametrize("form", [True, False])
def test_curl(audio_server, predict, wav, tmp_path, form):
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    if form:
        arguments = ["-F", f"audio=@{path}", "-F", "top_k=1", "-F", "overlap=0.05", f"{audio_server.url}/predict"]
    else:
        arguments = ["--data-binary", f"@{path}", f"{audio_server.url}/predict?top_k=1&overlap=0.05"]
    done = subprocess.run(["curl", "-sS", "--fail-with-body", *arguments], capture_output=True, check=True)
    assert json.loads(done.stdout) == predict(wav, top_k=1, overlap=0.05)


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"]
)
def test_health(audio_server, path):
    assert audio_server.get(path).status_code == 200


def test_api_page_names_the_routes(audio_server):
    assert {"/predict", "/embed", "/classify"} <= set(audio_server.get("/docs.json").json()["paths"])


def test_service_within_the_process(audio_bundle, predict, wav, tmp_path, monkeypatch):
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    monkeypatch.setenv("AVEX_BUNDLE", str(audio_bundle))
    service = AvexService()
    assert as_json(service.predict(audio=path, top_k=1)) == predict(wav, top_k=1)
    service.front.repository.close()
