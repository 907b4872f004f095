"""Sounds without animals, which a head should leave unnamed. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from avex_serve.inference.engine import Engine
from avex_serve.training.embed import stored_outputs

SECONDS: Final = 120.0  # of each: one detection is 30 an hour
MOST_PER_HOUR: Final = 30.0  # detections of a label, above which a report warns
LEVEL: Final = 0.1  # root mean square; full scale is 1
_HUM: Final = 50.0  # Hz, with its harmonics


def noises(sample_rate: int) -> dict[str, np.ndarray]:
    """Silence, white, pink and brown noise, mains hum, and clipped noise; the same at each call.

    Args:
        sample_rate: in Hz.

    Returns:
        The sounds by name, each of `SECONDS`, (S,) float32 in [-1, 1].
    """
    rng = np.random.default_rng(0)
    samples = round(SECONDS * sample_rate)
    size = 1 << (samples - 1).bit_length()
    hertz = np.fft.rfftfreq(size, 1 / sample_rate)
    time = np.arange(samples) / sample_rate

    def coloured(slope: float) -> np.ndarray:
        """Noise whose power falls as 1 / f ** slope above 20 Hz."""
        spectrum = np.fft.rfft(rng.standard_normal(size)) * np.maximum(hertz, 20.0) ** (-slope / 2)
        return np.fft.irfft(spectrum, size)[:samples]

    harmonics = [k for k in range(1, 13) if k * _HUM < sample_rate / 2]
    hum = np.sum([np.sin(2 * np.pi * k * _HUM * time + rng.uniform(0, 6.28)) / k for k in harmonics], axis=0)
    found = {"white noise": coloured(0), "pink noise": coloured(1), "brown noise": coloured(2), "hum": hum}
    levelled = {name: wave * LEVEL / wave.std() for name, wave in found.items()}
    sounds = {"silence": np.zeros(samples), **levelled, "clipped noise": coloured(1) * 1e9}
    return {name: np.clip(wave, -1, 1).astype(np.float32) for name, wave in sounds.items()}


def noise_logits(
    engine: Engine, outputs: Sequence[str], head: Callable[[list[np.ndarray]], np.ndarray], store: Path
) -> dict[str, np.ndarray]:
    """The logits (N, C) of windows of each noise.

    Args:
        engine: of a bundle that takes audio.
        outputs: names of its outputs.
        head: logits (N, C) from these outputs (N, ...).
        store: folder where the outputs are kept.
    """
    return {
        name: head(stored_outputs(engine, outputs, f"{name} of {SECONDS:g} s", wave, store))
        for name, wave in noises(engine.audio_spec.sample_rate).items()
    }


def per_hour(
    logits: np.ndarray, thresholds: np.ndarray, labels: Sequence[str], window_seconds: float
) -> dict[str, float]:
    """Detections an hour of each label that has any, in windows without overlap.

    Args:
        logits: (N, C).
        thresholds: (C,), the lowest logit of a detection.
        labels: C names.
        window_seconds: length of a window.
    """
    counts = (logits >= thresholds).sum(axis=0)
    hours = len(logits) * window_seconds / 3600
    return {label: float(count / hours) for label, count in zip(labels, counts, strict=True) if count}
