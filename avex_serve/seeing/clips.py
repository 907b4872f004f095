"""Stretches of recordings: read from files, and encoded so that a browser plays them."""

import base64
import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
import soundfile

from avex_serve.audio.reader import AudioStream, Channel, Wave, open_audio, resample
from avex_serve.errors import AudioError

RATES: Final = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # Hz, those of MP3
PEAK: Final = 0.7  # of an encoded clip, -3 dB: recordings are much quieter than what else people listen to


class Clip(NamedTuple):
    """A stretch of a recording."""

    wave: Wave  # (S,) float32
    sample_rate: int  # Hz
    start: float  # seconds from the start of the recording


@contextmanager
def open_span(
    path: str | os.PathLike[str], start: float = 0.0, end: float = math.inf, channel: Channel = "mix"
) -> Iterator[AudioStream]:
    """Read a stretch of a recording, from `start` to `end` in seconds, as a stream; errors as of `open_audio`."""
    with open_audio(path, channel) as stream:
        rate = stream.sample_rate
        first = round(start * rate)
        last = None if math.isinf(end) else round(end * rate)
        ends = [each for each in (stream.frames, last) if each is not None]
        frames = max(0, min(ends) - first) if ends else None
        yield AudioStream(_between(stream.blocks, first, last), rate, frames, stream.warnings)


def _between(blocks: Iterable[Wave], first: int, last: int | None) -> Iterator[Wave]:
    position = 0
    for block in blocks:
        if last is not None and position >= last:
            return
        part = block[max(0, first - position) : None if last is None else last - position]
        position += block.size
        if part.size:
            yield part


def read_clip(
    path: str | os.PathLike[str],
    start: float,
    end: float,
    frames: int | None = None,
    channel: Channel = "mix",
) -> Clip:
    """The samples of a recording from `start` to `end` in seconds, or as many as there are.

    Args:
        path: of the recording.
        start: seconds.
        end: seconds.
        frames: of the whole recording, as `open_audio` read them. Where libsndfile finds the same number, it reads
            the clip without what is in front of it.
        channel: as of `open_audio`.

    Raises:
        AudioError: the recording ends before the clip starts; otherwise as of `open_audio`.
    """
    if frames is not None and (clip := _seek(path, start, end, frames, channel)) is not None:
        return clip
    with open_span(path, start, end, channel) as stream:
        blocks = list(stream.blocks)
    if not blocks:
        raise AudioError(f"{path} ends before {start:.1f} s")
    return Clip(np.concatenate(blocks), stream.sample_rate, start)


def _seek(path: str | os.PathLike[str], start: float, end: float, frames: int, channel: Channel) -> Clip | None:
    try:
        with open(path, "rb") as file, soundfile.SoundFile(file) as sound:  # noqa: PTH123 - soundfile goes by names
            first = round(start * sound.samplerate)
            if sound.frames != frames or first >= frames:
                return None
            sound.seek(first)
            samples = sound.read(round(end * sound.samplerate) - first, dtype="float32", always_2d=True)
            wave = samples.mean(axis=1) if channel == "mix" else samples[:, channel - 1]
            return Clip(np.ascontiguousarray(wave), int(sound.samplerate), start)
    except (OSError, soundfile.SoundFileError):
        return None  # `open_audio` has the right message


def as_mp3(clip: Clip) -> bytes:
    """The clip as MP3, which every browser plays, raised or lowered to one peak level.

    A clip with a rate that MP3 doesn't have is resampled, so what is above 24 kHz is not in it.

    Raises:
        AudioError: too short to be resampled.
    """
    rate = next((each for each in RATES if each <= clip.sample_rate), RATES[-1])
    wave = resample(clip.wave, clip.sample_rate, rate)
    peak = float(np.abs(wave).max())
    target = io.BytesIO()
    soundfile.write(target, wave * (PEAK / peak) if peak > 0 else wave, rate, format="MP3")
    return target.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """A file as a URI that holds it, of a type such as ``image/png``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
