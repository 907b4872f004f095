"""A bundle of two heads, served."""

from functools import partial

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from avex_serve import open_bundle
from avex_serve.audio.reader import decode, open_audio
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from tests.answers import as_json
from tests.bundles import make_probes_bundle
from tests.service.conftest import bento_client, running_server


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_probes_bundle(tmp_path_factory.mktemp("bundles") / "probes")


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(bundle)) as server:
        yield server


@pytest.fixture(scope="module")
def engine(bundle):
    with open_bundle(bundle) as engine:
        yield engine


def test_each_head_and_all_of_them_over_http(server, engine, wav, tmp_path):
    options = {"top_k": 2, "overlap": 0.05}
    alone = [as_json(engine.predict(*decode(wav), **options, probe=name)) for name in ("birds", "noise")]
    for answer, name in zip(alone, ("birds", "noise"), strict=True):
        assert server.post("/predict", content=wav, params={**options, "probe": name}).json() == answer
    together = {"predictions": alone}
    assert server.post("/predict_all", content=wav, params=options).json() == together
    assert server.post("/predict_all", files={"audio": wav}, data=options).json() == together
    path = tmp_path / "recording.wav"
    path.write_bytes(wav)
    with bento_client(server) as client:
        assert client.predict_all(audio=path, **options) == together


def test_which_embedding(server, engine, wav):
    expected = as_json(pipeline.embed(engine, partial(open_audio, wav), Query(overlap=0.0)))
    assert server.post("/embed", content=wav, params={"output": "embedding"}).json() == expected
    refused = server.post("/embed", content=wav, params={"output": "birds"})
    assert refused.status_code == 404
    assert refused.json() == {"error": "no embedding 'birds' in bundle tiny-probes; it has embedding"}


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_outputs_of_each_head_in_the_open_inference_protocol(server, engine, module):
    windows = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 1600)).astype(np.float32)
    client = module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)
    metadata = client.get_model_metadata("tiny-probes", **({} if module is tritonclient.http else {"as_json": True}))
    names = [output["name"] for output in metadata["outputs"]]
    assert names == ["birds.logits", "noise.logits", "embedding", "birds.scores", "noise.scores"]
    tensor = module.InferInput("waveform", [3, 1600], "FP32")
    tensor.set_data_from_numpy(windows)
    result = client.infer("tiny-probes", [tensor])
    expected = engine.infer(windows)
    for name in names[:3]:
        np.testing.assert_array_equal(result.as_numpy(name), expected[name])
    np.testing.assert_allclose(
        result.as_numpy("birds.scores"), 1 / (1 + np.exp(-expected["birds.logits"])), rtol=1e-5
    )
    np.testing.assert_allclose(result.as_numpy("noise.scores").sum(axis=1), 1, rtol=1e-5)
    client.close()
