"""A mono waveform: checked, mixed down by the mean, resampled to the model's rate (soxr)."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
import soxr

from avex_serve.errors import AudioError
from avex_serve.scheduling.request import RESAMPLE, stage

# Recorders have rates well within these, from infrasound to sonar. A damaged header may say anything, and a rate of
# 1 Hz would make a small upload grow 16,000-fold when it is resampled.
RATES: Final = (100, 10_000_000)  # Hz
QUALITY: Final = "HQ"  # soxr's recipe, which the manifest names
Wave = np.ndarray[tuple[int], np.dtype[np.float32]]


class Recording(NamedTuple):
    """A mono recording."""

    wave: Wave  # (S,) float32 in [-1, 1]
    sample_rate: int  # Hz


class AudioStream(NamedTuple):
    """A mono recording that is read block by block."""

    blocks: Iterable[Wave]  # each (S,) float32 in [-1, 1], finite
    sample_rate: int  # Hz
    frames: int | None  # samples in all, as its header says; None: it does not say


def downmix(samples: np.ndarray) -> Wave:
    """Mean over channels: (S, channels) → (S,) float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # `check_wave` refuses the result
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_wave(wave: np.ndarray, name: str = "the waveform") -> Wave:
    """The waveform as (S,) float32.

    Raises:
        AudioError: not one-dimensional, no samples, not real numbers, or values that are not finite.
    """
    wave = np.asarray(wave)
    if wave.ndim != 1:
        raise AudioError(f"{name} has shape {wave.shape}; expected mono samples of shape (S,)")
    if wave.dtype.kind != "f":
        raise AudioError(f"{name} has type {wave.dtype}; expected floating-point samples in [-1, 1]")
    if wave.size == 0:
        raise AudioError(f"{name} has no samples; expected at least one")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is refused here
        wave = np.ascontiguousarray(wave, dtype=np.float32)
    if not np.isfinite(wave).all():
        raise AudioError(f"{name} has NaN or infinite samples; expected finite ones in [-1, 1]")
    return wave


def check_rate(sample_rate: float) -> None:
    """Raise AudioError for a rate outside `RATES`."""
    lowest, highest = RATES
    if not lowest <= sample_rate <= highest:
        raise AudioError(f"the sample rate is {sample_rate!r}; expected {lowest} to {highest} Hz")


def resampled_size(samples: int, source_rate: int, target_rate: int) -> int:
    """The number of samples that this many become at the target rate; soxr makes the same.

    Raises:
        AudioError: a source rate outside `RATES`, or too few samples for one at the target rate.
    """
    if source_rate == target_rate:
        return samples
    check_rate(source_rate)
    size = int(samples * target_rate / source_rate + 0.5)
    if size == 0:
        raise AudioError(
            f"{samples} samples at {source_rate} Hz are less than one at {target_rate} Hz; send more audio"
        )
    return size


def resample(wave: Wave, source_rate: int, target_rate: int) -> Wave:
    """Resample (S,) to the target rate; errors as of `resampled_size`."""
    if source_rate == target_rate:
        return wave
    return np.concatenate(list(resample_blocks([wave], source_rate, target_rate)))


def resample_blocks(blocks: Iterable[Wave], source_rate: int, target_rate: int) -> Iterator[Wave]:
    """Resample a recording while it is read, to the same samples as if it were resampled at once.

    Args:
        blocks: the recording in order, each block (S,) float32.
        source_rate: of the blocks, in Hz.
        target_rate: of the result, in Hz.

    Raises:
        AudioError: as of `resampled_size`.
    """
    if source_rate == target_rate:
        yield from blocks
        return
    check_rate(source_rate)
    stream = soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality=QUALITY)
    samples = 0
    for block in blocks:
        samples += block.size
        with stage(RESAMPLE):
            resampled = stream.resample_chunk(block)
        if resampled.size:
            yield resampled
    resampled_size(samples, source_rate, target_rate)
    with stage(RESAMPLE):
        resampled = stream.resample_chunk(np.empty(0, np.float32), last=True)
    yield resampled
