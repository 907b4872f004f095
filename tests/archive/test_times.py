"""Sounds at known places are found there, and every format writes these times, whatever the rate and the length."""

import csv
import json

import duckdb
import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from avex_serve.cli.tables import FORMATS
from tests.bundles import LABELS, SAMPLE_RATE, WINDOW, make_loudness_bundle

HOP = 0.025  # seconds, a quarter of a window
EXACT = 0.001  # seconds by which a written time may differ
BURST = WINDOW / SAMPLE_RATE
# Name, rate, seconds that are no whole number of samples of the model, and where the sound is; None: silence.
SEASON = (
    ("a 8 kHz.wav", 8000, 1.234625, 0.71),
    ("b 22.05 kHz.flac", 22050, 2.0001, 0.3337),
    ("c silent.wav", 44100, 1.10003, None),
    ("d 44.1 kHz.wav", 44100, 1.77777, 1.5111),
    ("e 48 kHz.flac", 48000, 0.98765, 0.0),
    ("f silent 312.5 kHz.wav", 312500, 0.7000032, None),
    ("g 96 kHz.wav", 96000, 1.00001, 0.445566),
    ("h 192 kHz.flac", 192000, 0.87654, 0.61),
    ("i 256 kHz.wav", 256000, 1.5, 0.1234),
    ("j 312.5 kHz.wav", 312500, 1.3000064, 1.05),
)


@pytest.fixture(scope="module")
def season(tmp_path_factory):
    """A store of the season, the files by name, and their true lengths."""
    folder = tmp_path_factory.mktemp("season")
    lengths = {}
    for name, rate, seconds, place in SEASON:
        wave = np.zeros(round(seconds * rate))
        if place is not None:
            first = round(place * rate)
            count = min(round(BURST * rate), wave.size - first)
            wave[first : first + count] = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(count) / rate)
        soundfile.write(folder / name, wave, rate)
        lengths[name] = wave.size / rate
    store = folder / "out"
    loudness = make_loudness_bundle(tmp_path_factory.mktemp("loudness") / "bundle")
    assert main(["run", str(loudness), str(folder), "--out", str(store), "--hop", str(HOP)]) == 0
    return store, lengths


def times_of(name, store, target):
    """(start in the file, end in the file, start in the sequence or None) of the rows by file name."""
    options = ["--format", name, "--output", str(target), "--label", LABELS[0], "--top-k", "1", "--threshold", "0.5"]
    assert main(["tables", str(store), *options]) == 0
    return READERS[name](target)


def _rows(path, delimiter=","):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def _long(rows):
    return [(row["file"].rpartition("/")[2], float(row["start"]), float(row["end"]), None) for row in rows]


def _raven(path):
    for row in _rows(path, "\t"):
        begin, end, offset = (float(row[each]) for each in ("Begin Time (s)", "End Time (s)", "File Offset (s)"))
        yield row["Begin File"], offset, offset + end - begin, begin


def _audacity(folder):
    for path in folder.glob("*.txt"):
        for line in path.read_text().splitlines():
            yield path.stem, *map(float, line.split("\t")[:2]), None


def _kaleidoscope(path):
    for row in _rows(path):
        yield row["IN FILE"], float(row["OFFSET"]), float(row["OFFSET"]) + float(row["DURATION"]), None


def _aoef(path):
    data = json.loads(path.read_text())["data"]
    files = {each["uuid"]: each["path"].rpartition("/")[2] for each in data["recordings"]}
    return [(files[each["recording"]], each["start_time"], each["end_time"], None) for each in data["clips"]]


def _camtrap_dp(folder):
    for row in _rows(folder / "observations.csv"):
        tags = dict(each.split(":") for each in row["observationTags"].split("|"))
        start = float(tags["offset"])
        yield row["mediaID"].rpartition("/")[2], start, start + float(tags["duration"]), None


READERS = {
    "csv": lambda path: _long(_rows(path)),
    "ndjson": lambda path: _long(map(json.loads, path.read_text().splitlines())),
    "parquet": lambda path: _long(duckdb.sql(f"SELECT * FROM read_parquet('{path}')").to_arrow_table().to_pylist()),
    "raven": _raven,
    "audacity": _audacity,
    "birdnet": lambda path: [
        (row["File"].rpartition("/")[2], float(row["Start (s)"]), float(row["End (s)"]), None) for row in _rows(path)
    ],
    "kaleidoscope": _kaleidoscope,
    "aoef": _aoef,
    "camtrap-dp": _camtrap_dp,
}


@pytest.mark.parametrize("name", FORMATS)
def test_times_in_every_format(season, tmp_path, name):
    store, lengths = season
    rows = list(times_of(name, store, tmp_path / "table"))
    before = dict(zip(lengths, np.cumsum([0, *lengths.values()])[:-1], strict=True))
    for file, _, _, place in SEASON:
        mine = [row for row in rows if row[0] == file]
        assert bool(mine) is (place is not None), file
        for _, start, end, begin in mine:
            steps = start / HOP
            ends_with_file = abs(end - lengths[file]) < EXACT
            assert abs(steps - round(steps)) * HOP < EXACT or ends_with_file, (file, start)
            assert abs(min(start + BURST, lengths[file]) - end) < EXACT, (file, start, end)
            assert start - BURST < place < end, (file, start)
            if begin is not None:
                assert abs(begin - before[file] - start) < EXACT, (file, begin)
        if mine:
            assert min(abs(row[1] - place) for row in mine) <= HOP + EXACT, (file, mine)
