"""Synthetic animal-like sounds with labels: for the training of the demo model, and for the demo.

They are simple imitations: enough to train a small model in minutes and to try the software, but not for work in the
field. Every parameter (pitch, rate, notes, envelope, level, background) is random, so each seed gives other sounds.
This module needs numpy only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Wave = NDArray[np.float64]  # (S,) samples of one sound

LOWEST_SAMPLE_RATE = 16000  # Hz; no sound has frequencies above 7 kHz
WINDOW_SECONDS = 2.0  # length of a clip of the demo model
# A recording is for demonstration, so its sounds are clearly louder than the background.
RECORDING_SNR_DB = (12.0, 20.0)
# Peak of a clip, in dB of full scale. The range is wide, so that a model can't learn anything from the level.
PEAK_DB = (-36.0, -0.5)


class Event(NamedTuple):
    """A sound in a recording."""

    start: float  # seconds
    end: float  # seconds
    label: str


def make_clip(
    rng: Generator,
    labels: Sequence[str],
    *,
    snr_db: float,
    seconds: float = WINDOW_SECONDS,
    sample_rate: int = LOWEST_SAMPLE_RATE,
) -> NDArray[np.float32]:
    """The clip of `make_clip_with_events`, without the events."""
    return make_clip_with_events(rng, labels, snr_db=snr_db, seconds=seconds, sample_rate=sample_rate)[0]


def make_clip_with_events(
    rng: Generator,
    labels: Sequence[str],
    *,
    snr_db: float,
    seconds: float = WINDOW_SECONDS,
    sample_rate: int = LOWEST_SAMPLE_RATE,
) -> tuple[NDArray[np.float32], list[Event]]:
    """A clip with these sounds, each at a random time, on background noise.

    Args:
        rng: the source of all random parameters.
        labels: the sounds, from `LABELS`; none: background only.
        snr_db: power of each sound during the sound, relative to the power of the background, in dB.
        seconds: length of the clip; a longer sound is cut.
        sample_rate: of the clip, in Hz.

    Returns:
        (S,) float32 in [-1, 1], and one event for each label.

    Raises:
        ValueError: an unknown label, or a sample rate too low for the sounds.
    """
    mix = _background(rng, round(seconds * sample_rate), sample_rate)
    events = [_add(rng, mix, 0, mix.size, label, snr_db, sample_rate) for label in labels]
    return _at_level(rng, mix), events


def make_recording(
    seed: int, *, seconds: float = 20.0, sample_rate: int = LOWEST_SAMPLE_RATE
) -> tuple[NDArray[np.float32], list[Event]]:
    """A recording of clear sounds, one after the other.

    The recording is divided into windows of 2 s. Each window has one sound, except every fourth, which has none. All
    labels occur once before a label occurs again.

    Args:
        seed: of the random parameters.
        seconds: length of the recording.
        sample_rate: of the recording, in Hz.

    Returns:
        (S,) float32 in [-1, 1], and the events in order.

    Raises:
        ValueError: a sample rate too low for the sounds.
    """
    rng = np.random.default_rng(seed)
    samples, window = round(seconds * sample_rate), round(WINDOW_SECONDS * sample_rate)
    mix = _background(rng, samples, sample_rate)
    taken = [first for i, first in enumerate(range(0, samples - window + 1, window)) if i % 4 != 3]
    order = [label for _ in range(0, len(taken), len(LABELS)) for label in rng.permutation(LABELS).tolist()]
    events = [
        _add(rng, mix, first, window, label, rng.uniform(*RECORDING_SNR_DB), sample_rate)
        for first, label in zip(taken, order, strict=False)
    ]
    return _at_level(rng, mix), events


def _add(rng: Generator, mix: Wave, first: int, samples: int, label: str, snr_db: float, sample_rate: int) -> Event:
    """Add a sound to the mix, at a random time within `samples` samples from `first` on."""
    if label not in _MAKERS:
        raise ValueError(f"label {label!r} is not known; expected one of {list(LABELS)}")
    sound = _MAKERS[label](rng, sample_rate)[:samples]  # 0.3 to 1.8 s, of any level
    start = first + int(rng.integers(0, samples - sound.size + 1))
    end = start + sound.size
    mix[start:end] += _with_power(sound, 10 ** (snr_db / 10))  # the background has power 1
    return Event(start / sample_rate, end / sample_rate, label)


def _with_power(wave: Wave, power: float) -> Wave:
    gain: float = np.sqrt(power / np.mean(wave**2))
    return wave * gain


def _at_level(rng: Generator, mix: Wave) -> NDArray[np.float32]:
    gain: float = 10 ** (rng.uniform(*PEAK_DB) / 20) / np.abs(mix).max()
    return (mix * gain).astype(np.float32)


def _background(rng: Generator, samples: int, sample_rate: int) -> Wave:
    """Noise of power 1 between white and pink."""
    if sample_rate < LOWEST_SAMPLE_RATE:
        raise ValueError(f"sample_rate is {sample_rate} Hz; the sounds need at least {LOWEST_SAMPLE_RATE}")
    slope = rng.uniform(0.0, 1.0)  # power falls as 1 / f ** slope
    # Flat below 50 Hz; otherwise nearly all of the power would be at frequencies that no sound has.
    noise = _filtered(rng, samples, sample_rate, lambda f: np.maximum(f, 50.0) ** (-slope / 2))
    return _with_power(noise, 1.0)


# -- the sounds -------------------------------------------------------------------------------------------------


def _whistle(rng: Generator, sample_rate: int) -> Wave:
    """One to three long notes with a nearly constant pitch."""
    pitch = _log_uniform(rng, 1400, 5000)
    wobble, rate = rng.uniform(0.0, 0.02), rng.uniform(2, 7)

    def note() -> Wave:
        time = _time(rng.uniform(0.3, 0.55), sample_rate)
        hertz = pitch * rng.uniform(0.94, 1.06) * (1 + wobble * np.sin(2 * np.pi * rate * time))
        return _tone(hertz, sample_rate) * _fade(time.size, 0.1)

    return _notes(rng, note, int(rng.integers(1, 4)), sample_rate)


def _hoot(rng: Generator, sample_rate: int) -> Wave:
    """One to three low notes with a weak second harmonic."""
    pitch, second = _log_uniform(rng, 250, 600), rng.uniform(0.0, 0.25)

    def note() -> Wave:
        time = _time(rng.uniform(0.2, 0.5), sample_rate)
        hertz = pitch * (1 + rng.uniform(0.0, 0.08) * np.sin(np.pi * time / time[-1]))
        return _tone(hertz, sample_rate, [1.0, second]) * _fade(time.size, 0.25)

    return _notes(rng, note, int(rng.integers(1, 4)), sample_rate)


def _trill(rng: Generator, sample_rate: int) -> Wave:
    """Short notes in fast repetition, 9 to 18 a second."""
    period, pitch = 1 / rng.uniform(9, 18), _log_uniform(rng, 1800, 5500)
    time = _time(period * rng.uniform(0.4, 0.6), sample_rate)
    bend = rng.uniform(-0.15, 0.15)
    note = _tone(pitch * (1 + bend * time / time[-1]), sample_rate) * _fade(time.size, 0.25)
    return _repeated(rng, note, period, rng.uniform(0.6, 1.6), sample_rate)


def _click_train(rng: Generator, sample_rate: int) -> Wave:
    """Clicks of a few milliseconds, 4 to 14 a second."""
    period, decay = 1 / rng.uniform(4, 14), rng.uniform(0.0007, 0.003)
    time = _time(8 * decay, sample_rate)
    ring = _tone(np.full(time.size, _log_uniform(rng, 1500, 6000)), sample_rate)
    click = (ring + 0.5 * rng.standard_normal(time.size)) * np.exp(-time / decay)
    return _repeated(rng, click, period, rng.uniform(0.8, 1.7), sample_rate)


def _harmonic_call(rng: Generator, sample_rate: int) -> Wave:
    """One to three notes with many harmonics, whose pitch rises and falls."""
    pitch, arch = _log_uniform(rng, 350, 900), rng.uniform(0.05, 0.3)
    harmonics = np.arange(1, 8) ** -rng.uniform(0.2, 0.9) * rng.uniform(0.6, 1.0, 7)

    def note() -> Wave:
        time = _time(rng.uniform(0.25, 0.55), sample_rate)
        return _tone(pitch * (1 + arch * np.sin(np.pi * time / time[-1])), sample_rate, harmonics) * _fade(
            time.size, 0.15
        )

    return _notes(rng, note, int(rng.integers(1, 4)), sample_rate)


def _buzz(rng: Generator, sample_rate: int) -> Wave:
    """Like an insect: fast pulses, filtered to a frequency band."""
    rate, centre = rng.uniform(70, 180), _log_uniform(rng, 2500, 5500)
    time = _time(rng.uniform(0.6, 1.7), sample_rate)
    hertz = rate * (1 + rng.uniform(-0.05, 0.05) * time / time[-1])
    since = (np.cumsum(hertz) / sample_rate % 1 - 0.5) / hertz  # seconds from the nearest pulse
    envelope = np.exp(-0.5 * (2 * np.pi * rng.uniform(300, 700) * since) ** 2)
    pulses: Wave = envelope * np.sin(2 * np.pi * centre * since)
    return pulses * _fade(time.size, 0.1)


def _sweep(rng: Generator, sample_rate: int, *, rising: bool) -> Wave:
    """One or two notes that rise or fall by about an octave."""
    low = _log_uniform(rng, 900, 2600)
    high = low * rng.uniform(1.7, 2.6)
    first, last = (low, high) if rising else (high, low)
    curve = rng.uniform(0.7, 1.5)

    def note() -> Wave:
        time = _time(rng.uniform(0.35, 0.75), sample_rate)
        hertz = first * (last / first) ** ((time / time[-1]) ** curve)
        return _tone(hertz, sample_rate) * _fade(time.size, 0.1)

    return _notes(rng, note, int(rng.integers(1, 3)), sample_rate)


def _wind(rng: Generator, sample_rate: int) -> Wave:
    """Gusts of low-frequency noise."""
    time = _time(rng.uniform(1.3, 1.8), sample_rate)
    cutoff = rng.uniform(150, 500)
    noise = _filtered(rng, time.size, sample_rate, lambda f: 1 / (1 + (f / cutoff) ** 2))
    gusts = 1 + rng.uniform(0.3, 0.8) * np.sin(2 * np.pi * (rng.uniform(0.4, 1.5) * time + rng.uniform()))
    return noise * gusts * _fade(time.size, 0.15)


def _rain(rng: Generator, sample_rate: int) -> Wave:
    """Drops at random times, with a hiss."""
    time = _time(rng.uniform(1.3, 1.8), sample_rate)
    drops = np.zeros(time.size)
    for _ in range(int(rng.uniform(30, 120) * time[-1])):
        decay = rng.uniform(0.001, 0.004)
        drop_time = _time(6 * decay, sample_rate)
        drop = _tone(np.full(drop_time.size, rng.uniform(2000, 7000)), sample_rate) * np.exp(-drop_time / decay)
        start = int(rng.integers(0, time.size - drop.size))
        drops[start : start + drop.size] += rng.exponential() * drop
    hiss = _filtered(rng, time.size, sample_rate, lambda f: 1 / (1 + (3000 / np.maximum(f, 1)) ** 2))
    mix: Wave = drops / drops.std() + rng.uniform(0.5, 1.0) * hiss / hiss.std()
    return mix * _fade(time.size, 0.1)


_MAKERS: dict[str, Callable[[Generator, int], Wave]] = {
    "whistle": _whistle,
    "trill": _trill,
    "click_train": _click_train,
    "harmonic_call": _harmonic_call,
    "buzz": _buzz,
    "up_sweep": partial(_sweep, rising=True),
    "down_sweep": partial(_sweep, rising=False),
    "hoot": _hoot,
    "wind": _wind,
    "rain": _rain,
}
LABELS: tuple[str, ...] = tuple(_MAKERS)


# -- parts of sounds ---------------------------------------------------------------------------------------------


def _notes(rng: Generator, note: Callable[[], Wave], count: int, sample_rate: int) -> Wave:
    """`count` notes with short pauses between them."""
    parts = [note()]
    for _ in range(count - 1):
        pause = np.zeros(int(rng.uniform(0.03, 0.1) * sample_rate))
        parts += [pause, rng.uniform(0.6, 1.0) * note()]
    return np.concatenate(parts)


def _repeated(rng: Generator, note: Wave, period: float, seconds: float, sample_rate: int) -> Wave:
    """A note repeated every `period` seconds, with small random changes of time and loudness."""
    starts = np.arange(0.0, seconds, period)
    starts[1:] += rng.uniform(-0.08, 0.08, starts.size - 1) * period
    places = (starts * sample_rate).astype(int)
    train = np.zeros(places[-1] + note.size)
    for place in places:
        train[place : place + note.size] += rng.uniform(0.6, 1.0) * note
    return train


def _tone(hertz: Wave, sample_rate: int, harmonics: Sequence[float] | Wave = (1.0,)) -> Wave:
    """A tone (S,) with the pitch `hertz` (S,) and these amplitudes of its harmonics, the first one first."""
    phase = 2 * np.pi * np.cumsum(hertz) / sample_rate
    return sum((a * np.sin(k * phase) for k, a in enumerate(harmonics, start=1)), np.zeros(hertz.size))


def _filtered(rng: Generator, samples: int, sample_rate: int, response: Callable[[Wave], Wave]) -> Wave:
    """White noise (S,), filtered by an amplitude response: frequencies in Hz → factors."""
    size = 1 << (samples - 1).bit_length()  # other lengths of a transform can take ten times as long
    frequencies = np.linspace(0, sample_rate / 2, size // 2 + 1)  # Hz
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * response(frequencies), size)[:samples]


def _fade(samples: int, share: float) -> Wave:
    """An envelope (S,) that rises smoothly in the first `share` of the sound and falls in the last."""
    position = np.linspace(0, 1, samples)
    return np.sin(0.5 * np.pi * np.minimum(1, np.minimum(position, 1 - position) / share)) ** 2


def _time(seconds: float, sample_rate: int) -> Wave:
    return np.arange(max(2, int(seconds * sample_rate))) / sample_rate


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
