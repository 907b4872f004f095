"""A mono waveform: checked, mixed down by the mean, resampled to the model's rate (soxr)."""

from typing import Final, NamedTuple

import numpy as np
import soxr

from avex_serve.errors import AudioError
from avex_serve.scheduling import allowance
from avex_serve.scheduling.stages import RESAMPLE, stage

# Recorders lie well within, from infrasound to sonar. A damaged header doesn't, and a rate of 1 Hz would make a
# small upload grow 16,000-fold when it is resampled.
RATES: Final = (100, 10_000_000)  # Hz
Wave = np.ndarray[tuple[int], np.dtype[np.float32]]


class Recording(NamedTuple):
    """A mono recording."""

    wave: Wave  # (S,) float32 in [-1, 1]
    sample_rate: int  # Hz


def downmix(samples: np.ndarray) -> Wave:
    """Mean over channels: (S, channels) → (S,) float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # `check_wave` refuses what comes of it
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
        raise AudioError(f"{name} holds NaN or infinite samples; expected finite ones in [-1, 1]")
    return wave


def resampled_size(samples: int, source_rate: int, target_rate: int) -> int:
    """How many samples `resample` makes of so many.

    Raises:
        AudioError: a source rate outside `RATES`, or too few samples for one at the target rate.
    """
    if source_rate == target_rate:
        return samples
    lowest, highest = RATES
    if not lowest <= source_rate <= highest:
        raise AudioError(f"sample rate {source_rate!r}; expected {lowest} to {highest} Hz")
    size = int(samples * target_rate / source_rate + 0.5)
    if size == 0:
        raise AudioError(f"{samples} samples at {source_rate} Hz are nothing at {target_rate} Hz; send more audio")
    return size


def resample(wave: Wave, source_rate: int, target_rate: int) -> Wave:
    """Resample (S,) to the target rate with soxr's HQ recipe, which the manifest names.

    Raises:
        AudioError: see `resampled_size`.
    """
    if source_rate == target_rate:
        return wave
    # A low rate makes a small recording large.
    allowance.current().take_room(4 * resampled_size(wave.size, source_rate, target_rate))
    with stage(RESAMPLE):
        resampled: np.ndarray = soxr.resample(wave, source_rate, target_rate, quality="HQ")
    return np.ascontiguousarray(resampled, dtype=np.float32)
