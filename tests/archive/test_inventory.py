"""``avex-serve inventory``: what is in folders of recordings, from headers and names alone."""

import csv
import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

GUANO = b"GUANO|Version: 1.0\nTimestamp: 2021-06-01T04:05:06.5+10:00\nLoc Position: -27.5 153.0\nMake: Titley\n"


def inventory(*arguments, code=0):
    command = [sys.executable, "-m", "avex_serve", "inventory", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def season(tmp_path):
    """Recordings as recorders leave them, one in another folder, one that is none."""
    folder = tmp_path / "season"
    (folder / "Data").mkdir(parents=True)
    samples = 0.1 * np.ones((8000, 2))
    soundfile.write(folder / "SITE_20200101_100000.wav", samples, 16000)
    with (folder / "SITE_20200101_100000.wav").open("ab") as file:
        file.write(b"guan" + struct.pack("<I", len(GUANO)) + GUANO)
    soundfile.write(folder / "Data" / "20200102_100000Z.flac", samples, 48000)
    soundfile.write(folder / "Data" / 'ümläut, "quoted".mp3', samples[:, 0], 48000)
    soundfile.write(folder / "Data" / "z.ogg", samples[:, 0], 48000)
    (folder / "broken.wav").write_bytes(b"no recording")
    return folder


def test_rows_as_json(season):
    result = inventory(season, "--format", "json", code=1)
    rows = {row["path"].removeprefix(f"{season}/"): row for row in json.loads(result.stdout)}
    assert len(rows) == 5
    wav = rows["SITE_20200101_100000.wav"]
    assert wav.pop("path") == str(season / "SITE_20200101_100000.wav")
    (warning,) = wav.pop("warnings")
    assert "2021-06-01 04:05:06+10:00 by GUANO, and at 2020-01-01 10:00:00 by name" in warning
    assert wav == {
        "duration": 0.5,
        "sample_rate": 16000,
        "channels": 2,
        "format": "WAV",
        "start": "2021-06-01T04:05:06.5",
        "offset": "+10:00",
        "start_source": "GUANO",
        "latitude": -27.5,
        "longitude": 153.0,
        "recorder": "Titley",
    }
    flac = rows["Data/20200102_100000Z.flac"]
    assert (flac["duration"], flac["format"], flac["offset"]) == (round(8000 / 48000, 6), "FLAC", "+00:00")
    for name, kind in (('Data/ümläut, "quoted".mp3', "MP3"), ("Data/z.ogg", "OGG")):
        assert (rows[name]["format"], rows[name]["start"], rows[name]["offset"]) == (kind, None, None)
        assert rows[name]["duration"] == pytest.approx(8000 / 48000, abs=0.03)
    broken = rows["broken.wav"]
    assert broken["duration"] is broken["format"] is None
    assert "can't be read" in broken["warnings"][0]
    assert "1 of 5 can't be read" in result.stderr


def test_the_same_as_csv_and_table(season):
    rows = json.loads(inventory(season, "--format", "json", code=1).stdout)
    table = list(csv.DictReader(io.StringIO(inventory(season, "--format", "csv", code=1).stdout)))
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert line["start"] == (row["start"] or "")
        assert line["warnings"] == "; ".join(row["warnings"])
    text = inventory(season, code=1).stdout
    assert all(row["path"] in text for row in rows)
    assert "2021-06-01T04:05:06.5" in text


def test_the_zone_and_the_list(season, tmp_path):
    one = season / "20200701_100000.wav"
    one.write_bytes((season / "SITE_20200101_100000.wav").read_bytes()[: 44 + 32000])
    (tmp_path / "list.txt").write_text(f"{one}\n")
    (row,) = json.loads(inventory(f"@{tmp_path / 'list.txt'}", "--format", "json").stdout)
    assert (row["start"], row["offset"]) == ("2020-07-01T10:00:00", None)
    (row,) = json.loads(inventory(one, "--format=json", "--timezone", "Europe/Berlin").stdout)
    assert row["offset"] == "+02:00"
    assert "is no zone" in inventory(one, "--timezone", "Berlin", code=2).stderr


@pytest.mark.slow
def test_an_archive_is_listed_in_little_memory(tmp_path):
    """10,000 files: a tenth of a season."""
    soundfile.write(tmp_path / "first.wav", np.zeros(100), 16000)
    data = (tmp_path / "first.wav").read_bytes()
    for index in range(10_000):
        (tmp_path / f"SITE_20200101_{index // 3600:02}{index // 60 % 60:02}{index % 60:02}.wav").write_bytes(data)
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom avex_serve.cli import main\nmain(sys.argv[1:])\n"
        # Not ru_maxrss, which begins with the memory of the process that forked.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "inventory", str(tmp_path), "--format", "json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stderr.split()[-1]) < 200 * 1024
    assert len(json.loads(result.stdout)) == 10_001
