"""Which recordings are compared before anything is embedded."""

import tracemalloc
from pathlib import Path

import numpy as np
import soundfile

from avex_serve.training.copies import MOST, find_copies
from avex_serve.training.dataset import Recording


def test_an_archive_of_recordings_of_one_length_is_not_compared():
    """Each could be a copy of each: the pairs alone would take gigabytes."""
    recordings = [Recording(Path(f"{i}.wav"), f"{i}.wav", digest=str(i), seconds=60.0) for i in range(4 * MOST)]
    tracemalloc.start()
    try:
        assert find_copies(recordings, [i % 5 for i in range(4 * MOST)]) is None
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_copies_of_one_length_and_padded_ones_are_found(tmp_path: Path):
    rng = np.random.default_rng(0)
    one, other = (rng.normal(0, 0.1, 32000) * np.repeat(rng.random(40), 800) for _ in range(2))
    waves = [one, one * 0.5, np.append(one, np.zeros(1600)), other, np.zeros(32000)]
    recordings = []
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000)
        recordings.append(Recording(tmp_path / f"{i}.wav", f"{i}.wav", digest=str(i), seconds=wave.size / 16000))
    found = find_copies(recordings, range(len(waves)))
    assert found is not None
    assert sorted((copy.first, copy.second) for copy in found) == [(0, 1), (0, 2), (1, 2)]
    assert min(copy.correlation for copy in found) > 0.99
