"""Reviewing what other programs found: their tables are written by `avex-serve tables`."""

import csv

import pytest

from avex_serve.errors import InputError, NotFoundError
from avex_serve.review.pool import Queue
from avex_serve.review.sources import read_tables


@pytest.fixture
def tables(archive, bundles, command, tmp_path):
    """Write a table of a run in a format; its path, and the rows of the CSV."""
    command("run", bundles["plain"], archive, "--out", tmp_path / "run", "--threshold", "0.4")
    with (tmp_path / "run" / "tables" / "detections.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def write(form):
        target = tmp_path / f"found.{'txt' if form == 'raven' else 'csv'}"
        command("tables", tmp_path / "run", "--threshold", "0.4", "--format", form, "--output", target)
        return target, rows

    return write


@pytest.mark.parametrize("form", ["birdnet", "raven", "csv"])
def test_every_row_is_a_window_to_review(tables, form):
    path, rows = tables(form)
    pool, left_out = read_tables([path])
    assert left_out == 0
    expected = {(row["file"], round(float(row["start"]), 2), row["label"]): float(row["score"]) for row in rows}
    found = {}
    for place, label in enumerate(pool.labels):
        windows, scores = pool.select(place, Queue())
        assert scores.tolist() == sorted(scores, reverse=True)
        for window, score in zip(windows.tolist(), scores.tolist(), strict=True):
            sound = pool.sounds[pool.recording[window]]
            found[sound.path, round(pool.spans[window, 0], 2), label] = score
            assert pool.scores_of(place, windows).tolist() == scores.tolist()
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)
    assert {sound.site for sound in pool.sounds} >= {".", "site b"}


def test_a_label_track_next_to_its_recording(archive):
    (archive / "dawn.txt").write_text("0.1\t0.2\twren\n0.3\t0.4\t\n99\t100\twren\n")
    pool, left_out = read_tables([archive / "dawn.txt"])
    assert left_out == 2, "no label, and after the end of the recording"
    assert [sound.path for sound in pool.sounds] == [str(archive / "dawn.wav")]
    assert pool.select(0, Queue())[1].tolist() == pytest.approx([float("nan")], nan_ok=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (  # BirdNET-Analyzer 1, one table for each recording, without its name
            "dawn.BirdNET.results.csv",
            "Start (s),End (s),Scientific name,Common name,Confidence\n"
            "0.0,0.2,Troglodytes troglodytes,Eurasian Wren,0.81\n",
        ),
        (  # BirdNET-Analyzer 2, one table for all recordings
            "BirdNET_CombinedTable.csv",
            "Start (s),End (s),Scientific name,Common name,Confidence,File\n"
            "0.0,0.2,Troglodytes troglodytes,Eurasian Wren,0.81,C:\\archive\\dawn.wav\n",
        ),
        (  # its selection table for Raven
            "dawn.BirdNET.selection.table.txt",
            "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tCommon Name\t"
            "Species Code\tConfidence\tBegin Path\tFile Offset (s)\n"
            "1\tSpectrogram 1\t1\t0.0\t0.2\t0\t15000\tEurasian Wren\tenwren1\t0.81\t/elsewhere/dawn.wav\t0.0\n",
        ),
        (  # Raven Pro, which writes a row for each view
            "dawn.Table.1.selections.txt",
            "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tSpecies\tScore\n"
            "1\tWaveform 1\t1\t0.0\t0.2\t100.0\t4000.0\tEurasian Wren\t0.81\n"
            "1\tSpectrogram 1\t1\t0.0\t0.2\t100.0\t4000.0\tEurasian Wren\t0.81\n",
        ),
    ],
    ids=["birdnet 1", "birdnet 2", "birdnet raven", "raven"],
)
def test_tables_as_other_programs_write_them(archive, name, text):
    (archive / name).write_text(text)
    pool, left_out = read_tables([archive / name])
    assert (pool.labels, left_out) == (("Eurasian Wren",), 0)
    assert [sound.path for sound in pool.sounds] == [str(archive / "dawn.wav")]
    assert pool.spans.tolist() == [[0.0, 0.2]]
    assert pool.select(0, Queue())[1].tolist() == [0.81]


def test_tables_of_nothing_that_is_here(tmp_path):
    table = tmp_path / "found.csv"
    table.write_text("file,start,end,label\nelsewhere.wav,0,3,wren\n")
    with pytest.raises(NotFoundError, match="no row names a label and a recording that is there"):
        read_tables([table])
    table.write_text("nothing\n")
    with pytest.raises(InputError, match="no table of annotations"):
        read_tables([table])
