"""Clips of other lengths than a window, and padded ones, through an engine whose embeddings tell what it heard."""

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.errors import TensorError, UnsupportedError
from avex_serve.inference.engine import Engine
from tests.bundles import DIM, LABELS, SAMPLE_RATE, WINDOW, make_measuring_bundle

SHORTEST = 600


@pytest.fixture(scope="module", params=[None, SHORTEST], ids=["fixed", "any length"])
def shortest(request):
    """Samples of the shortest clip of a bundle; None: all have a window's."""
    return request.param


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, shortest):
    """A bundle whose graph takes a padding mask."""
    return make_measuring_bundle(tmp_path_factory.mktemp("bundles") / "bundle", shortest=shortest)


@pytest.fixture(scope="module")
def measuring(bundle):
    """Its engine."""
    with open_bundle(bundle) as engine:
        yield engine


def loud(samples):
    return np.random.default_rng(samples).uniform(0.1, 0.5, samples).astype(np.float32)


def heard(clip, total):
    return [clip.sum(), np.square(clip).sum(), clip.size, total]


@pytest.mark.parametrize("samples", [1, SHORTEST - 1, SHORTEST, WINDOW - 1, WINDOW, WINDOW + 161, 2 * WINDOW + 900])
def test_the_last_window_is_given_as_it_is_down_to_the_shortest_and_masked_beyond(measuring, shortest, samples):
    wave = loud(samples)
    spans, embeddings = measuring.embed(wave, SAMPLE_RATE)
    pieces = [wave[start : start + WINDOW] for start in range(0, samples, WINDOW)]
    expected = [heard(piece, max(piece.size, shortest or WINDOW)) for piece in pieces]
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5)
    np.testing.assert_allclose(spans[-1], [(len(pieces) - 1) * WINDOW / SAMPLE_RATE, samples / SAMPLE_RATE])
    np.testing.assert_array_equal(measuring.infer_recording(wave, SAMPLE_RATE)["embedding"], embeddings)
    assert measuring.predict(wave, SAMPLE_RATE, top_k=1).window == WINDOW / SAMPLE_RATE


def test_overlapping_windows_end_with_the_recording(measuring, shortest):
    wave = loud(2 * WINDOW)
    embeddings = measuring.embed(wave, SAMPLE_RATE, overlap=0.025).embeddings  # every 1200 samples
    expected = [heard(wave[start : start + WINDOW], WINDOW) for start in (0, 1200)]
    np.testing.assert_allclose(embeddings[:2], expected, rtol=1e-5)
    np.testing.assert_allclose(embeddings[2], heard(wave[2400:], WINDOW if shortest is None else 800), rtol=1e-5)


def test_clips_of_any_length_from_the_shortest_on(measuring, shortest):
    for samples in (SHORTEST, WINDOW, 3 * WINDOW + 1) if shortest else (WINDOW,):
        clips = np.stack([loud(samples), -loud(samples)])
        np.testing.assert_allclose(
            measuring.infer(clips)["embedding"], [heard(clip, samples) for clip in clips], rtol=1e-5
        )
        mask = np.arange(samples) >= np.array([[samples], [samples // 3]])
        np.testing.assert_allclose(
            measuring.infer(clips, mask)["embedding"],
            [heard(clip[~padded], samples) for clip, padded in zip(clips, mask, strict=True)],
            rtol=1e-5,
        )
    with pytest.raises(TensorError) as error:
        measuring.infer(np.zeros((2, SHORTEST - 1), np.float32))
    if shortest:
        assert "clips of 599 samples; expected at least 600 (0.0375 s): pad" in str(error.value)
    else:
        assert "shape [2, 599]; expected [-1, 1600]" in str(error.value)
    with pytest.raises(TensorError, match="is empty"):
        measuring.infer(np.zeros((0, WINDOW), np.float32))
    with pytest.raises(TensorError, match=r"is empty|expected \[-1, 1600\]"):
        measuring.infer(np.zeros((2, 0), np.float32))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, WINDOW - 1), bool), r"shape \[2, 1599\] and type bool; expected .* \[2, 1600\]"),
        (np.zeros((1, WINDOW), bool), r"shape \[1, 1600\]"),
        (np.zeros((2, WINDOW), np.float32), "type float32; .* bool"),
        (np.arange(2)[:, None] >= np.ones((1, WINDOW)), "marks every sample of a clip as padding"),
    ],
    ids=["length", "rows", "type", "nothing left"],
)
def test_a_mask_that_does_not_fit_is_told(measuring, mask, message):
    with pytest.raises(TensorError, match=f"'padding_mask' .*{message}|'padding_mask' {message}"):
        measuring.infer(np.zeros((2, WINDOW), np.float32), mask)


def test_a_bundle_without_masks_says_so(engine):
    with pytest.raises(UnsupportedError, match=r"takes no padding mask; .* --padding-mask"):
        engine.infer(np.zeros((1, WINDOW), np.float32), np.zeros((1, WINDOW), bool))


class Stacking:
    """Batches of four, of which it notes the shapes."""

    device, format, max_batch = "cpu", "onnx", 4

    def __init__(self):
        self.shapes = []

    def run(self, waveform, padding_mask):
        assert waveform.shape == padding_mask.shape
        self.shapes.append(waveform.shape)
        rows = len(waveform)
        return {"logits": np.zeros((rows, len(LABELS))), "embedding": np.full((rows, DIM), waveform.shape[1])}


def test_batches_hold_windows_of_one_length(bundle, shortest):
    backend = Stacking()
    with Engine(read_bundle(bundle), backend) as engine:
        embeddings = engine.embed(loud(5 * WINDOW + 900), SAMPLE_RATE).embeddings
    last = WINDOW if shortest is None else 900
    assert sorted(backend.shapes) == sorted(
        [(4, WINDOW), (2, WINDOW)] if shortest is None else [(4, WINDOW), (1, WINDOW), (1, 900)]
    )
    assert embeddings[:, 0].tolist() == [*[WINDOW] * 5, last]
