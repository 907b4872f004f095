"""The clips to calibrate int8 on, and other clips to judge the result on."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from avex_serve.audio import reader as audio
from avex_serve.audio.windows import plan_windows
from avex_serve.errors import InputError
from avex_serve.synthetic import LOWEST_SAMPLE_RATE, make_recording

_T = TypeVar("_T")

# Audio of a calibration, and limits of the number of its clips. They are one batch, so their number decides the
# memory: 3 GB for BEATs at 10 s.
_SECONDS = 80.0
_FEWEST, _MOST = 8, 24
HELD_OUT_CLIPS = 24
# Fewer clips show nothing about the distances between clips.
LEAST_CLIPS = 12
# At most this number of files, spread evenly over a large folder.
_FILES = 200
# Clips of the calibration that are not from the recordings: sounds, and noise at another level.
_BUILT_IN = 3


class Clips(NamedTuple):
    """Clips at the model's rate, and their source."""

    calibration: np.ndarray  # (N, S) float32
    held_out: np.ndarray  # (M, S) float32
    source: str


def built_in(samples: int, rate: int) -> Clips:
    """Synthetic sounds; the held-out ones have other seeds."""
    calibration = [*_sounds(samples, rate, range(_wanted(samples, rate) - 1)), _noise(samples)]
    held_out = _sounds(samples, rate, range(1000, 1000 + HELD_OUT_CLIPS))
    return Clips(np.stack(calibration), np.stack(list(held_out)), "built-in sounds")


def from_recordings(folder: Path, samples: int, rate: int) -> Clips:
    """Clips of the recordings in a folder and its subfolders; every other clip is held out.

    A few built-in sounds join the calibration, so that sounds that no recording has are covered too.

    Raises:
        InputError: no folder, or recordings of fewer than `LEAST_CLIPS` clips.
        AudioError: a recording is damaged.
    """
    clips = list(_cut(folder, samples, rate))
    if len(clips) < LEAST_CLIPS:
        raise InputError(
            f"--calibration {folder} holds {len(clips)} clips of {samples / rate:g} s; expected at least "
            f"{LEAST_CLIPS}, of which half are held out to judge the result on"
        )
    calibration = _spread(clips[::2], _wanted(samples, rate) - _BUILT_IN)
    calibration += [*_sounds(samples, rate, range(_BUILT_IN - 1)), _noise(samples)]
    held_out = _spread(clips[1::2], HELD_OUT_CLIPS)
    return Clips(np.stack(calibration), np.stack(held_out), f"{len(clips)} clips of the recordings")


def _wanted(samples: int, rate: int) -> int:
    return max(_FEWEST, min(_MOST, math.ceil(_SECONDS * rate / samples)))


def _cut(folder: Path, samples: int, rate: int) -> Iterator[np.ndarray]:
    if not folder.is_dir():
        raise InputError(f"--calibration {folder} is not a folder; give one with recordings")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    most = -(-4 * HELD_OUT_CLIPS // max(1, min(len(files), _FILES)))
    for path in _spread(files, _FILES):
        recording = audio.decode(path)
        wave = audio.resample(recording.wave, recording.sample_rate, rate)
        yield from _spread(list(plan_windows(wave.size, samples, rate, overlap=0.0).cut(wave)), most)


_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"}


def _spread(things: list[_T], most: int) -> list[_T]:
    """At most `most` of the things, evenly spread."""
    if len(things) <= most:
        return things
    return [things[i * len(things) // most] for i in range(most)]


def _sounds(samples: int, rate: int, seeds: range) -> Iterator[np.ndarray]:
    for seed in seeds:
        # The clip is the start of a recording that is long enough to hold sounds.
        seconds = max(samples / rate, 2.0)
        wave, _ = make_recording(seed, seconds=seconds, sample_rate=max(rate, LOWEST_SAMPLE_RATE))
        yield audio.resample(wave, max(rate, LOWEST_SAMPLE_RATE), rate)[:samples]


def _noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)
