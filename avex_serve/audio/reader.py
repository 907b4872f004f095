"""From encoded audio to mono samples, decoded by libsndfile in blocks of bounded size."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import numpy as np
import soundfile

from avex_serve.audio.waveform import AudioStream, Recording, Wave, check_wave, downmix
from avex_serve.errors import AudioError, NotFoundError
from avex_serve.scheduling.request import DECODE, current, stage

BLOCK_SAMPLES: Final = 2**18  # of all channels; 5 s at 48 kHz, mono
UNKNOWN_FRAMES: Final = 2**63 - 1  # libsndfile's count for streams whose header doesn't say
# A size from here on means that the writer didn't know it: it wrote 2 or 4 GiB, or a little less.
STREAMED: Final = 0x7FFF0000


@contextmanager
def open_audio(source: bytes | str | os.PathLike[str]) -> Iterator[AudioStream]:
    """Read an encoded recording (WAV, FLAC, OGG, MP3: the formats of libsndfile) as a mono stream.

    The block of the ``with`` statement reads the stream. The errors of damaged audio come while it is read.

    Args:
        source: the encoded bytes, or the path of a file.

    Raises:
        NotFoundError: no such file.
        AudioError: empty, not audio, truncated within the header, no samples, or samples that are not finite.
        TooLargeError: longer or larger than the current request may send.
    """
    if isinstance(source, bytes):
        with _opened(_Bytes(source), "the audio", len(source)) as stream:
            yield stream
        return
    path = Path(source)
    try:
        if not path.is_file():
            raise NotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"{path}: no such file")
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise AudioError(f"{path} can't be read: {error.strerror}") from None
    # By descriptor, since libsndfile takes every file for audio whose name ends in .raw, .vox or .gsm.
    with file, _opened(file.fileno(), str(path), size) as stream:
        yield stream


def decode(source: bytes | str | os.PathLike[str]) -> Recording:
    """Decode an encoded recording and mix it down to mono; arguments and errors as of `open_audio`.

    Returns:
        wave (S,) float32 and its sample rate in Hz.
    """
    with open_audio(source) as stream:
        return Recording(np.concatenate(list(stream.blocks)), stream.sample_rate)


@contextmanager
def _opened(file: io.BytesIO | int, name: str, size: int) -> Iterator[AudioStream]:
    if size == 0:
        raise AudioError(f"{name} is empty (0 bytes); expected an encoded recording such as WAV or FLAC")
    head = file.getvalue()[:8] if isinstance(file, io.BytesIO) else os.pread(file, 8, 0)
    if (declared := _declared_size(head)) is not None and declared > size:
        raise AudioError(f"{name} is truncated: it has {size} bytes, its header says {declared}; send all of it")
    with stage(DECODE):
        try:
            sound = soundfile.SoundFile(file, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise _undecodable(name, error) from None
    with sound:
        frames = None if sound.frames == UNKNOWN_FRAMES else sound.frames
        current().limits.check_recording(frames or 0, sound.channels, sound.samplerate)
        yield AudioStream(_read_blocks(sound, name), int(sound.samplerate), frames)


def _read_blocks(sound: soundfile.SoundFile, name: str) -> Iterator[Wave]:
    # In blocks: reading at once allocates what the header says, terabytes in a damaged FLAC or MP3.
    request = current()
    size = max(1, BLOCK_SAMPLES // sound.channels)
    frames = 0
    while True:
        request.checkpoint()
        with stage(DECODE):
            try:
                samples = sound.read(size, dtype="float32", always_2d=True)  # (frames, channels)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise _undecodable(name, error) from None
            if not len(samples) and frames:
                return
            frames += len(samples)
            request.limits.check_recording(frames, sound.channels, sound.samplerate)
            wave = check_wave(downmix(samples), name)
        yield wave


def _undecodable(name: str, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", error)  # without the address of a BytesIO
    return AudioError(f"{name} can't be decoded ({reason}); expected WAV, FLAC, OGG (Vorbis, Opus) or MP3")


def _declared_size(head: bytes) -> int | None:
    """Bytes of a RIFF (WAV) or FORM (AIFF) file as its header says; None: it doesn't, as in a stream."""
    order: Literal["little", "big"] | None = {b"RIFF": "little", b"FORM": "big"}.get(head[:4])  # type: ignore[assignment]
    if order is None or len(head) < 8:
        return None
    declared = int.from_bytes(head[4:], order) + 8
    return None if declared >= STREAMED else declared


class _Bytes(io.BytesIO):
    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Stay at the same position instead of raising: libsndfile seeks before the start of damaged files.

        soundfile would print the exception with its traceback, and libsndfile sees by the position that it failed.
        """
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()
