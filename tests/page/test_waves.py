"""Recordings as WAV of which any bytes can be read, and the files of the pages."""

import gzip
import io

import numpy as np
import pytest
import soundfile

from avex_serve.errors import InputError
from avex_serve.page.assets import STATIC, assets
from avex_serve.page.waves import HEADER_BYTES, WaveFile, encode_stream, find_range

MOST_COMPRESSED = 100_000  # bytes of JavaScript


@pytest.mark.parametrize(("container", "rate", "channels"), [("WAV", 256_000, 1), ("FLAC", 44_100, 2)])
def test_any_bytes_of_a_recording(tmp_path, container, rate, channels):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, channels), np.int16)
    path = tmp_path / "recording"
    soundfile.write(path, samples, rate, format=container)
    wave = WaveFile(path, channels)  # the last channel
    whole = wave.read(0, wave.size - 1)
    read, read_rate = soundfile.read(io.BytesIO(whole), dtype="int16")
    assert (len(whole), read_rate) == (wave.size, rate)
    np.testing.assert_array_equal(read, samples[:, -1])
    for first, last in ((0, 0), (10, 60), (HEADER_BYTES, HEADER_BYTES + 2), (4321, 5678), (wave.size - 3, 10**9)):
        assert wave.read(first, last) == whole[first : last + 1], (first, last)


def test_a_stream_of_unknown_length_is_a_wav():
    blocks = [np.full(3, 0.5, np.float32), np.array([-2, 2], np.float32)]
    pieces = list(encode_stream(blocks, 8000, None))
    assert b"".join(pieces[1:]) == np.array([2**14] * 3 + [-(2**15), 2**15 - 1], "<i2").tobytes()
    assert pieces[0][40:44] == b"\xff" * 4


@pytest.mark.parametrize(
    ("text", "found"),
    [("bytes=0-99", (0, 99)), ("bytes=990-", (990, 999)), ("bytes=-10", (990, 999)), ("bytes=5-5000", (5, 999))],
)
def test_ranges(text, found):
    assert find_range(text, 1000) == found


@pytest.mark.parametrize(
    "text", ["", "bytes=-", "bytes=9-1", "bytes=1000-", "bytes=0-1,3-4", "items=0-1", "bytes=a-b"]
)
def test_ranges_that_are_none(text):
    with pytest.raises(InputError, match="Range"):
        find_range(text, 1000)


def test_the_files_are_small_and_need_nothing_else():
    scripts = {name: each.content for name, each in assets().items() if name.endswith(".js")}
    assert sum(len(gzip.compress(content)) for content in scripts.values()) <= MOST_COMPRESSED
    for name, each in assets().items():
        text = each.content.decode("utf-8")
        assert "innerHTML" not in text, name
        assert "https://" not in text, name
    assert {path.suffix for path in STATIC.rglob("*") if path.is_file()} <= {
        ".js",
        ".css",
        ".html",
        ".svg",
        ".md",
        ".txt",
    }
