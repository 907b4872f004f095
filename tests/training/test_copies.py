"""Which recordings are compared before anything is embedded."""

import tracemalloc
from pathlib import Path

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
