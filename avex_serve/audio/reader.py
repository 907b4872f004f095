"""From encoded audio to mono samples at the model's rate, in blocks of bounded size.

Uncompressed samples are read directly, libsndfile decodes FLAC, OGG and MP3, and PyAV, an extra, M4A, AAC and WebM.
Channels are mixed down by their mean, or one is chosen, and soxr resamples. What a header declares, what is decoded
and what is in the file are compared; a stream's `warnings` report a difference.
"""

import ctypes
import io
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

import numpy as np
import soundfile
import soxr

from avex_serve.audio.containers import (
    DamagedError,
    Header,
    Source,
    View,
    ends_with_tag,
    mp3_frames,
    ogg_links,
    read_header,
)
from avex_serve.errors import AudioError, InputError, NotFoundError, quoted
from avex_serve.scheduling.request import DECODE, RESAMPLE, current, stage

BLOCK_SAMPLES: Final = 2**18  # of all channels; 5 s at 48 kHz, mono
# Recorders have rates well within these, from infrasound to sonar. A damaged header may say anything, and a rate of
# 1 Hz would make a small upload grow 16,000-fold when it is resampled.
RATES: Final = (100, 10_000_000)  # Hz
QUALITY: Final = "HQ"  # soxr's recipe, which the manifest names
CANCELLED: Final = 0.01  # power of the mix, of that of the channels, below which mixing takes nearly everything away
SAMPLED: Final = 16  # every how many samples that is measured
AV_FORMATS: Final = {"M4A": "mov", "AAC": "aac", "WebM": "matroska"}  # and what FFmpeg calls them
AV_SLACK: Final = 4096  # samples of a frame or two, by which lengths in their headers may be wrong
AV_BYTES: Final = 2**25  # of a table: that of eight hours of AAC at 48 kHz
AV_CODECS: Final = ("aac", "alac", "mp3", "mp3float", "opus", "libopus", "vorbis", "flac")
READABLE: Final = "WAV, FLAC, OGG (Vorbis, Opus), MP3, or another format that docs/recordings.md lists"
CONVERT: Final = ". Convert it, e.g. with `ffmpeg -i FILE out.wav`"
UNKNOWN_CODES: Final = (1, 4)  # of libsndfile, for formats and encodings that it doesn't know: others are damage
Wave = np.ndarray[tuple[int], np.dtype[np.float32]]
# The bytes, the path of a file, or a binary file.
Encoded = bytes | bytearray | memoryview | str | os.PathLike[str] | IO[bytes]
Channel = int | Literal["mix"]  # from 1; mix: the mean of all


class Recording(NamedTuple):
    """A mono recording."""

    wave: Wave  # (S,) float32 in [-1, 1]
    sample_rate: int  # Hz


@dataclass
class AudioStream:
    """A mono recording that is read block by block, once."""

    blocks: Iterable[Wave]  # each (S,) float32 in [-1, 1], finite
    sample_rate: int  # Hz
    frames: int | None  # samples in all, as its header says; None: it does not say
    warnings: list[str] = field(default_factory=list)  # reasons to doubt an answer; complete once all is read
    partial: bool = False  # whether the warnings say that audio is missing; known once all is read
    samples: int = 0  # read until now
    name: str = "the waveform"  # for messages
    header: Header | None = None  # of an encoded recording

    def __iter__(self) -> Iterator[Wave]:
        """The blocks, counted."""
        for block in self.blocks:
            self.samples += block.size
            yield block

    def lose(self, warning: str) -> None:
        """Note a reason why audio is missing."""
        self.warnings.append(warning)
        self.partial = True


@contextmanager
def open_audio(source: Encoded, channel: Channel = "mix") -> Iterator[AudioStream]:
    """Read an encoded recording (WAV, FLAC, OGG, MP3 and their relatives) as a mono stream.

    The block of the ``with`` statement reads the stream. The errors of damaged audio come while it is read. A
    recording that ends early is read as far as it is whole, and the stream's warnings say so.

    Args:
        source: the encoded bytes, the path of a file or a pipe, or a binary file, read from its position on.
        channel: which channel to read, from 1; "mix": the mean of all.

    Raises:
        NotFoundError: no such file.
        InputError: no such channel.
        AudioError: empty, not audio, truncated within the header, no samples, or samples that are not finite.
        TooLargeError: longer or larger than the current request may send.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        with _opened(Source(bytes(source)), "the audio", channel) as stream:
            yield stream
        return
    with _open_file(source) as (file, name), _opened(Source(file.fileno()), name, channel) as stream:
        yield stream


@contextmanager
def _open_file(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[tuple[IO[bytes], str]]:
    """A file on disk, and its name for messages; pipes and file objects are copied to a temporary one."""
    if not isinstance(source, str | os.PathLike):
        given = getattr(source, "name", None)
        name = quoted(given) if isinstance(given, str) else "the audio"
        if given == "<stdin>":
            name = "standard input"
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
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise AudioError(f"{name} can't be read as bytes: {getattr(error, 'strerror', error)}") from None
        yield file


@contextmanager
def open_wave(wave: np.ndarray, sample_rate: int, channel: Channel = "mix") -> Iterator[AudioStream]:
    """Read a waveform in memory, (S,) floating point in [-1, 1], as a stream; AudioError as of `_check_wave`."""
    wave = _check_wave(wave)
    _check_channel(channel, 1)
    blocks = (wave[start : start + BLOCK_SAMPLES] for start in range(0, wave.size, BLOCK_SAMPLES))
    yield AudioStream(blocks, sample_rate, wave.size)


def decode(source: Encoded, channel: Channel = "mix") -> Recording:
    """Decode a recording: its samples, mixed down or of one channel, and their rate.

    ``engine.predict(*decode("recording.wav"))`` gets the samples that the service gets. Channel by channel:
    ``decode("recording.wav", channel=2)``.

    Args:
        source: the path of a file or a pipe, a binary file, or the encoded bytes.
        channel: which channel to read, from 1; "mix": the mean of all.

    Returns:
        wave (S,) float32 in [-1, 1] and its sample rate in Hz.

    Raises:
        AvexServeError: as of `open_audio`.
        AudioError: also if audio is missing, since samples alone can't say so; `open_audio` reads the rest.
    """
    with open_audio(source, channel) as stream:
        wave = np.concatenate(list(stream))
        if stream.partial:
            raise AudioError(f"{stream.name} is truncated, damaged or silent: {'; '.join(stream.warnings)}")
        return Recording(wave, stream.sample_rate)


@contextmanager
def _opened(source: Source, name: str, channel: Channel) -> Iterator[AudioStream]:
    if source.size == 0:
        raise AudioError(f"{name} is empty (0 bytes); expected an encoded recording such as WAV or FLAC")
    with ExitStack() as files:
        with stage(DECODE):
            try:
                source, header = read_header(source)
                stream = AudioStream((), 0, None, list(header.warnings), header.cut)
                if header.format in AV_FORMATS:
                    blocks = _open_av(source, header, stream, files)
                elif header.pcm is not None:
                    blocks = _read_pcm(source, header, stream)
                else:
                    blocks = _open_sound(source, header, stream, files)
            except DamagedError as error:
                raise AudioError(
                    f"{name} can't be decoded ({error}); it is damaged or incomplete: copy or download it again, "
                    "or convert it if other programs play it"
                ) from None
            except AudioError as error:
                raise AudioError(f"{name} can't be decoded ({error}); expected {READABLE}{CONVERT}") from None
        try:
            _check_rate(header.sample_rate)
        except AudioError as error:
            raise AudioError(f"{name}: {error}") from None
        _check_channel(channel, header.channels)
        current().limits.check_recording(header.frames or 0, header.channels, header.sample_rate)
        stream.sample_rate, stream.frames = header.sample_rate, header.frames
        stream.name, stream.header = name, header
        stream.blocks = _mixed(blocks, source, header, stream, channel, name)
        yield stream


def describe(path: str | os.PathLike[str]) -> Header:
    """What the header of a recording says, compared with the file, without decoding it.

    Raises:
        NotFoundError, AudioError: as of `open_audio`.
    """
    with _open_file(path) as (file, _):
        source = Source(file.fileno())
        if source.size == 0:
            raise AudioError("is empty (0 bytes)")
        found, header = read_header(source)
        if header.format in AV_FORMATS:
            with ExitStack() as files:
                _open_av(found, header, AudioStream((), 0, None), files)
        elif header.format == "MP3" and header.frames is None:
            frames = mp3_frames(found)
            header.frames = frames.frames * frames.samples
        return header


def _check_channel(channel: Channel, channels: int) -> None:
    """Raise InputError for a channel that is not there."""
    if channel != "mix" and not 1 <= channel <= channels:
        raise InputError(f"channel is {channel}; expected 1 to {channels}, or mix: the mean of all channels")


def _reason(error: Exception) -> str:
    """What a decoder says about a file."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".") or "the file is damaged there"


# -- samples --------------------------------------------------------------------------------------------------------
# Each reader yields blocks (S, channels) float32.


def _read_pcm(source: Source, header: Header, stream: AudioStream) -> Iterator[np.ndarray]:
    pcm, channels = header.pcm, header.channels
    assert pcm is not None
    assert header.frames is not None
    width = pcm.width * channels
    most = max(1, BLOCK_SAMPLES // channels)
    for first in range(0, header.frames, most):
        count = min(most, header.frames - first)
        data = source.read(pcm.start + first * width, count * width)
        whole = len(data) // width
        yield _as_float(data[: whole * width], pcm.kind, pcm.width, pcm.order).reshape(whole, channels)
        if whole < count:
            stream.lose("the file became shorter while it was read")
            return


def _as_float(data: bytes, kind: str, width: int, order: str) -> np.ndarray:
    """Samples as float32, whole numbers divided so that the lowest is -1."""
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)[:, :: 1 if order == "<" else -1]
        values: np.ndarray = padded.view("<i4")[:, 0]
        width = 4
    else:
        values = np.frombuffer(data, f"{order}{kind}{width}")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is refused later
        samples = values.astype(np.float32)
    if kind == "u":
        samples -= np.float32(128)
    if kind != "f":
        samples *= np.float32(2.0 ** (1 - 8 * width))
    return samples


class _Sound(soundfile.SoundFile):  # type: ignore[misc]
    def seekable(self) -> bool:
        """False: soundfile seeks after each read, which fails in a FLAC of unknown length."""
        return False


def _open_sound(source: Source, header: Header, stream: AudioStream, files: ExitStack) -> Iterator[np.ndarray]:
    """Decode by libsndfile, and compare how far it comes with what the file declares."""
    declared, fault = header.frames, None
    views = [View(source, header.parts)]
    if header.format == "MP3":
        frames = mp3_frames(source)
        views, fault = [View(source, frames.parts)], frames.fault
        if frames.frames + 1 >= (frames.declared or 0):
            declared = None
    elif header.format == "OGG":
        links, fault = ogg_links(source)
        views, declared = [View(source, [link]) for link in links], None
        header.frames = header.frames if len(links) == 1 else None
    elif header.format != "FLAC":  # a guess by the bytes of a second
        declared = None
    try:
        first = files.enter_context(_Sound(_buffered(views[0])))
    except soundfile.LibsndfileError as error:
        raise (AudioError if error.code in UNKNOWN_CODES else DamagedError)(_reason(error)) from None
    header.sample_rate, header.channels = first.samplerate, first.channels

    def read() -> Iterator[np.ndarray]:
        decoded, failed = yield from _read_sound(first, declared)
        for view in views[1:]:
            if failed:
                break
            with ExitStack() as stack:  # closed at once: each takes 100 kB and more
                try:
                    sound = stack.enter_context(_Sound(_buffered(view)))
                except (soundfile.LibsndfileError, RuntimeError) as error:
                    failed = _reason(error)
                    break
                if (sound.samplerate, sound.channels) != (first.samplerate, first.channels):
                    failed = "what follows has another sample rate or number of channels"
                    break
                count, failed = yield from _read_sound(sound, declared)
                decoded += count
        # Behind the end that the header declares, an error is one of a tag or of what else follows.
        if (failed and (declared is None or decoded < declared)) or fault or (declared and header.format == "MP3"):
            stream.lose(_early(decoded, header, failed or fault, declared))
        elif declared is not None and decoded != declared:
            lengths = f"{declared / header.sample_rate:.2f} s, and {decoded / header.sample_rate:.2f} s were read"
            stream.warnings.append(f"the header declares {lengths}: all that the file has")
        elif failed and not ends_with_tag(source):
            stream.warnings.append("more follows after the length that the header declares, and can't be decoded")

    return read()


def _buffered(view: View) -> io.BufferedReader:
    # libmpg123 reads each frame in two steps, and a call of `View` takes as long as decoding it.
    return io.BufferedReader(view, 2**16)


def _read_sound(sound: _Sound, declared: int | None) -> Generator[np.ndarray, None, tuple[int, str | None]]:
    """Decode a file to its end; returns how many frames came, and why there are no more (None: it ends there).

    After an error, nothing beyond the declared length counts: what follows may be another file.
    """
    decoded = 0
    size = max(1, BLOCK_SAMPLES // sound.channels)
    while True:
        # In blocks: reading at once allocates what the header says. After an error, NaN is what was not decoded.
        samples = np.full((size, sound.channels), np.nan, np.float32)
        failed = None
        try:
            samples = samples[: len(sound.read(out=samples))]
        except (soundfile.LibsndfileError, RuntimeError) as error:
            failed = _reason(error)
            missing = np.isnan(samples[:, 0])
            samples = samples[: int(missing.argmax()) if missing.any() else size]
            if declared is not None:
                samples = samples[: max(0, declared - decoded)]
        decoded += len(samples)
        yield samples
        if failed or not len(samples):
            return decoded, failed


def _early(decoded: int, header: Header, reason: str | None, declared: int | None) -> str:
    text = f"the recording ends early, after {decoded / header.sample_rate:.2f} s"
    if declared is not None and declared > decoded:
        text += f" of the {declared / header.sample_rate:.2f} s that its header declares"
    return f"{text}: {reason}" if reason else text


@cache
def _bound_ffmpeg() -> None:
    """Let FFmpeg allocate `AV_BYTES` at once, no more: a kilobyte may declare a table of 80 million packets."""
    import av

    with suppress(AttributeError, OSError):  # other systems than Linux don't find it behind PyAV's own library
        ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(AV_BYTES))


def _open_av(source: Source, header: Header, stream: AudioStream, files: ExitStack) -> Iterator[np.ndarray]:
    """Decode by PyAV, and complete the header."""
    try:
        import av
    except ImportError:
        raise AudioError(f"{header.format} needs PyAV: install it by `pip install 'avex-serve[formats]'`") from None
    if current().limits.seconds < math.inf:
        _bound_ffmpeg()
    try:
        # Only the format that was found: FFmpeg would try hundreds.
        container = files.enter_context(
            av.open(View(source, header.parts), "r", format=AV_FORMATS[header.format], metadata_errors="replace")
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise DamagedError(_reason(error)) from None
    track = next((each for each in container.streams.audio if each.codec_context.name in AV_CODECS), None)
    if track is None or track.codec_context.sample_rate <= 0 or track.codec_context.channels <= 0:
        raise AudioError(f"{header.format} without audio of {', '.join(AV_CODECS)}")
    codec = track.codec_context
    header.sample_rate, header.channels = codec.sample_rate, codec.channels
    if track.duration is not None and track.time_base is not None and header.format != "AAC":  # there it is a guess
        header.frames = round(track.duration * track.time_base * codec.sample_rate)

    def read() -> Iterator[np.ndarray]:
        decoded, failed = 0, None
        packets = container.demux(track)
        to_float = av.AudioResampler(format="fltp", layout=codec.layout)
        while failed is None:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except (av.error.FFmpegError, ValueError) as error:
                failed = _reason(error)
                break
            if packet is None:
                break
            for frame in frames:
                if (frame.sample_rate, frame.layout.nb_channels) != (header.sample_rate, header.channels):
                    failed = "what follows has another sample rate or number of channels"
                    break
                for planar in to_float.resample(frame):
                    decoded += planar.samples
                    yield planar.to_ndarray().T  # (S, channels) float32
        if failed or (header.frames or 0) > decoded + AV_SLACK:
            stream.lose(_early(decoded, header, failed, header.frames))

    return read()


# -- from channels to one -------------------------------------------------------------------------------------------


def _mixed(
    blocks: Iterator[np.ndarray],
    source: Source,
    header: Header,
    stream: AudioStream,
    channel: Channel,
    name: str,
) -> Iterator[Wave]:
    """The blocks (S, channels) as one channel (S,), checked; the stream gets the warnings about all of it."""
    request = current()
    frames = silent = 0  # in all, and the zeros that end what was read
    power = np.zeros(2)  # of the mix, and the mean of that of the channels
    blocks = iter(blocks)
    while True:
        request.checkpoint()
        with stage(DECODE):
            samples = next(blocks, None)
            if samples is None:
                break
            if not len(samples):
                continue
            frames += len(samples)
            request.limits.check_recording(frames, samples.shape[1], header.sample_rate)
            wave = _downmix(samples) if channel == "mix" else np.ascontiguousarray(samples[:, channel - 1])
            _check_wave(wave, name)
            if channel == "mix" and samples.shape[1] > 1:
                power += _power(wave[::SAMPLED]), _power(samples[::SAMPLED])
            silent = silent + len(wave) if not wave[-1] and not wave.any() else _zeros_at_end(wave)
        yield wave
    if not frames:
        reason = "; ".join(["", *stream.warnings])
        raise AudioError(
            f"{name} {'is truncated: it ' * stream.partial}has no samples; expected at least one{reason}"
        )
    if source.changed:
        stream.warnings.append("the file changed while it was read; what it was at the start was read")
    if power[1] > 0 and power[0] < CANCELLED * power[1]:
        stream.lose(
            "the channels cancel each other: nearly nothing is left of them once they are mixed; choose one by the "
            "option channel, e.g. channel=1"
        )
    rate = header.sample_rate
    if silent >= rate and silent * 10 >= frames:
        part = "the whole recording is" if silent == frames else f"the last {silent / rate:.2f} s are"
        stream.warnings.append(f"{part} digital silence: every sample is 0")


def _zeros_at_end(wave: Wave) -> int:
    return 0 if wave[-1] else int((wave[::-1] != 0).argmax())


def _power(samples: np.ndarray) -> float:
    """Mean over the channels of the sum of squares about the mean: (S, channels) or (S,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.mean([np.var(column) * len(column) for column in samples.reshape(len(samples), -1).T]))


def _downmix(samples: np.ndarray) -> Wave:
    """Mean over channels: (S, channels) → (S,) float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # `_check_wave` refuses the result
        # Channel by channel: a mean over so short an axis takes numpy twenty times as long.
        total: Wave = samples[:, 0].copy()
        for channel in range(1, samples.shape[1]):
            total += samples[:, channel]
        if samples.shape[1] > 1:
            total /= np.float32(samples.shape[1])
    return total


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
