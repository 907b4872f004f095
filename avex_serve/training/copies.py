"""Recordings that sound the same although their files differ, such as copies in another format. Needs no torch.

Copies are compared before anything is embedded: by the course of the energy in bands, over recordings of one length.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from avex_serve.audio.reader import resample
from avex_serve.errors import AvexServeError
from avex_serve.scheduling.cores import usable_cores
from avex_serve.seeing.clips import read_clip
from avex_serve.training.dataset import Recording

MOST: Final = 5000  # recordings to compare: each is decoded
LONGEST: Final = 60.0  # seconds of each that are compared
ALIKE: Final = 0.9  # correlation from which on two recordings are copies
_APART: Final = 0.15  # seconds that lengths of copies may differ by: some formats pad
_RATE: Final = 8000  # Hz
_FRAME: Final = 512  # samples
_STEP: Final = 0.2  # seconds
_EDGES: Final = np.geomspace(200, 3600, 17)  # Hz


class Copy(NamedTuple):
    """Two recordings that are alike."""

    first: int
    second: int
    correlation: float


def find_copies(recordings: Sequence[Recording], parts: Sequence[int]) -> list[Copy] | None:
    """Pairs of recordings in different parts of a split that are nearly the same; None: too many to compare.

    Args:
        recordings: with their lengths.
        parts: of each recording.
    """
    pairs = list(_candidates(recordings, parts))
    involved = sorted({i for pair in pairs for i in pair})
    if len(involved) > MOST:
        return None
    with ThreadPoolExecutor(usable_cores()) as pool:
        courses = dict(zip(involved, pool.map(_course, (recordings[i] for i in involved)), strict=True))
    found = []
    for first, second in pairs:
        one, other = courses[first], courses[second]
        size = min(len(one), len(other))
        correlation = _correlation(one[:size], other[:size])
        if correlation >= ALIKE:
            found.append(Copy(first, second, correlation))
    return found


def _candidates(recordings: Sequence[Recording], parts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of recordings of one length, with different content, in different parts."""
    order = sorted(range(len(recordings)), key=lambda i: recordings[i].seconds)
    for position, first in enumerate(order):
        for second in order[position + 1 :]:
            if recordings[second].seconds - recordings[first].seconds > _APART:
                break
            if parts[first] != parts[second] and recordings[first].digest != recordings[second].digest:
                yield (first, second) if first < second else (second, first)


def _course(recording: Recording) -> np.ndarray:
    """The energies of bands (steps, bands); none if the recording can't be read, which is a problem of its own."""
    try:
        clip = read_clip(recording.path, 0.0, LONGEST)
        wave = resample(clip.wave, clip.sample_rate, _RATE)
    except (AvexServeError, OSError):
        return np.empty((0, _EDGES.size - 1), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (0, _FRAME)), _FRAME)[:: _FRAME // 2]
    powers = np.abs(np.fft.rfft(frames * np.hanning(_FRAME).astype(np.float32), axis=1)) ** 2
    edges = np.searchsorted(np.fft.rfftfreq(_FRAME, 1 / _RATE), _EDGES)
    bands = np.add.reduceat(powers, edges[:-1], axis=1)  # the last band goes up to the end
    steps = np.arange(len(bands)) * (_FRAME // 2) // round(_STEP * _RATE)
    starts = np.flatnonzero(np.diff(steps, prepend=-1))
    return np.asarray(np.cbrt(np.add.reduceat(bands, starts, axis=0)), np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of the courses (steps, bands), less the mean of each band: what is steady says nothing."""
    if len(one) < 2:
        return 0.0
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    length = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum() / length) if length > 1e-9 else 0.0
