"""`avex-serve run`, status, tables and classify; the engine in this process is the oracle."""

import csv
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
import soundfile

import avex_serve.archive.run
from avex_serve import open_bundle
from avex_serve.archive import store as stores
from avex_serve.audio.reader import decode
from avex_serve.evidence import first
from avex_serve.inference.engine import Engine
from tests.bundles import LABELS, NOISES, make_slow_bundle

AVEX_SERVE = Path(sys.executable).with_name("avex-serve")


def content(folder):
    """The bytes of every file, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def detections(store, name="detections.csv"):
    with (store / "tables" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def expected(bundle, path, **options):
    with open_bundle(bundle) as engine:
        return [(d.start, d.end, d.label, d.score) for d in engine.predict(*decode(path), **options).detections]


def found(rows, path):
    return [
        (float(row["start"]), float(row["end"]), row["label"], float(row["score"]))
        for row in rows
        if row["file"] == str(path)
    ]


@pytest.fixture
def count_inference(monkeypatch):
    """The number of windows of recordings that were run since the last question."""
    batches = []
    monkeypatch.setattr(first, "_answer_silence", lambda engine: None)
    job = Engine._job
    monkeypatch.setattr(Engine, "_job", lambda *arguments: batches.append(1) or job(*arguments))

    def count():
        number = len(batches)
        batches.clear()
        return number

    return count


def test_detections_are_those_of_the_engine(archive, bundles, command, tmp_path):
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "out", "--overlap", "0.03")
    assert code == 1, "one recording is broken"
    assert lines == [str(tmp_path / "out" / "tables" / "detections.csv"), "5 computed, 0 known, 1 failed"]
    rows = detections(tmp_path / "out")
    assert {row["file"] for row in rows} <= {str(path) for path in archive.rglob("*.*")}
    for path in archive.rglob("*.*"):
        if path.name != "broken.wav":
            assert found(rows, path) == approximately(expected(bundles["plain"], path, overlap=0.03))


def approximately(rows):
    return [
        (pytest.approx(start), pytest.approx(end), label, pytest.approx(score)) for start, end, label, score in rows
    ]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--threshold", "0.7"), {"threshold": 0.7}),
        (("--top-k", "1"), {"top_k": 1}),
        (("--top-k", "2", "--threshold", "0.4"), {"top_k": 2, "threshold": 0.4}),
        (("--threshold", "0"), {"threshold": 0.0}),
    ],
    ids=str,
)
def test_a_choice_needs_no_inference(archive, bundles, command, tmp_path, count_inference, options, same):
    command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    assert count_inference() > 10
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "out", *options)
    assert (code, lines[-1], count_inference()) == (1, "0 computed, 5 known, 1 failed", 0)
    from_run = content(tmp_path / "out" / "tables")
    code, _ = command("tables", tmp_path / "out", *options)
    assert (code, content(tmp_path / "out" / "tables")) == (0, from_run)
    rows = detections(tmp_path / "out")
    for path in (archive / "dawn.wav", archive / "site b" / "nächtens.wav"):
        assert found(rows, path) == approximately(expected(bundles["plain"], path, **same))


def test_thresholds_and_labels_by_file(archive, bundles, command, tmp_path):
    (tmp_path / "limits.csv").write_text("label,threshold\nrobin,0.6\nZaunkönig,1\n", "utf-8")
    (tmp_path / "labels.txt").write_text("robin\nZaunkönig\n", "utf-8")
    options = ("--threshold", tmp_path / "limits.csv", "--label", f"@{tmp_path / 'labels.txt'}")
    command("run", bundles["plain"], archive, "--out", tmp_path / "out", *options)
    everything = expected(bundles["plain"], archive / "dawn.wav", threshold=0.6)
    robins = [row for row in everything if row[2] == "robin"]
    assert found(detections(tmp_path / "out"), archive / "dawn.wav") == approximately(robins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,threshold\nrobbin,0.5\n", "no probe has the label 'robbin'"),
        ("robin;0.5\n", "row 1: robin;0.5; expected label,threshold"),
        ("robin,high\n", "expected label,threshold"),
        ("robin,nan\n", "expected a finite number"),
        ("robin,0.5\nrobin,0.6\n", "has a label twice"),
        ("", "has no thresholds"),
    ],
)
def test_bad_thresholds(archive, bundles, command, tmp_path, capsys, text, message):
    command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    (tmp_path / "limits.csv").write_text(text)
    assert main_fails(
        "tables", tmp_path / "out", "--threshold", tmp_path / "limits.csv", says=message, capsys=capsys
    )


def main_fails(*arguments, says, capsys):
    code = avex_serve.cli.main([str(argument) for argument in arguments])
    assert says in capsys.readouterr().err
    return code == 2


def test_windows_are_merged(archive, bundles, command, tmp_path):
    out = tmp_path / "out"
    command("run", bundles["plain"], archive, "--out", out, "--threshold", "0.3")
    apart = detections(out)
    command("tables", out, "--threshold", "0.3", "--merge", "0")
    highest = detections(out)
    command("tables", out, "--threshold", "0.3", "--merge", "0", "--merge-score", "mean")
    mean = detections(out)
    assert len(highest) == len(mean) < len(apart)
    for rows, join in ((highest, max), (mean, np.mean)):
        for row in rows:
            start, end = float(row["start"]), float(row["end"])
            inside = [
                each
                for each in apart
                if (each["file"], each["label"]) == (row["file"], row["label"])
                and start <= float(each["start"])
                and float(each["end"]) <= end
            ]
            spans = sorted((float(each["start"]), float(each["end"])) for each in inside)
            assert (spans[0][0], spans[-1][1]) == (start, end)
            assert all(c <= b + 1e-6 for (_, b), (c, _) in itertools.pairwise(spans)), "no gap is joined"
            assert float(row["score"]) == pytest.approx(join([float(each["score"]) for each in inside]))
    assert sum(row["file"] == str(archive / "silent.wav") for row in highest) <= len(LABELS)


def test_a_copy_has_no_warnings_of_another_name(archive, bundles, command, tmp_path):
    (archive / "dawn.wav").rename(archive / "19700101_000000.wav")
    command("run", bundles["plain"], archive, "--out", tmp_path / "at once")
    command("run", bundles["plain"], archive / "19700101_000000.wav", "--out", tmp_path / "later")
    command("run", bundles["plain"], archive, "--out", tmp_path / "later")
    assert content(tmp_path / "later") == content(tmp_path / "at once")
    journal = (tmp_path / "later" / "journal.ndjson").read_text().splitlines()
    warnings = {Path(entry["path"]).name: entry.get("warnings", []) for entry in map(json.loads, journal)}
    assert set(warnings["19700101_000000.wav"]).isdisjoint(warnings["copy.wav"])


def test_only_what_is_missing_is_computed(archive, bundles, command, tmp_path, count_inference):
    out = tmp_path / "out"
    command("run", bundles["plain"], archive, "--out", out)
    count_inference()
    soundfile.write(archive / "new.wav", np.random.default_rng(5).uniform(-1, 1, 4000), 16000)
    code, lines = command("run", bundles["plain"], archive, "--out", out)
    assert (code, lines[-1], count_inference()) == (1, "1 computed, 5 known, 1 failed", 3)
    (archive / "broken.wav").write_bytes((archive / "silent.wav").read_bytes())  # mended, with content that is known
    code, lines = command("run", bundles["plain"], archive, "--out", out)
    assert (code, lines[-1], count_inference()) == (0, "1 computed, 6 known, 0 failed", 0)
    (archive / "dawn.wav").rename(archive / "renamed.wav")
    code, lines = command("run", bundles["plain"], archive, "--out", out)
    assert (code, lines[-1], count_inference()) == (0, "1 computed, 6 known, 0 failed", 0)
    files = {row["file"] for row in detections(out)}
    assert str(archive / "renamed.wav") in files
    assert str(archive / "dawn.wav") not in files
    for result in (out / "scores").rglob("*.parquet"):
        result.write_bytes(b"")  # as after a power cut
    command("run", bundles["plain"], archive, "--out", out)
    assert count_inference() > 10


def test_a_changed_recording_is_computed_again(archive, bundles, command, tmp_path):
    out = tmp_path / "out"
    command("run", bundles["plain"], archive, "--out", out)
    samples = np.random.default_rng(7).uniform(-1, 1, int(0.42 * 44100))
    soundfile.write(archive / "dawn.wav", samples, 44100)  # of the same size
    _, lines = command("run", bundles["plain"], archive, "--out", out)
    assert lines[-1] == "1 computed, 4 known, 1 failed"
    rows = detections(out)
    assert found(rows, archive / "dawn.wav") == approximately(expected(bundles["plain"], archive / "dawn.wav"))
    copy = archive / "site b" / "copy.wav"
    assert found(rows, copy) == approximately(expected(bundles["plain"], copy))


def test_a_recording_that_changes_while_it_is_read(archive, bundles, command, tmp_path, status, monkeypatch):
    write = avex_serve.archive.run.stream_windows

    def growing(engine, stream, *options):
        yield from write(engine, stream, *options)
        with (archive / "dusk.flac").open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(avex_serve.archive.run, "stream_windows", growing)
    code, _ = command("run", bundles["plain"], archive / "dusk.flac", "--out", tmp_path / "out")
    assert code == 1
    assert status(tmp_path / "out")["failed"] == {
        str(
            archive / "dusk.flac"
        ): f"{archive / 'dusk.flac'} changed while it was read; it is read again in the next run"
    }
    assert not list((tmp_path / "out" / "scores").rglob("*.parquet"))


def test_other_options_and_bundles_are_computed_beside(archive, bundles, command, tmp_path, status, count_inference):
    out = tmp_path / "out"
    command("run", bundles["plain"], archive, "--out", out)
    first = {name: bytes_ for name, bytes_ in content(out).items() if name.startswith("scores")}
    command("run", bundles["plain"], archive, "--out", out, "--overlap", "0.05")
    second = content(out)
    assert first.items() < second.items(), "the old results are left as they were"
    assert len([each for each in status(out)["results"] if each["current"]]) == 1
    assert found(detections(out), archive / "dawn.wav") == approximately(
        expected(bundles["plain"], archive / "dawn.wav", overlap=0.05)
    )
    count_inference()
    code, lines = command("run", bundles["plain"], archive, "--out", out, "--hop", "0.1")
    assert (code, lines[-1], count_inference()) == (1, "0 computed, 5 known, 1 failed", 0)


def test_several_probes_and_bundles_share_a_pass(archive, bundles, command, tmp_path, count_inference):
    out = tmp_path / "out"
    command("run", bundles["backbone"], archive / "dawn.wav", "--out", tmp_path / "alone", "--embeddings")
    alone = count_inference()
    options = ("--threshold", "0", "--embeddings")
    command("run", bundles["probes"], bundles["head"], archive / "dawn.wav", "--out", out, *options)
    rows = detections(out)
    assert {(row["bundle"], row["probe"]) for row in rows} == {
        ("tiny-probes", "birds"),
        ("tiny-probes", "noise"),
        ("tiny-offline", "linear"),
    }
    assert count_inference() == 2 * alone, "the backbone once, and the head on its embeddings"
    with open_bundle(bundles["probes"]) as engine, open_bundle(bundles["head"]) as head:
        wave = decode(archive / "dawn.wav")
        for probe, labels in (("birds", LABELS), ("noise", NOISES)):
            scores = engine.score(*wave, probe=probe).scores
            assert table_of(rows, probe, labels) == pytest.approx(scores, rel=1e-8)
        embedded = engine.embed(*wave)
        answers = head.classify(embedded.embeddings, threshold=-1.0).results
        theirs = [[{each.label: each.score for each in row}[label] for label in LABELS] for row in answers]
        assert table_of(rows, "linear", LABELS) == pytest.approx(np.array(theirs), rel=1e-8)
        [stored] = (out / "embeddings").rglob("*.parquet")
        columns = duckdb.sql(f"SELECT * FROM '{stored}'").fetchnumpy()
        np.testing.assert_array_equal(np.stack(columns["embedding"]), embedded.embeddings)
        np.testing.assert_array_equal(columns["start"], embedded.spans[:, 0])
        described = json.loads((stored.parents[1] / "set.json").read_text())
        assert described["identity"]["embedding"] == engine.manifest.embeddings[0].fingerprint


def table_of(rows, probe, labels):
    scores = {(float(row["start"]), row["label"]): float(row["score"]) for row in rows if row["probe"] == probe}
    return np.array([[scores[start, label] for label in labels] for start in sorted({start for start, _ in scores})])


def test_a_probe_added_later_is_answered_from_stored_embeddings(
    archive, bundles, command, tmp_path, count_inference
):
    command("run", bundles["probes"], bundles["head"], archive, "--out", tmp_path / "at once", "--embeddings")
    command("run", bundles["probes"], archive, "--out", tmp_path / "classified", "--embeddings")
    command("run", bundles["probes"], archive, "--out", tmp_path / "later", "--embeddings")
    count_inference()
    for path in archive.rglob("*.wav"):
        if path.name != "broken.wav":
            assert path.stat().st_size
    code, lines = command("classify", tmp_path / "classified", bundles["head"])
    windows = count_inference()
    assert (code, lines[-1]) == (0, "4 computed, 0 known, 0 failed")
    command("run", bundles["probes"], bundles["head"], archive, "--out", tmp_path / "later", "--embeddings")
    assert count_inference() == windows, "the head alone"
    scores = [
        {name: bytes_ for name, bytes_ in content(tmp_path / store).items() if name.startswith("scores")}
        for store in ("at once", "classified", "later")
    ]
    assert scores[0] == scores[1] == scores[2]
    assert content(tmp_path / "at once") == content(tmp_path / "later")
    before = content(tmp_path / "classified")
    code, lines = command("classify", tmp_path / "classified", bundles["head"])
    assert (code, lines[-1], count_inference()) == (0, "0 computed, 4 known, 0 failed", 0)
    assert content(tmp_path / "classified") == before, "no detection counts twice"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{archive}",), "holds no manifest.json; make a bundle with avex-export. The bundles come first"),
        (("{plain}",), "no recordings are named"),
        (("{plain}", "{archive}/nothing.wav"), "no such file"),
        (("{backbone}", "{archive}"), "has no probe, and no other bundle here reads its embeddings"),
        (("{plain}", "{head}", "{archive}"), "no other bundle here makes those that it reads"),
        (("{plain}", "{archive}", "--overlap", "0.1"), "overlap is 0.1 s"),
        (("{plain}", "{archive}", "--hop", "0"), "hop is 0.0 s"),
        (("{plain}", "{archive}", "--threshold", "high"), "neither a number nor a file"),
        (("{plain}", "{archive}", "--label", "owl"), "no probe has the label 'owl'"),
        (("{plain}", "{archive}", "--merge", "-1"), "the gap to merge is -1.0 s"),
        (("{plain}", "{archive}", "--top-k", "0"), "top_k is 0"),
    ],
    ids=str,
)
def test_bad_arguments(archive, bundles, tmp_path, capsys, arguments, message):
    given = [argument.format(archive=archive, **bundles) for argument in arguments]
    assert avex_serve.cli.main(["run", *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is computed for a choice that can't be"


def test_folders_that_are_no_store(archive, bundles, tmp_path, capsys):
    assert main_fails("run", bundles["plain"], archive, "--out", archive, says="holds no results of", capsys=capsys)
    assert main_fails("tables", archive, says="holds no store.json", capsys=capsys)
    assert main_fails("classify", archive, bundles["head"], says="holds no store.json", capsys=capsys)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store.json").write_text('{"layout": 99, "current": []}')
    assert main_fails("status", tmp_path / "out", says="layout 99", capsys=capsys)


def test_two_writers(archive, bundles, tmp_path, capsys):
    with stores.Store.writing(tmp_path / "out"):
        arguments = ("run", bundles["plain"], archive, "--out", tmp_path / "out")
        assert main_fails(*arguments, says="another process writes to", capsys=capsys)


@pytest.mark.parametrize("final_clip", ["none", "extend", "remainder", "full"])
def test_the_end_and_the_channel(bundles, command, tmp_path, final_clip):
    random_ = np.random.default_rng(2)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "long.wav", random_.uniform(-1, 1, (4100, 2)), 16000)
    soundfile.write(tmp_path / "in" / "short.wav", random_.uniform(-1, 1, (900, 2)), 16000)
    options = ("--final-clip", final_clip, "--channel", "2")
    code, _ = command("run", bundles["probes"], tmp_path / "in", "--out", tmp_path / "out", "--embeddings", *options)
    assert code == (1 if final_clip == "none" else 0), "a recording shorter than a window has none"
    rows = detections(tmp_path / "out")
    for name in ("long",) if final_clip == "none" else ("long", "short"):
        path = tmp_path / "in" / f"{name}.wav"
        _, lines = command("predict", bundles["probes"], path, "--json", "--probe", "birds", *options)
        answer = [
            (one["start"], one["end"], one["label"], one["score"]) for one in json.loads(lines[0])["detections"]
        ]
        birds = [row for row in rows if row["probe"] == "birds"]
        assert found(birds, path) == approximately(answer)
    windows = duckdb.sql(f"SELECT count(*) FROM '{tmp_path}/out/embeddings/*/*/*.parquet'").fetchall()
    assert windows == [({"none": 2, "extend": 4, "remainder": 4, "full": 4}[final_clip],)]


def test_times_and_places(bundles, command, tmp_path):
    (tmp_path / "in").mkdir()
    samples = np.random.default_rng(2).uniform(-1, 1, 1600)
    for name in ("20240903_193130.wav", "S4A_20240903_193130+1000.wav", "5DDADCD6.WAV", "none.wav"):
        soundfile.write(tmp_path / "in" / name, samples, 16000)
    command("run", bundles["plain"], tmp_path / "in", "--out", tmp_path / "out", "--top-k", "1")
    times = {Path(row["file"]).name: row["start_time"] for row in detections(tmp_path / "out")}
    assert times == {
        "20240903_193130.wav": "2024-09-03T19:31:30.000",
        "S4A_20240903_193130+1000.wav": "2024-09-03T19:31:30.000+10:00",
        "5DDADCD6.WAV": "2019-11-24T19:41:10.000+00:00",
        "none.wav": "",
    }
    command("tables", tmp_path / "out", "--top-k", "1", "--timezone", "Australia/Brisbane")
    times = {Path(row["file"]).name: row["start_time"] for row in detections(tmp_path / "out")}
    assert times["20240903_193130.wav"] == "2024-09-03T19:31:30.000+10:00"
    assert times["5DDADCD6.WAV"] == "2019-11-24T19:41:10.000+00:00", "the name's own zone counts"
    starts = duckdb.sql(f"SELECT start FROM '{tmp_path}/out/recordings.parquet' ORDER BY path").fetchall()
    assert starts[0] == ("2024-09-03T19:31:30",)


def test_progress_as_json(archive, bundles, command, tmp_path):
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "out", "--progress", "json")
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", *["recording"] * 6, "end"]
    assert (code, events[-1]["done"], events[-1]["failed"], events[-1]["total"]) == (1, 5, 1, 6)
    [broken] = [event for event in events if event.get("error")]
    assert broken["path"] == str(archive / "broken.wav")
    assert events[-1]["rate"] > 0


def test_the_bar(archive, bundles, command, tmp_path, capsys):
    code = avex_serve.cli.main(
        ["run", str(bundles["plain"]), str(archive), "--out", str(tmp_path / "out"), "--progress", "bar"]
    )
    error = capsys.readouterr().err
    assert code == 1
    assert "× real time, 1 failed" in error
    assert "broken.wav" in error.replace("\n", "")


def test_recordings_and_results_open_with_duckdb(archive, bundles, command, tmp_path):
    command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    rows = duckdb.sql(
        f"""SELECT path, duration, sample_rate, recording, error, max(score) AS best
        FROM '{tmp_path}/out/recordings.parquet' LEFT JOIN '{tmp_path}/out/scores/*/*/*.parquet' USING (recording)
        GROUP BY ALL ORDER BY path"""
    ).fetchall()
    assert [Path(row[0]).name for row in rows] == [
        "broken.wav", "dawn.wav", "dusk.flac", "silent.wav", "copy.wav", "nächtens.wav"
    ]  # fmt: skip
    durations = [None, int(0.42 * 44100) / 44100, 0.317, 0.5, int(0.42 * 44100) / 44100, int(1.05 * 22050) / 22050]
    assert [row[1] for row in rows] == durations
    assert [row[3] for row in rows] == [hashlib.sha256(Path(row[0]).read_bytes()).hexdigest() for row in rows]
    assert [row[4] is None for row in rows] == [row[5] is not None for row in rows]


def test_long_recordings_are_written_in_pieces(archive, bundles, command, tmp_path, monkeypatch):
    options = ("--embeddings", "--overlap", "0.09")
    command("run", bundles["probes"], archive, "--out", tmp_path / "whole", *options)
    monkeypatch.setattr(stores, "GROUP_VALUES", 40)
    command("run", bundles["probes"], archive, "--out", tmp_path / "pieces", *options)
    for kind, columns in (("scores", "recording, start, probe, label, score"), ("embeddings", "start, embedding")):
        whole, pieces = (
            duckdb.sql(f"SELECT {columns} FROM '{tmp_path}/{store}/{kind}/*/*/*.parquet' ORDER BY ALL").fetchall()
            for store in ("whole", "pieces")
        )
        assert len(whole) > 40
        assert whole == pieces


def start(bundle, archive, out, *options, limit=None):
    # The interpreter reads nothing from the terminal, and its group is its own: Ctrl-C reaches it alone.
    return subprocess.Popen(
        [AVEX_SERVE, "run", bundle, archive, "--out", out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


def finish(process):
    process.communicate(timeout=120)
    return process.returncode


def test_killed_before_the_journal_is_written_again(archive, bundles, command, tmp_path):
    (archive / "broken.wav").unlink()
    command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    after = content(tmp_path / "out")
    lines = (tmp_path / "out" / "journal.ndjson").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "journal.ndjson").write_bytes(b"".join([*lines[::-1], lines[0], lines[1][:20]]))
    (tmp_path / "out" / "recordings.parquet").write_bytes(b"of a run before")
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    assert (code, lines[-1]) == (0, "0 computed, 5 known, 0 failed")
    assert content(tmp_path / "out") == after


def make_archive(folder, count):
    folder.mkdir()
    random_ = np.random.default_rng(1)
    for index in range(count):
        samples = random_.uniform(-1, 1, int(16000 * random_.uniform(0.05, 0.6)))
        soundfile.write(folder / f"{index:03}.wav", samples, 16000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_cleanly(tmp_path, bundles, status, sent):
    slow = make_slow_bundle(tmp_path / "slow")
    archive = make_archive(tmp_path / "archive", 60)
    process = start(slow, archive, tmp_path / "out", "--progress", "json")
    while json.loads(process.stdout.readline())["event"] != "recording":
        pass
    process.send_signal(sent)
    began = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; start the same command again" in error
    assert time.monotonic() - began < 15
    after = status(tmp_path / "out")
    assert 0 < after["done"] < 60
    assert after["done"] + len(after["missing"]) == 60
    assert not [path for path in (tmp_path / "out" / ".unfinished").iterdir() if path.name != "lock"]


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "recordings"), [(3, 40), pytest.param(20, 200, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path, bundles, kills, recordings):
    archive = make_archive(tmp_path / "archive", recordings)
    options = ("--embeddings", "--format", "csv", "--format", "raven", "--format", "parquet")
    began = time.monotonic()
    assert finish(start(bundles["probes"], archive, tmp_path / "undisturbed", *options)) == 0
    lasted = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(kills):
        process = start(bundles["probes"], archive, tmp_path / "killed", *options)
        time.sleep(moments.uniform(0, lasted))
        process.kill()
        process.communicate()
    assert finish(start(bundles["probes"], archive, tmp_path / "killed", *options)) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_full_disk(tmp_path, bundles):
    """A limit on the size of files stands for the disk: writing fails in the same places."""
    archive = make_archive(tmp_path / "archive", 40)
    samples = np.random.default_rng(3).uniform(-1, 1, 16000 * 60)
    soundfile.write(archive / "020.wav", samples, 16000)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(bundles["probes"], archive, tmp_path / "full", "--overlap", "0.09", limit=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "the results can't be written" in error
    assert "start the same command again" in error
    for out in ("full", "undisturbed"):
        assert finish(start(bundles["probes"], archive, tmp_path / out, "--overlap", "0.09")) == 0
    assert content(tmp_path / "full") == content(tmp_path / "undisturbed")


def test_a_name_that_is_not_utf_8(archive, bundles, command, tmp_path, status):
    strange = os.fsencode(archive) + b"/\xff.wav"
    Path(os.fsdecode(strange)).write_bytes((archive / "dawn.wav").read_bytes())
    code, lines = command("run", bundles["plain"], archive, "--out", tmp_path / "out")
    assert (code, lines[-1]) == (1, "5 computed, 0 known, 2 failed")
    [reason] = [reason for path, reason in status(tmp_path / "out")["failed"].items() if "broken" not in path]
    assert "the name is not UTF-8; rename the file" in reason
