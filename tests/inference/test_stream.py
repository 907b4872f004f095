"""A recording that is read in blocks is answered as the whole, in the memory of a few windows."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import soundfile

from avex_serve import open_bundle
from avex_serve.audio.reader import decode, open_audio
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from tests.answers import in_memory
from tests.bundles import SAMPLE_RATE, make_measuring_bundle


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44100, 8000])
@pytest.mark.parametrize("overlap", [0.0, 0.03])
def test_blocks_of_any_size_give_the_answer_of_the_whole(engine, rate, overlap):
    random = np.random.default_rng(rate)
    wave = random.uniform(-0.5, 0.5, 3 * rate + 77).astype(np.float32)
    query = Query(overlap=overlap, threshold=0.0)
    whole = engine.predict(wave, rate, overlap=overlap, threshold=0.0)
    for count in (0, 1, 20):
        blocks = np.split(wave, np.sort(random.integers(1, wave.size, count)))
        assert pipeline.predict(engine, lambda channel, b=blocks: in_memory(*b, rate=rate), query) == whole


@pytest.mark.parametrize("shortest", [None, 600])
def test_the_padding_of_the_last_window_is_that_of_the_whole(tmp_path, shortest):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 16_300).astype(np.float32)
    with open_bundle(make_measuring_bundle(tmp_path / "bundle", shortest=shortest)) as engine:
        whole = engine.embed(wave, SAMPLE_RATE)
        blocks = np.split(wave, [1, 50, 1600, 1601, 9000])
        stream = pipeline.embed(engine, lambda channel: in_memory(*blocks), Query())
        np.testing.assert_array_equal(np.array(stream.embeddings, np.float32), whole.embeddings)
        assert whole.embeddings[-1, 2] == 300  # samples that are not padded


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_a_file_is_answered_as_its_samples(engine, tmp_path, container):
    """Of several blocks, in stereo."""
    path = tmp_path / f"recording.{container.lower()}"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (500_000, 2)).astype(np.float32)
    soundfile.write(path, samples, 48000, format=container)
    whole = engine.predict(*decode(path), threshold=0.0)
    for source in (path, path.read_bytes()):
        assert pipeline.predict(engine, partial(open_audio, source), Query(threshold=0.0)) == whole
    assert whole.duration == pytest.approx(500_000 / 48000, abs=1e-4)


def test_a_long_recording_takes_the_memory_of_a_few_blocks(engine, tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 48000, 2, "PCM_16") as file:
        for _ in range(20):
            file.write(np.zeros((48000 * 30, 2), np.int16))
    tracemalloc.start()
    try:
        prediction = pipeline.predict(engine, partial(open_audio, path), Query())
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert prediction.duration == 600
    assert peak < 16 * 2**20, "the decoded recording has 230 MB"
