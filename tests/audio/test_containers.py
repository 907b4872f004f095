"""Recordings whose headers, contents and lengths disagree: read as far as they are whole, and said so."""

import builtins
import io
import os
import struct
import subprocess
import sys
import weakref
import zlib

import numpy as np
import pytest
import soundfile

from avex_serve.audio import containers, reader
from avex_serve.audio.reader import decode, describe, open_audio
from avex_serve.errors import AudioError, InputError
from avex_serve.scheduling.request import Request, answering

RATE = 48000
SECONDS = 4
WAVE = np.random.default_rng(0).normal(0, 0.05, SECONDS * RATE).astype(np.float32)
PLAIN = (WAVE * 2**15).astype("<i2").tobytes()
FMT = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16)


def encode(container, subtype=None, wave=WAVE, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=container, subtype=subtype, **options)
    return file.getvalue()


def read(source, **options):
    """Samples, sample rate and the stream once it is read."""
    with open_audio(source, **options) as stream:
        wave = np.concatenate(list(stream))
    assert stream.samples == wave.size
    return wave, stream


def riff(data_size, data=PLAIN, riff_size=None, kind=b"RIFF", chunks=FMT, after=b""):
    riff_size = len(chunks) + 12 + data_size if riff_size is None else riff_size
    head = struct.pack("<4sI4s", kind, riff_size % 2**32, b"WAVE") + chunks
    return head + struct.pack("<4sI", b"data", data_size) + data + after


def ds64(size):
    return struct.pack("<4sIQQQI", b"ds64", 28, size + 72, size, size // 2, 0)


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOICMT" + struct.pack("<I", 14) + b"of no interest"
SIZE = len(PLAIN)
WHOLE = {
    "right": (riff(SIZE), None),
    "a chunk behind": (riff(SIZE, after=LIST), None),
    "a LIST of zeros in front": (riff(SIZE, chunks=FMT + b"LIST" + struct.pack("<I", 400) + bytes(400)), None),
    "a wrong block align": (riff(SIZE, chunks=FMT[:20] + struct.pack("<HH", 7, 16)), None),
    "an odd chunk without padding": (riff(SIZE, chunks=b"junk" + struct.pack("<I", 3) + b"abc" + FMT), None),
    "RIFF size too large": (riff(SIZE, riff_size=SIZE + 44), None),
    "both sizes 44 too large": (riff(SIZE + 44), "declares 44 bytes more"),
    "0": (riff(0), "never finished"),
    "0 in both": (riff(0, riff_size=0), "never finished"),
    "0xFFFFFFFF": (riff(0xFFFFFFFF), "never finished"),
    "0x7FFFF000": (riff(0x7FFFF000), "never finished"),
    "0x80000000": (riff(0x80000000), "never finished"),
    "preallocated": (riff(0, data=PLAIN + bytes(100_000)), "100000 bytes of the file are zeros"),
    "far too small": (riff(2000), "declares 0.02 s, and the file goes on"),
    "zeros behind": (riff(SIZE, after=bytes(100_000)), None),
    "RF64": (riff(0xFFFFFFFF, kind=b"RF64", riff_size=0xFFFFFFFF, chunks=ds64(SIZE) + FMT), None),
    "BW64": (riff(0xFFFFFFFF, kind=b"BW64", riff_size=0xFFFFFFFF, chunks=ds64(SIZE) + FMT), None),
    "RF64 with another size of the chunk": (riff(0x00FFFFFF, kind=b"RF64", chunks=ds64(SIZE) + FMT), None),
    "RF64 to a pipe": (riff(0xFFFFFFFF, kind=b"RF64", chunks=ds64(0) + FMT), "never finished"),
    "zeros in front": (bytes(5000) + riff(SIZE), None),
}


@pytest.mark.parametrize(("data", "warning"), WHOLE.values(), ids=WHOLE)
def test_a_wav_is_read_whole_whatever_its_header_says(tmp_path, data, warning):
    (tmp_path / "a.wav").write_bytes(data)
    for source in (data, tmp_path / "a.wav"):
        wave, stream = read(source)
        np.testing.assert_array_equal(wave, np.frombuffer(PLAIN, "<i2") / np.float32(2**15))
        assert not stream.partial
        assert not stream.warnings if warning is None else any(warning in each for each in stream.warnings)
    np.testing.assert_array_equal(decode(data).wave, wave)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *(
            ("WAV", each)
            for each in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
        ),
        *(("WAVEX", "PCM_24"), ("W64", "PCM_16"), ("W64", "FLOAT"), ("RF64", "PCM_24"), ("AIFF", "PCM_24")),
        *(("AIFF", "FLOAT"), ("AIFF", "PCM_S8"), ("AU", "PCM_16"), ("AU", "DOUBLE"), ("CAF", "PCM_24")),
        *(("CAF", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_recording_is_read_as_by_soundfile_and_a_cut_one_as_far_as_it_is_whole(container, subtype, channels):
    samples = np.stack([WAVE, WAVE[::-1]][:channels], axis=1)
    data = encode(container, subtype, samples)
    expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].mean(axis=1)
    wave, stream = read(data)
    np.testing.assert_allclose(wave, expected, atol=1e-7)
    assert (stream.warnings, stream.partial) == ([], False)
    cut, stream = read(data[: len(data) * 3 // 4])
    assert stream.partial
    (warning,) = stream.warnings
    assert "ends early" in warning
    assert 0.65 * wave.size < cut.size < 0.8 * wave.size
    if subtype not in ("OPUS", "VORBIS", "MPEG_LAYER_III", "IMA_ADPCM"):  # their last block has an overlap
        np.testing.assert_array_equal(cut, wave[: cut.size])
    with pytest.raises(AudioError, match=r"is truncated.*ends early"):
        decode(data[: len(data) * 3 // 4])


def with_total(data, total):
    return data[:21] + (int.from_bytes(data[21:26], "big") >> 36 << 36 | total).to_bytes(5, "big") + data[26:]


@pytest.mark.parametrize("total", [0, WAVE.size // 3, WAVE.size * 101 // 100, 2 * WAVE.size, 2**36 - 1])
def test_a_flac_is_read_to_its_end_whatever_its_header_says(total):
    whole = encode("FLAC")
    wave, stream = read(with_total(whole, total))
    np.testing.assert_array_equal(wave, decode(whole).wave)
    assert not stream.partial
    assert len(stream.warnings) == 1


def test_a_damaged_flac_is_read_to_the_damage_and_tags_behind_it_do_no_harm():
    whole = encode("FLAC")
    damaged = whole[: len(whole) // 2] + b"\x55" * 50 + whole[len(whole) // 2 + 50 :]
    wave, stream = read(damaged)
    np.testing.assert_array_equal(wave, decode(whole).wave[: wave.size])
    assert 0.4 < wave.size / WAVE.size < 0.6
    assert stream.partial
    assert read(whole + b"TAG" + bytes(125))[1].warnings == []


def test_what_follows_a_recording_is_named_unless_it_is_a_tag():
    flac = encode("FLAC")
    for data, warning in (
        (riff(SIZE, after=riff(SIZE)), "another recording (RIFF) follows"),
        (flac + flac, "more follows after the length that the header declares"),
        (riff(SIZE, after=b"LIST" + struct.pack("<I", 5000) + b"INFOcut"), None),
        (riff(SIZE, after=b"TAG" + bytes(125)), None),
        (flac + bytes(9999), None),
    ):
        wave, stream = read(data)
        assert wave.size == WAVE.size
        assert not stream.warnings if warning is None else warning in stream.warnings[0]


@pytest.mark.parametrize(
    ("container", "field", "size"), [("AIFF", b"SSND", 4), ("CAF", b"data", 8), ("W64", b"data", 8)]
)
def test_other_containers_of_unknown_length(container, field, size):
    data = encode(container, "PCM_16")
    at = data.find(field) + (16 if container == "W64" else 4)
    for unknown in (bytes(size), b"\xff" * size):
        wave, stream = read(data[:at] + unknown + data[at + size :])
        np.testing.assert_array_equal(wave, decode(data).wave)
        assert "never finished" in stream.warnings[0]


def test_an_ogg_of_several_streams():
    for subtype in ("VORBIS", "OPUS"):
        one = encode("OGG", subtype)
        wave, stream = read(one + one)
        np.testing.assert_array_equal(wave, np.tile(decode(one).wave, 2))
        assert stream.warnings == []
    other = encode("OGG", wave=WAVE[:16000], rate=16000)
    wave, stream = read(one + other)
    assert wave.size == WAVE.size
    assert "another sample rate" in stream.warnings[0]


def test_an_ogg_of_thousands_of_streams_is_read_to_a_bound(monkeypatch):
    """Each stream takes 100 kB while it is decoded, and a page of 28 bytes may begin one."""
    one = encode("OGG", wave=WAVE[:1000])
    opened = []
    monkeypatch.setattr(reader, "_Sound", lambda file: opened.append(weakref.ref(found := sound(file))) or found)
    sound = reader.soundfile.SoundFile
    wave, stream = read(one * 1100)
    assert wave.size == 1000 * 1000
    assert "more than 1000 streams follow" in stream.warnings[0]
    assert len(opened) == 1000
    assert sum(each() is not None for each in opened) <= 1, "the others are closed"

    wave, stream = read(one + b"".join(page(serial) for serial in range(5, 2000)))
    assert wave.size == 1000
    assert "more than 1000 streams at once" in stream.warnings[0]


def page(serial):
    """A page of OGG that continues another stream."""
    data = b"OggS\0\0" + struct.pack("<qIIIB", 0, serial, 0, 0, 1) + b"\1\0"
    flipped = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    value = (zlib.crc32(data.translate(flipped), 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "big").translate(flipped)
    return data[:22] + value + data[26:]


def test_a_damaged_ogg_is_read_to_the_damage():
    """libsndfile drops a page with a wrong checksum, and all that follows would be at a wrong time."""
    whole = encode("OGG")
    for at, reason in (
        (len(whole) // 2, "a page is damaged"),
        (whole.rfind(b"OggS", 0, -9000), "a page is missing"),
    ):
        damaged = bytearray(whole)
        if "missing" in reason:
            del damaged[at : whole.find(b"OggS", at + 1)]
        else:
            damaged[at] ^= 255
        wave, stream = read(bytes(damaged))
        assert wave.size < WAVE.size
        assert reason in stream.warnings[0]


def test_an_mp3_is_read_to_its_end(capfd):
    for rate in (16000, 22050, 44100, 48000):
        wave = WAVE[: 3 * rate]
        data = encode("MP3", wave=wave, rate=rate, bitrate_mode="VARIABLE")
        whole = decode(data).wave
        info = data.find(b"\xff", 4)
        while data[info : info + 2] != data[:2]:
            info = data.find(b"\xff", info + 1)
        assert abs(read(data[info:])[0].size - wave.size) < 3000, "without the frame that counts the others"
        two, stream = read(data + data)
        assert abs(two.size - 2 * wave.size) < 3500
        np.testing.assert_allclose(two[: whole.size - 3000], whole[:-3000], atol=1e-6)
        for other in (data + b"TAG" + bytes(125), bytes(1500) + data, b"ID3\4\0\0\0\0\0\4\0\0\0\0" + data):
            again, stream = read(other)
            np.testing.assert_array_equal(again, whole)
            assert stream.warnings == []
    middle, stream = read(data[: len(data) // 2] + b"no sound " * 1000 + data[len(data) // 2 :])
    assert stream.partial
    assert 0.4 < middle.size / whole.size < 0.6
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [0.3, 4])
def test_an_mp3_within_other_data(seconds):
    """As of a recorder that began within a frame, or that lost a part: frames are most of it, or a long run."""
    wave = WAVE[: int(seconds * RATE)]
    data = encode("MP3", wave=wave, rate=16000)
    count = containers._frame(data[1], data[2]).size
    plain = data[count:]  # without the frame that counts the others
    whole, stream = read(plain)
    assert stream.warnings == []
    noise = np.random.default_rng(0).integers(0, 255, 300_000).astype(np.uint8).tobytes()
    for other in (noise[:500] + plain, plain[7:], bytes(50_000) + plain, plain + b"TAG" + bytes(125)):
        again, stream = read(other)
        assert abs(again.size - whole.size) <= 2 * 1152
        assert stream.warnings == []
    cut, stream = read(plain[: len(plain) // 2])
    assert cut.size > 0.3 * whole.size
    assert "its last frame is cut" in stream.warnings[0]
    if seconds == 4:
        for other in (noise[:60_000] + plain + noise, plain[:1000] + noise[:20_000] + plain[1000:]):
            again, stream = read(other)
            assert again.size > 0
            assert "the recording ends early" in stream.warnings[0]
    else:
        with pytest.raises(AudioError, match="unknown format"):
            read(noise[:30_000] + plain + noise)


def test_a_file_that_ends_within_a_tag():
    tag = b"ID3\4\0\0\0\0\x20\0" + bytes(4096)
    for data in (tag, (tag + encode("MP3", rate=16000))[:3000]):
        with pytest.raises(AudioError, match="truncated: the file ends within the tag in front of the audio"):
            read(data)


def test_an_mp3_in_pieces():
    """As segments of a stream that were put together, with tags between them."""
    wave = WAVE[:RATE]
    data = encode("MP3", wave=wave, rate=16000)
    pieces, rest = [], data
    while rest:
        size = containers._frame(rest[1], rest[2]).size
        pieces.append(rest[:size])
        rest = rest[size:]
    tag = b"ID3\4\0\0\0\0\0\0"
    whole, _ = read(data)
    tagged, stream = read(tag.join(pieces))
    np.testing.assert_array_equal(tagged, whole)
    assert stream.warnings == []
    long, stream = read(tag.join(pieces[1:] * 20))
    early = f"the recording ends early, after {long.size / 16000:.2f} s"
    assert stream.warnings == [f"{early}: other data divides it into more than 1000 pieces"]
    assert stream.partial
    with answering(Request(seconds=10)):
        tagged, stream = read(data + tag * 200_000 + data)
    assert tagged.size > 1.9 * whole.size
    assert stream.warnings == []


@pytest.mark.parametrize("rate", [8000, 192_000, 250_000, 312_500, 384_000, 500_000])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_rates_and_channels_of_recorders(rate, channels):
    samples = np.random.default_rng(rate).normal(0, 0.1, (2000, channels))
    for container in ("WAV", "W64", "RF64"):
        data = encode(container, "PCM_16", samples, rate)
        wave, stream = read(data)
        assert stream.sample_rate == rate
        np.testing.assert_allclose(wave, samples.mean(axis=1), atol=2**-15)
        for channel in range(1, channels + 1):
            np.testing.assert_allclose(read(data, channel=channel)[0], samples[:, channel - 1], atol=2**-15)
        with pytest.raises(InputError, match=f"channel is 9; expected 1 to {channels}, or mix"):
            read(data, channel=9)


def sparse(path, head, size, sound_at):
    """A file of that size with noise at one place."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
        file.seek(len(head) + sound_at)
        file.write(PLAIN)


@pytest.mark.parametrize("kind", ["RF64", "W64", "wrapped"])
def test_a_file_beyond_4_gib_is_found_whole(tmp_path, kind):
    """Without reading all of it: hours at 500 kHz in eight channels."""
    size = 5 * 2**30
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 8, 500_000, 8_000_000, 16, 16)
    if kind == "RF64":
        head = riff(0xFFFFFFFF, b"", kind=b"RF64", chunks=ds64(size) + form)
    elif kind == "W64":
        tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of the GUIDs of chunks
        head = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + struct.pack("<Q", size + 104)
        head += b"wave" + tail + b"fmt " + tail + struct.pack("<Q", 40) + form[8:]
        head += b"data" + tail + struct.pack("<Q", size + 24)
    else:
        head = riff(size % 2**32, b"", chunks=form)
    path = tmp_path / "long.wav"
    sparse(path, head, size, size - SIZE)
    header = describe(path)
    assert header.frames == size // 16
    assert header.channels == 8
    assert (header.warnings == []) == (kind != "wrapped")
    with open_audio(path) as stream:
        assert stream.frames == size // 16
        assert not next(iter(stream)).any()


def test_channels_that_cancel_each_other():
    data = encode("WAV", "FLOAT", np.stack([WAVE, -WAVE], axis=1))
    wave, stream = read(data)
    assert not wave.any()
    assert "channels cancel each other" in stream.warnings[0]
    np.testing.assert_array_equal(read(data, channel=2)[0], -WAVE)
    assert read(data, channel=2)[1].warnings == []
    assert read(encode("WAV", wave=np.stack([WAVE, np.roll(WAVE, 100)], axis=1)))[1].warnings == []
    with pytest.raises(AudioError, match=r"channels cancel each other.*choose one"):
        decode(data)


def test_silence_that_a_recorder_may_have_left():
    silent = np.concatenate([WAVE, np.zeros(2 * RATE, np.float32)])
    assert "the last 2.00 s are digital silence" in read(encode("WAV", wave=silent))[1].warnings[0]
    assert "the whole recording is digital silence" in read(encode("FLAC", wave=silent[WAVE.size :]))[1].warnings[0]
    with pytest.raises(AudioError, match="nothing but zeros; the recorder reserved the file"):
        decode(bytes(10_000))
    with pytest.raises(AudioError, match=r"has no samples.*never finished"):
        decode(riff(0, bytes(10_000)))


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "a.wav"
    long = encode("WAV", wave=np.tile(WAVE, 4))
    path.write_bytes(long)
    with open_audio(path) as stream:
        blocks = iter(stream)
        first = next(blocks)
        with path.open("ab") as file:
            file.write(PLAIN)
        size = first.size + sum(block.size for block in blocks)
    assert size == 4 * WAVE.size
    assert "changed while it was read" in stream.warnings[-1]
    path.write_bytes(long)
    with open_audio(path) as stream:
        blocks = iter(stream)
        first = next(blocks)
        os.truncate(path, len(long) // 2)
        size = first.size + sum(block.size for block in blocks)
    assert size < 4 * WAVE.size
    assert stream.partial
    assert "became shorter" in stream.warnings[0]


def m4a(path, seconds=SECONDS, rate=RATE, codec="aac", kind="mp4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=kind) as container:
        track = container.add_stream(codec, rate=rate, layout="stereo")
        times = np.arange(int(seconds * rate)) / rate
        tone = (0.3 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
        for start in range(0, len(tone), 1024):
            piece = tone[start : start + 1024]
            frame = av.AudioFrame.from_ndarray(np.stack([piece, piece]), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return tone


@pytest.mark.parametrize(("name", "kind", "codec"), [("a.m4a", "mp4", "aac"), ("a.aac", "adts", "aac")])
def test_m4a_and_aac(tmp_path, name, kind, codec):
    tone = m4a(tmp_path / name, codec=codec, kind=kind)
    wave, stream = read(tmp_path / name)
    assert stream.sample_rate == RATE
    assert abs(wave.size - tone.size) <= 2048
    assert stream.warnings == []
    assert np.abs(wave[RATE : 2 * RATE]).max() == pytest.approx(0.3, abs=0.02)
    assert describe(tmp_path / name).channels == 2
    data = (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(read(data)[0], wave)
    if kind == "adts":
        cut, stream = read(data[: len(data) // 2])
        assert 0.4 < cut.size / wave.size < 0.6
    else:
        with pytest.raises(AudioError, match="can't be decoded"):
            decode(data[: len(data) // 2])


def test_a_table_of_m4a_takes_no_more_than_a_request_may(tmp_path):
    """A kilobyte that says that there are 80 million packets, of a byte each."""
    m4a(tmp_path / "a.m4a", seconds=0.2)
    data = bytearray((tmp_path / "a.m4a").read_bytes())
    at = data.find(b"stsz")
    data[at + 8 : at + 16] = struct.pack(">II", 1, 80_000_000)
    (tmp_path / "a.m4a").write_bytes(data)
    code = """
import resource, sys
from avex_serve.audio.reader import open_audio
from avex_serve.errors import AudioError
from avex_serve.scheduling.request import Limits, Request, answering
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import av
before = memory()
with answering(Request("", Limits(seconds=3600))):
    try:
        with open_audio(sys.argv[1]) as stream:
            list(stream)
    except AudioError:
        print(memory() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.m4a")]
    grown = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    assert int(grown) < 64 * 1024, "KiB"


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    m4a(tmp_path / "a.m4a", seconds=0.2)
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "av":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AudioError, match=r"M4A needs PyAV: install it by `pip install 'avex-serve\[formats\]'`"):
        decode(tmp_path / "a.m4a")
