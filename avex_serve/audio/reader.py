"""From bytes to a mono waveform: decoded by libsndfile."""

import io
import os
from pathlib import Path
from typing import Final, Literal

import numpy as np
import soundfile

from avex_serve.audio.waveform import Recording, Wave, check_wave, downmix
from avex_serve.errors import AudioError, NotFoundError
from avex_serve.scheduling import allowance
from avex_serve.scheduling.stages import DECODE, stage

BLOCK_SAMPLES: Final = 2**20  # of all channels; 22 s at 48 kHz, mono
UNKNOWN_FRAMES: Final = 2**63 - 1  # libsndfile's count for streams whose header doesn't say
# Sizes from here on mean that the writer didn't know: it wrote 2 or 4 GiB, or a little less.
STREAMED: Final = 0x7FFF0000


@stage(DECODE)
def decode(source: bytes | str | os.PathLike[str]) -> Recording:
    """Decode an encoded recording (WAV, FLAC, OGG, MP3: what libsndfile reads) and mix it down to mono.

    Args:
        source: the encoded bytes, or the path of a file.

    Returns:
        wave (S,) float32 and its sample rate in Hz.

    Raises:
        NotFoundError: no such file.
        AudioError: empty, not audio, truncated within the header, no samples, or samples that are not finite.
        TooLargeError: longer or larger than the current allowance has it.
    """
    if isinstance(source, bytes):
        return _decode(_Bytes(source), "the audio", len(source))
    path = Path(source)
    try:
        if not path.is_file():
            raise NotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"{path}: no such file")
        # By descriptor, since libsndfile takes anything for audio whose name ends in .raw, .vox or .gsm.
        with path.open("rb") as file:
            return _decode(file.fileno(), str(path), path.stat().st_size)
    except OSError as error:
        raise AudioError(f"{path} can't be read: {error.strerror}") from None


def _decode(file: io.BytesIO | int, name: str, size: int) -> Recording:
    if size == 0:
        raise AudioError(f"{name} is empty (0 bytes); expected an encoded recording such as WAV or FLAC")
    head = file.getvalue()[:8] if isinstance(file, io.BytesIO) else os.pread(file, 8, 0)
    if (declared := _declared_size(head)) is not None and declared > size:
        raise AudioError(
            f"{name} is truncated: {size} bytes of the {declared} that its header promises; send it whole"
        )
    try:
        with soundfile.SoundFile(file, closefd=False) as sound:
            wave, sample_rate = _read_mono(sound), int(sound.samplerate)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = getattr(error, "error_string", error)  # without the address of a BytesIO
        raise AudioError(
            f"{name} can't be decoded ({reason}); expected WAV, FLAC, OGG (Vorbis, Opus) or MP3"
        ) from None
    return Recording(check_wave(wave, name), sample_rate)


def _declared_size(head: bytes) -> int | None:
    """Bytes of a RIFF (WAV) or FORM (AIFF) file as its header says, None if it doesn't: writers of streams can't."""
    order: Literal["little", "big"] | None = {b"RIFF": "little", b"FORM": "big"}.get(head[:4])  # type: ignore[assignment]
    if order is None or len(head) < 8:
        return None
    declared = int.from_bytes(head[4:], order) + 8
    return None if declared >= STREAMED else declared


def _read_mono(sound: soundfile.SoundFile) -> Wave:
    granted = allowance.current()
    promised = 0 if sound.frames == UNKNOWN_FRAMES else sound.frames
    granted.check_recording(promised, sound.channels, sound.samplerate)
    # In blocks: reading at once allocates what the header promises, terabytes in a damaged FLAC or MP3.
    wave = np.empty(0, np.float32)
    size = max(1, BLOCK_SAMPLES // sound.channels)
    while len(samples := sound.read(size, dtype="float32", always_2d=True)):  # (frames, channels)
        start, frames = wave.size, wave.size + len(samples)
        granted.check_recording(frames, sound.channels, sound.samplerate)
        granted.checkpoint()
        wave.resize(frames, refcheck=False)  # in place: blocks that are joined at the end take twice as much
        wave[start:] = downmix(samples)
    return wave


class _Bytes(io.BytesIO):
    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Stay where it is instead of raising: libsndfile seeks before the start of damaged files.

        soundfile would print the exception with its traceback, and libsndfile sees by the position that it failed.
        """
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()
