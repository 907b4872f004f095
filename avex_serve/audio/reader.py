"""From encoded audio to mono samples at the model's rate, in blocks of bounded size.

libsndfile decodes, channels are mixed down by their mean, and soxr resamples.
"""

import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from avex_serve.errors import AudioError, NotFoundError, quoted
from avex_serve.scheduling.request import DECODE, RESAMPLE, current, stage

BLOCK_SAMPLES: Final = 2**18  # of all channels; 5 s at 48 kHz, mono
UNKNOWN_FRAMES: Final = 2**63 - 1  # libsndfile's count for streams whose header doesn't say
# A writer that doesn't know the size writes 2 or 4 GiB, or a little less.
STREAMED: Final = 0x7FFF0000
# Recorders have rates well within these, from infrasound to sonar. A damaged header may say anything, and a rate of
# 1 Hz would make a small upload grow 16,000-fold when it is resampled.
RATES: Final = (100, 10_000_000)  # Hz
# The first bytes of WAV and its relatives (RF64, Wave64, AIFF, AU, CAF), FLAC, OGG, and a frame of MP3.
FORMATS: Final = re.compile(
    rb"RIFF|RIFX|RF64|riff|FORM....AIF[FC]|\.snd|dns\.|caff|fLaC|OggS|\xff[\xe0-\xff]", re.DOTALL
)
MAX_TAGS: Final = 8  # ID3 tags in front of these
QUALITY: Final = "HQ"  # soxr's recipe, which the manifest names
Wave = np.ndarray[tuple[int], np.dtype[np.float32]]
Encoded = bytes | str | os.PathLike[str] | IO[bytes]  # the bytes, the path of a file, or a binary file


class Recording(NamedTuple):
    """A mono recording."""

    wave: Wave  # (S,) float32 in [-1, 1]
    sample_rate: int  # Hz


class AudioStream(NamedTuple):
    """A mono recording that is read block by block."""

    blocks: Iterable[Wave]  # each (S,) float32 in [-1, 1], finite
    sample_rate: int  # Hz
    frames: int | None  # samples in all, as its header says; None: it does not say
    warnings: list[str]  # reasons to doubt an answer, a sentence each; complete once the blocks are read


@contextmanager
def open_audio(source: Encoded) -> Iterator[AudioStream]:
    """Read an encoded recording (WAV, FLAC, OGG, MP3: the formats of libsndfile) as a mono stream.

    The block of the ``with`` statement reads the stream. The errors of damaged audio come while it is read.

    Args:
        source: the encoded bytes, the path of a file or a pipe, or a binary file, read from its position on.

    Raises:
        NotFoundError: no such file.
        AudioError: empty, not audio, truncated within the header, no samples, or samples that are not finite.
        TooLargeError: longer or larger than the current request may send.
    """
    if isinstance(source, bytes):
        with _opened(_Bytes(source), "the audio", len(source)) as stream:
            yield stream
        return
    # By descriptor, since libsndfile takes every file for audio whose name ends in .raw, .vox or .gsm.
    with (
        _open_file(source) as (file, name),
        _opened(file.fileno(), name, os.fstat(file.fileno()).st_size) as stream,
    ):
        yield stream


@contextmanager
def _open_file(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[tuple[IO[bytes], str]]:
    """A file on disk, and its name for messages; pipes and file objects are copied to a temporary one."""
    if not isinstance(source, str | os.PathLike):
        given = getattr(source, "name", None)
        name = quoted(given) if isinstance(given, str) else "the audio"
        with _on_disk(source, name) as file:
            yield file, name
        return
    path, name = Path(source), quoted(source)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotFoundError(f"{name} is a folder, not a file")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise AudioError(f"{name} is a device, not a recording; name a file or a pipe")
        opened = path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} can't be read: {getattr(error, 'strerror', error)}") from None
    with opened:
        if stat.S_ISREG(mode):
            yield opened, name
        else:
            with _on_disk(opened, name) as file:
                yield file, name


@contextmanager
def _on_disk(source: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """The rest of a file, in a temporary file: decoders seek, and a long recording would fill the memory."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, file)
            file.seek(0)
        except (OSError, TypeError, ValueError) as error:
            raise AudioError(f"{name} can't be read as bytes: {getattr(error, 'strerror', error)}") from None
        yield file


@contextmanager
def open_wave(wave: np.ndarray, sample_rate: int) -> Iterator[AudioStream]:
    """Read a waveform in memory, (S,) floating point in [-1, 1], as a stream; AudioError as of `_check_wave`."""
    wave = _check_wave(wave)
    blocks = (wave[start : start + BLOCK_SAMPLES] for start in range(0, wave.size, BLOCK_SAMPLES))
    yield AudioStream(blocks, sample_rate, wave.size, [])


def decode(source: Encoded) -> Recording:
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
    head = _read_at(file, 0, 8)
    if (declared := _declared_size(head)) is not None and declared > size:
        raise AudioError(f"{name} is truncated: it has {size} bytes, its header says {declared}; send all of it")
    with stage(DECODE):
        if not _is_known(file):
            raise _undecodable(name, "unknown format")
        try:
            sound = soundfile.SoundFile(file, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise _undecodable(name, error) from None
    with sound:
        frames = None if sound.frames == UNKNOWN_FRAMES else sound.frames
        current().limits.check_recording(frames or 0, sound.channels, sound.samplerate)
        yield AudioStream(_read_blocks(sound, name), int(sound.samplerate), frames, [])


def _read_at(file: io.BytesIO | int, start: int, size: int) -> bytes:
    return file.getvalue()[start : start + size] if isinstance(file, io.BytesIO) else os.pread(file, size, start)


def _is_known(file: io.BytesIO | int) -> bool:
    """Whether a file begins as one of the formats that we document.

    libsndfile opens many more, and prints what it finds in some of them on the standard output.
    """
    start = 0
    for _ in range(MAX_TAGS):
        head = _read_at(file, start, 12)
        if not head.startswith(b"ID3"):
            return FORMATS.match(head) is not None
        start += 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    return False


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
            wave = _check_wave(_downmix(samples), name)
        yield wave


def _undecodable(name: str, error: Exception | str) -> AudioError:
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


def _downmix(samples: np.ndarray) -> Wave:
    """Mean over channels: (S, channels) → (S,) float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # `_check_wave` refuses the result
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _check_wave(wave: np.ndarray, name: str = "the waveform") -> Wave:
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


def _check_rate(sample_rate: float) -> None:
    """Raise AudioError for a rate outside `RATES`."""
    lowest, highest = RATES
    if not lowest <= sample_rate <= highest:
        raise AudioError(f"the sample rate is {sample_rate!r}; expected {lowest} to {highest} Hz")


def resampled_size(samples: int, source_rate: int, target_rate: int) -> int:
    """The number of samples that soxr makes of this many at the target rate.

    Raises:
        AudioError: a source rate outside `RATES`, or too few samples for one at the target rate.
    """
    if source_rate == target_rate:
        return samples
    _check_rate(source_rate)
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
    _check_rate(source_rate)
    stream = soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality=QUALITY)
    samples = 0
    for block in blocks:
        samples += block.size
        with stage(RESAMPLE):
            resampled = stream.resample_chunk(block)
        yield resampled
    resampled_size(samples, source_rate, target_rate)
    with stage(RESAMPLE):
        resampled = stream.resample_chunk(np.empty(0, np.float32), last=True)
    yield resampled
