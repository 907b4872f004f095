"""Labelled synthetic sounds, and the embeddings of them that all tests share."""

import numpy as np
import pytest
import soundfile

from avex_serve.synthetic import make_clip

LABELS = ("buzz", "trill")
RATE = 16000
RECORDINGS = 25  # of each label: enough to hold out a fifth


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Embeddings and their bundle, which all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of classes, with background."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for label in (*LABELS, "noise"):
        (folder / label).mkdir()
        for i in range(RECORDINGS):
            sounds = [] if label == "noise" else [label]
            wave = np.concatenate([make_clip(rng, sounds, snr_db=rng.uniform(-5, 15)) for _ in range(2)])
            soundfile.write(folder / label / f"{i:02}.wav", wave, RATE)
    return folder
