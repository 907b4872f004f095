"""Decoding, downmixing and resampling, against soundfile, soxr and numpy themselves."""

import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

import avex_serve
from avex_serve.audio.reader import RATES, decode, resample, resample_blocks, resampled_size
from avex_serve.errors import AudioError, InputError, NotFoundError
from tests.answers import program

CONTAINERS = {
    "WAV": ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"],
    "FLAC": ["PCM_16", "PCM_24"],
    "OGG": ["VORBIS", "OPUS"],
    "MP3": ["MPEG_LAYER_III"],
    "AIFF": ["PCM_16"],
}
# libsndfile writes these losslessly, up to the rounding of their subtype.
STEP = {"PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23, "PCM_32": 2**-24, "FLOAT": 2**-24, "DOUBLE": 2**-24}
FORMATS = [
    pytest.param(container, subtype, channels, rate, id=f"{container}-{subtype}-{channels}ch-{rate}")
    for container, subtypes in CONTAINERS.items()
    for subtype in subtypes
    for channels in (1, 2, 4)
    for rate in (8000, 16000, 22050, 44100, 48000, 96000)
    if not (subtype == "MPEG_LAYER_III" and (channels > 2 or rate == 96000))
    and not (subtype == "OPUS" and rate not in (8000, 16000, 48000))
    and not (container == "AIFF" and rate != 44100)
]


def tone(seconds, rate, channels):
    """(S, channels): another sine in each channel."""
    times = np.arange(int(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * 220 * (c + 1) * times + c) for c in range(channels)], axis=1)


def encode(samples, rate, container="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def wav(data, rate=16000, channels=1, promised=None, code=3, bits=32):
    """A WAV written by hand, so that it may lie."""
    promised = len(data) if promised is None else promised
    width = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, code, channels, rate, (rate * width) % 2**32, width, bits)
    return (
        struct.pack("<4sI4s", b"RIFF", min(promised + 36, 2**32 - 1), b"WAVE")
        + form
        + b"data"
        + struct.pack("<I", promised)
        + data
    )


GOOD = encode(tone(0.1, 16000, 2), 16000)
FLAC = encode(tone(0.1, 16000, 1), 16000, "FLAC")


@pytest.mark.parametrize(("container", "subtype", "channels", "rate"), FORMATS)
def test_decodes_what_soundfile_decodes(tmp_path, container, subtype, channels, rate):
    samples = tone(0.2, rate, channels)
    data = encode(samples, rate, container, subtype)
    path = tmp_path / f"recording.{container.lower()}"
    path.write_bytes(data)
    recording = decode(data)
    expected, expected_rate = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    assert recording.sample_rate == expected_rate == rate
    assert recording.wave.dtype == np.float32
    assert recording.wave.shape == (len(expected),)
    np.testing.assert_allclose(recording.wave, expected.mean(axis=1), atol=2e-7)
    if subtype in STEP:
        np.testing.assert_allclose(recording.wave, samples.mean(axis=1), atol=STEP[subtype])
    for source in (path, str(path)):
        again = decode(source)
        assert again.sample_rate == rate
        np.testing.assert_array_equal(again.wave, recording.wave)


def test_a_long_recording_is_decoded_whole():
    # More than one block of 2**20 frames.
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (2**21 + 12345, 2), dtype=np.int16)
    recording = decode(encode(samples, 48000, "FLAC", "PCM_16"))
    np.testing.assert_allclose(recording.wave, (samples / 2**15).mean(axis=1), atol=1e-7)


def test_the_content_decides_and_not_the_name(tmp_path):
    for name in ("sound.raw", "sound.vox", "sound.gsm", "sound.flac", "sound", "zaunkönig 夜鶯 🐦.wav"):
        (tmp_path / name).write_bytes(GOOD)
        np.testing.assert_array_equal(decode(tmp_path / name).wave, decode(GOOD).wave)
        (tmp_path / name).write_bytes(b"this is no audio, whatever its name says\n" * 50)
        with pytest.raises(AudioError, match="can't be decoded"):
            decode(tmp_path / name)


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/z\xe4.wav")
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(GOOD)
    np.testing.assert_array_equal(decode(path).wave, decode(GOOD).wave)


def test_size_of_what_is_resampled():
    for samples in (1, 2, 3, 7, 100, 999, 44099, 44100, 44101, 123_457):
        for rate in (100, 101, 8000, 11025, 16000, 22050, 44100, 48000, 96000, 192_000, 384_000):
            for target in (8000, 16000, 22050, 32000, 48000):
                if rate / 2 <= samples * target < 2**20 * rate:
                    resampled = soxr.resample(np.zeros(samples, np.float32), rate, target, quality="HQ")
                    assert resampled_size(samples, rate, target) == resampled.size, (samples, rate, target)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000, 250_000])
@pytest.mark.parametrize("target", [16000, 32000])
def test_resamples_as_soxr_hq(rate, target):
    wave = tone(0.5, rate, 1)[:, 0].astype(np.float32)
    resampled = resample(wave, rate, target)
    assert resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled, soxr.resample(wave, rate, target, quality="HQ"))
    assert abs(resampled.size - 0.5 * target) <= 1
    # The tone itself is the oracle, away from the edges.
    middle = slice(target // 10, 4 * target // 10)
    np.testing.assert_allclose(resampled[middle], tone(0.5, target, 1)[middle, 0], atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000, 192_000, 250_000, 312_500])
def test_a_stream_is_resampled_as_the_whole(rate):
    random = np.random.default_rng(rate)
    for size in (20, 1000, 54_321, 400_000):
        wave = random.normal(size=size).astype(np.float32)
        expected = soxr.resample(wave, rate, 16000, quality="HQ")
        for count in (1, 2, 30):
            blocks = np.split(wave, np.sort(random.integers(0, size + 1, count)))
            np.testing.assert_array_equal(np.concatenate(list(resample_blocks(blocks, rate, 16000))), expected)


def test_the_same_rate_is_left_alone():
    wave = tone(0.1, 16000, 1)[:, 0].astype(np.float32)
    assert resample(wave, 16000, 16000) is wave


@pytest.mark.parametrize("rate", [0, -16000, 1, RATES[0] - 1, RATES[1] + 1, float("inf"), float("nan")])
def test_refuses_a_rate_that_no_recorder_has(rate):
    with pytest.raises(AudioError, match=r"sample rate .*; expected 100 to 10000000 Hz"):
        resample(np.zeros(1000, np.float32), rate, 16000)


def test_refuses_less_than_a_sample():
    with pytest.raises(AudioError, match="1 samples at 96000 Hz are less than one at 16000 Hz"):
        resample(np.zeros(1, np.float32), 96000, 16000)


# libsndfile opens many more formats than we document. What it finds in this one it prints on the standard output.
SAMPLE_DUMP = bytes.fromhex("f07e00010000184850020045580c1b553823100a31") + bytes(range(128)) * 25
TAG = b"ID3\4\0\0\0\0\0\4\0\0\0\0"

BAD = {
    "sample dump": (SAMPLE_DUMP, "can't be decoded"),
    "sample dump behind a tag": (TAG + SAMPLE_DUMP, "can't be decoded"),
    "tags": (TAG * 100_000, "can't be decoded"),
    "half a tag": (TAG[:7], "can't be decoded"),
    "IFF of another kind": (b"FORM\0\0\0\48SVX", "can't be decoded"),
    "AVI": (b"RIFF\4\0\0\0AVI ", "can't be decoded"),
    "empty": (b"", "is empty"),
    "text": (b"this is no audio", "can't be decoded"),
    "long text": (b"no audio here either, only words. " * 1000, "can't be decoded"),
    "json": (b'{"audio": [0, 1]}', "can't be decoded"),
    "a program": (program(), "unknown format"),
    "a program behind a tag": (TAG + program(), "unknown format"),
    "text in UTF-16": ("no audio here either".encode("utf-16") * 100, "unknown format"),
    "null bytes": (bytes(5000), "holds nothing but zeros"),
    "cut in the RIFF header": (
        GOOD[:10],
        "is truncated: the file ends within its header); it is damaged or incomplete",
    ),
    "cut in the format chunk": (GOOD[:20], "copy or download it again"),
    "cut before the samples": (GOOD[:44], "is truncated"),
    "cut in the last sample": (GOOD[:-1], "is truncated"),
    "flac cut in the header": (FLAC[:20], "copy or download it again"),
    "flac cut before the samples": (FLAC[:50], "copy or download it again"),
    "ogg cut in the header": (encode(tone(0.1, 16000, 1), 16000, "OGG")[:40], "copy or download it again"),
    "aiff cut in the header": (encode(tone(0.1, 16000, 1), 16000, "AIFF")[:30], "is truncated"),
    "no samples": (encode(np.zeros((0, 1)), 16000), "has no samples"),
    "no samples in flac": (encode(np.zeros((0, 1)), 16000, "FLAC"), ""),
    "NaN": (wav(np.array([0, np.nan], "<f4").tobytes()), "NaN or infinite"),
    "infinity": (wav(np.array([0, np.inf], "<f4").tobytes()), "NaN or infinite"),
    "opposite infinities": (wav(np.array([np.inf, -np.inf], "<f4").tobytes(), channels=2), "NaN or infinite"),
    "a sum beyond float32": (wav(np.array([3e38, 3e38], "<f4").tobytes(), channels=2), "NaN or infinite"),
    "beyond float32": (wav(np.array([1e300], "<f8").tobytes(), bits=64), "NaN or infinite"),
    "no channels": (wav(bytes(100), channels=0), "can't be decoded"),
    "codec unknown": (wav(bytes(100), code=0x7777), "or convert it if other programs play it"),
}


@pytest.mark.parametrize(("data", "expected"), BAD.values(), ids=BAD)
def test_refuses_what_is_not_audio(tmp_path, capfd, data, expected):
    path = tmp_path / "bad.wav"
    path.write_bytes(data)
    for source, name in ((data, "the audio"), (path, str(path)), (str(path), str(path))):
        with pytest.raises(AudioError) as caught:
            decode(source)
        assert str(caught.value).startswith(name)
        assert expected in str(caught.value)
        assert "0x" not in str(caught.value), "an object's address tells a user nothing"
        assert (caught.value.http_status, caught.value.exit_code) == (400, 2)
    assert capfd.readouterr() == ("", ""), "no traceback from a callback, and no message of libsndfile"


def test_tags_in_front():
    """ID3 tags, whose size is written in seven bits a byte."""
    mp3 = encode(tone(0.2, 16000, 1), 16000, "MP3")
    large = b"ID3\4\0\0\0\0\2\4" + bytes(2 * 128 + 4)
    for tags in (TAG, TAG + large, large * 7):
        np.testing.assert_array_equal(decode(tags + mp3).wave, decode(mp3).wave)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024, 0])
def test_a_stream_that_could_not_know_its_size_is_decoded(size):
    streamed = GOOD[:4] + size.to_bytes(4, "little") + GOOD[8:]
    np.testing.assert_array_equal(decode(streamed).wave, decode(GOOD).wave)


def test_refuses_every_truncation_or_decodes_what_is_there():
    for container in ("WAV", "FLAC", "OGG", "MP3", "AIFF"):
        data = encode(tone(0.1, 16000, 1), 16000, container)
        whole = decode(data).wave
        for size in range(1, len(data), max(1, len(data) // 40)):
            try:
                wave = decode(data[:size]).wave
            except AudioError:
                continue
            assert container not in ("WAV", "AIFF"), "their headers say how long they are"
            assert 0 < wave.size <= whole.size + 1152  # a frame of MP3


def test_missing_files_and_folders(tmp_path):
    for path, expected in (
        (tmp_path / "none.wav", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "a" / "b", "no such"),
    ):
        with pytest.raises(NotFoundError) as caught:
            decode(path)
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="can't be read: File name too long"):
        decode("n" * 5000)


def promising_flac(data):
    """The FLAC with a header that promises 2**36 samples."""
    return data[:21] + bytes([data[21] | 15]) + b"\xff" * 4 + data[26:]


@pytest.mark.parametrize(
    ("data", "samples"),
    [
        (wav(np.full(100, 0.5, "<f4").tobytes(), promised=2**32 - 40), 100),
        (wav(np.full(100, 0.5, "<f4").tobytes(), promised=2**31, channels=50), 2),
        (wav(np.full(1024, 0.5, "<f4").tobytes(), promised=2**32 - 40, channels=1024), 1),
        (promising_flac(FLAC), None),
    ],
    ids=["wav", "channels", "many channels", "flac"],
)
def test_memory_follows_what_is_there_and_not_what_the_header_promises(data, samples):
    tracemalloc.start()
    try:
        wave = decode(data).wave
        assert samples is None or wave.tolist() == [0.5] * samples
    except AudioError:
        assert samples is None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 * 2**20


# -- the public function --------------------------------------------------------------------------------------------


class OneWay(io.RawIOBase):
    """A binary file that can't seek and returns a few bytes at once, as a download does."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self._data.read(min(size, 1000) if size >= 0 else size)


@pytest.fixture
def stereo(tmp_path):
    """A path, and the samples of its two channels."""
    samples = np.random.default_rng(3).integers(-(2**15), 2**15, (5000, 2)).astype(np.int16)
    path = tmp_path / "a: stereo.wav"
    soundfile.write(path, samples, 44100)
    return path, samples / np.float32(2**15)


def test_whatever_holds_a_recording_is_decoded_alike(stereo):
    path, samples = stereo
    data = path.read_bytes()
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        sources = [
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            file,
            raw,
            io.BytesIO(data),
            OneWay(data),
        ]
        for source in sources:
            wave, rate = avex_serve.decode(source)
            assert (rate, wave.dtype, wave.shape) == (44100, np.float32, (5000,))
            np.testing.assert_allclose(wave, samples.mean(axis=1), rtol=0, atol=1e-7)


def test_each_channel_is_decoded(stereo):
    path, samples = stereo
    for channel in (1, 2):
        np.testing.assert_array_equal(avex_serve.decode(path, channel=channel).wave, samples[:, channel - 1])
    with pytest.raises(InputError, match="channel is 3; expected 1 to 2"):
        avex_serve.decode(path, channel=3)


def test_a_file_is_read_from_its_position_on(stereo):
    path, _ = stereo
    file = io.BytesIO(b"some bytes" + path.read_bytes())
    file.seek(10)
    assert avex_serve.decode(file).wave.size == 5000


def test_files_that_hold_no_bytes(stereo):
    path, _ = stereo
    with path.open(encoding="latin-1") as text, pytest.raises(AudioError, match="can't be read as bytes"):
        avex_serve.decode(text)
    with path.open("rb") as closed:
        pass
    with pytest.raises(AudioError, match=r"can't be read as bytes: .*closed file"):
        avex_serve.decode(closed)
    with pytest.raises(AudioError, match="can't be read as bytes"):
        avex_serve.decode(np.zeros(3))
