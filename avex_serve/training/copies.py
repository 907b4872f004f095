"""Recordings that sound the same although their files differ, such as copies in another format. Needs no torch.

Copies are looked for before anything is embedded, among recordings of one length. Those whose energies in bands take
the same course are compared sample by sample, at the shift where they fit best.
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
ALIKE: Final = 0.7  # correlation of samples from which on two recordings are copies
_SAME_COURSE: Final = 0.96  # correlation of energies from which on samples are compared
_APART: Final = 0.15  # seconds that lengths of copies may differ by: some formats pad
_RATE: Final = 8000  # Hz
_FRAME: Final = 512  # samples
_STEP: Final = 0.05  # seconds
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
    involved: set[int] = set()
    for pair in _candidates(recordings, parts):  # millions, if all recordings have one length
        involved.update(pair)
        if len(involved) > MOST:
            return None
    with ThreadPoolExecutor(usable_cores()) as pool:
        courses = dict(zip(involved, pool.map(_course, (recordings[i] for i in involved)), strict=True))
    found = []
    for first, second in _candidates(recordings, parts):
        if _correlation(courses[first], courses[second]) < _SAME_COURSE:
            continue
        correlation = _fit(_read(recordings[first]), _read(recordings[second]))
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


def _read(recording: Recording) -> np.ndarray:
    """Its samples at `_RATE`; none if it can't be read, which is a problem of its own."""
    try:
        clip = read_clip(recording.path, 0.0, LONGEST)
        return resample(clip.wave, clip.sample_rate, _RATE)
    except (AvexServeError, OSError):
        return np.empty(0, np.float32)


def _fit(one: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of two waves at any shift up to `_APART`."""
    size = 1 << (one.size + other.size).bit_length()
    shifted = np.fft.irfft(np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size)), size)
    most = round(_APART * _RATE)
    length = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.abs(np.concatenate([shifted[: most + 1], shifted[-most:]])).max()) / length if length else 0.0


def _course(recording: Recording) -> np.ndarray:
    """The energies of bands (steps, bands), rooted so that the loudest moment isn't all; see `_unit`."""
    wave = _read(recording)
    if not wave.size:
        return np.empty((0, _EDGES.size - 1), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (0, _FRAME)), _FRAME)[:: _FRAME // 2]
    powers = np.abs(np.fft.rfft(frames * np.hanning(_FRAME).astype(np.float32), axis=1)) ** 2
    edges = np.searchsorted(np.fft.rfftfreq(_FRAME, 1 / _RATE), _EDGES)
    bands = np.add.reduceat(powers, edges[:-1], axis=1)  # the last band goes up to the end
    steps = np.arange(len(bands)) * (_FRAME // 2) // round(_STEP * _RATE)
    starts = np.flatnonzero(np.diff(steps, prepend=-1))
    return _unit(np.sqrt(np.add.reduceat(bands, starts, axis=0)))


def _unit(course: np.ndarray) -> np.ndarray:
    """A course less the mean of each band (what is steady says nothing), of length 1; zeros for a steady one."""
    if len(course) < 2:
        return np.zeros_like(course, np.float32)
    centred = course - course.mean(axis=0)
    length = float(np.linalg.norm(centred))
    return np.asarray(centred / length if length > 1e-5 else np.zeros_like(centred), np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two courses: a product alone where they have one length, since there may be millions of pairs."""
    if len(one) != len(other):
        size = min(len(one), len(other))
        one, other = _unit(one[:size]), _unit(other[:size])
    return float(np.vdot(one, other))
