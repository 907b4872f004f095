"""Engines of the tiny bundles, and the same graphs computed with numpy."""

import numpy as np
import pytest

from avex_serve import open_bundle
from tests.bundles import SAMPLE_RATE, WINDOW, make_audio_bundle, weights


@pytest.fixture(scope="session")
def engine(audio_bundle):
    """The tiny audio bundle; sigmoid."""
    with open_bundle(audio_bundle, "cpu") as engine:
        yield engine


@pytest.fixture(scope="session")
def offline(embedding_bundle):
    """The tiny embedding bundle; softmax."""
    with open_bundle(embedding_bundle, "cpu") as engine:
        yield engine


@pytest.fixture(scope="session", params=["sigmoid", "softmax", "none"])
def any_engine(request, tmp_path_factory):
    """The tiny audio bundle with each activation."""
    bundle = make_audio_bundle(tmp_path_factory.mktemp("bundles") / "bundle", activation=request.param)
    with open_bundle(bundle) as engine:
        yield engine


@pytest.fixture(scope="session")
def oracle(audio_bundle):
    """wave (S,) at the model's rate, overlap in seconds → spans, embeddings, logits; float64, nothing of ours."""
    to_embedding, to_logits = (matrix.astype(np.float64) for matrix in weights(audio_bundle))

    def compute(wave, overlap=0.0):
        hop = WINDOW - round(overlap * SAMPLE_RATE)
        spans, windows, start = [], [], 0
        while True:
            if start and len(wave) - start < WINDOW / 10:  # too little to be evidence
                start = len(wave) - WINDOW
            piece = wave[start : start + WINDOW]
            windows.append(np.concatenate([piece, np.zeros(WINDOW - len(piece))]))
            spans.append([start / SAMPLE_RATE, min(start + WINDOW, len(wave)) / SAMPLE_RATE])
            if start + WINDOW >= len(wave):
                break
            start += hop
        embeddings = np.array(windows, np.float64) @ to_embedding
        return np.array(spans), embeddings, embeddings @ to_logits

    return compute


@pytest.fixture(scope="session")
def wave():
    """0.73 s of noise at the model's rate: seven windows and a bit; its scores lie on both sides of 0.5."""
    return np.random.default_rng(1).normal(size=11680).clip(-2, 2).astype(np.float32)
