"""Recordings as WAV of 16 bits, which the pages read in stretches: they decode no other format.

The rate stays, so that ultrasound does; WebAudio would resample a recording to the rate of the loudspeaker.
"""

import os
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from avex_serve.audio.reader import Channel, Wave, describe
from avex_serve.errors import AudioError, InputError
from avex_serve.seeing.clips import read_clip

HEADER_BYTES: Final = 44
SAMPLE_BYTES: Final = 2
MOST_BYTES: Final = 2**25  # of one range: the pages ask for a fifth of it at most
_UNKNOWN: Final = 0xFFFFFFFF  # a size that the header doesn't know, or can't say
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def encode_header(sample_rate: int, frames: int | None) -> bytes:
    """The header of a mono WAV; frames None: not known."""
    size = _UNKNOWN if frames is None else min(_UNKNOWN, frames * SAMPLE_BYTES)
    form = (1, 1, sample_rate, sample_rate * SAMPLE_BYTES, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    whole = min(_UNKNOWN, size + HEADER_BYTES - 8)
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", whole, b"WAVE", b"fmt ", 16, *form, b"data", size)


def encode_samples(wave: Wave) -> bytes:
    """Samples (S,) as 16-bit integers; what is beyond [-1, 1] is clipped."""
    samples: np.ndarray = np.clip(np.rint(wave * 2.0**15), -(2**15), 2**15 - 1).astype("<i2")
    return samples.tobytes()


def encode_stream(blocks: Iterable[Wave], sample_rate: int, frames: int | None) -> Iterator[bytes]:
    """A WAV in pieces; frames None: not known."""
    yield encode_header(sample_rate, frames)
    for block in blocks:
        yield encode_samples(block)


class WaveFile:
    """A recording on disk as a mono WAV of which any bytes can be read, without decoding the rest."""

    def __init__(self, path: str | os.PathLike[str], channel: Channel = "mix") -> None:
        """Look at its header; NotFoundError or AudioError as of `open_audio`."""
        header = describe(path)
        if not header.frames:
            raise AudioError(f"{path} doesn't say how long it is")
        self._path = path
        self._channel = channel
        self.sample_rate = header.sample_rate
        self.frames: int = header.frames
        self.size = HEADER_BYTES + SAMPLE_BYTES * self.frames

    def read(self, first: int, last: int) -> bytes:
        """The bytes from `first` to `last`, both included."""
        last = min(last, self.size - 1)
        content = encode_header(self.sample_rate, self.frames)[first : last + 1]
        if last < HEADER_BYTES:
            return content
        start = max(0, first - HEADER_BYTES)
        begin, end = start // SAMPLE_BYTES, (last - HEADER_BYTES) // SAMPLE_BYTES + 1
        clip = read_clip(self._path, begin / self.sample_rate, end / self.sample_rate, self.frames, self._channel)
        wave = np.zeros(end - begin, np.float32)  # a damaged file may end before its header says
        wave[: clip.wave.size] = clip.wave[: wave.size]
        skipped = start - begin * SAMPLE_BYTES
        return content + encode_samples(wave)[skipped : skipped + last + 1 - max(first, HEADER_BYTES)]


def find_range(text: str, size: int) -> tuple[int, int]:
    """The first and the last byte that a Range header asks for, at most `MOST_BYTES` of them.

    Args:
        text: of the header, such as ``bytes=0-99``.
        size: bytes that there are.

    Raises:
        InputError: not one range, or one without any of the bytes.
    """
    match = _RANGE.fullmatch(text.strip())
    first, last = match.groups() if match else ("", "")
    if first:
        begin, end = int(first), min(int(last or size - 1), size - 1)
    elif last:
        begin, end = max(0, size - int(last)), size - 1
    else:
        raise InputError(f"Range is {text[:40]!r}; expected one range of bytes, such as bytes=0-99")
    if begin > end:
        raise InputError(f"Range is {text[:40]!r}, and there are {size} bytes")
    return begin, min(end, begin + MOST_BYTES - 1)
