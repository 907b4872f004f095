"""The graph of a bundle opens in OpenSoundscape as it is: labels, scores and embeddings are those of the engine."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

import avex_serve
from avex_serve import open_bundle
from avex_serve.bundles.manifest import ONNX
from avex_serve.synthetic import make_recording

BUNDLE = Path(avex_serve.__file__).parent / "demo" / "bundle"
RATE = 16000
# Its own packages warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opensoundscape = pytest.importorskip(
        "opensoundscape", reason="opensoundscape is not installed; pip install 'opensoundscape[onnx]'"
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Three windows and a half, at the model's rate: how it resamples is not ours to say."""
    wave, _ = make_recording(11, seconds=7.0, sample_rate=RATE)
    path = tmp_path_factory.mktemp("audio") / "recording.wav"
    soundfile.write(path, wave, RATE)
    return path


@pytest.fixture(scope="module")
def engine():
    with open_bundle(BUNDLE, "cpu") as engine:
        yield engine


@pytest.fixture
def model():
    model = opensoundscape.ONNXModel(BUNDLE / ONNX)  # with nothing but what the file says
    model.add_channel_dim = False  # the graph takes (clips, samples); no metadata can say so
    return model


@pytest.fixture(scope="module")
def outputs(engine, recording):
    return engine.infer_recording(soundfile.read(recording, dtype="float32")[0], RATE)


def test_it_knows_labels_rate_and_length(model, engine):
    spec = engine.manifest.audio
    assert tuple(model.classes) == engine.labels()
    assert model.preprocessor.sample_rate == spec.sample_rate
    assert model.preprocessor.sample_duration == spec.window_samples / spec.sample_rate


@pytest.mark.parametrize("scale", [None, "sigmoid"])
def test_scores(model, engine, recording, outputs, scale):
    table = model.predict([str(recording)], activation_layer=scale, batch_size=2, progress_bar=False)
    wave, _ = soundfile.read(recording, dtype="float32")
    spans, scores = engine.score(wave, RATE)
    assert tuple(table.columns) == engine.labels()
    np.testing.assert_array_equal(table.index.get_level_values("start_time"), spans[:, 0])
    np.testing.assert_allclose(table.to_numpy(), outputs["logits"] if scale is None else scores, rtol=0, atol=1e-4)


def test_embeddings(model, recording, outputs):
    table = model.embed([str(recording)], batch_size=2, progress_bar=False)
    np.testing.assert_allclose(np.asarray(table), outputs["embedding"], rtol=0, atol=1e-4)
