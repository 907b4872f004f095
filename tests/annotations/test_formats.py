"""Every format, read back by a program that we didn't write."""

import csv
import json
import warnings
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pandas
import pytest

from avex_serve.annotations.formats import FORMATS
from avex_serve.annotations.reading import read_annotations, recording_of
from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.cli.tables import FORMATS as OFFERED
from avex_serve.errors import InputError, StorageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import crowsetta
    import frictionless
    import soundevent.io

PLAIN = "Turdus merula_Eurasian Blackbird"
LABELS = (PLAIN, 'call, "nasal"', "Zaunkönig", '"quoted"', "two\twords", "Corvus corax")
ZONE = timezone(timedelta(hours=10))


def recording(path, seconds, rate=48000, **fields):
    return Recording(path=path, digest=f"{hash(path) % 10**16:064d}", duration=seconds, sample_rate=rate, **fields)


RECORDINGS = (
    recording("/data/site a/dawn, first.wav", 60.25, start=datetime(2024, 9, 3, 19, 31, 30, tzinfo=ZONE)),
    recording("/data/site a/silent.wav", 12.125, start=datetime(2024, 9, 3, 20, 31, 30, tzinfo=ZONE)),
    recording("/data/site b/tab\there ü.flac", 1 / 3, rate=8000, start=datetime(2024, 9, 4, 1, 2, 3, 250_000)),
    recording("/data/top.mp3", 10.0, latitude=-35.5, longitude=149.25),
)
SPANS = ((0.0, 5.0), (55.25, 60.25), (5.0, 10.0))


def annotation(start, end, label, score):
    return Annotation(start, end, label, score, 16000.0, "birds", "2", "linear")


def make_table(rows=None):
    if rows is None:
        rows = {
            0: [annotation(*SPANS[i % 3], label, 0.9 - i / 10) for i, label in enumerate(LABELS)],
            2: [annotation(0.0, 1 / 3, LABELS[0], 0.123456789)],
            3: [annotation(5.0, 10.0, LABELS[1], 1.0)],
        }
    lines = [(each, rows.get(index, [])) for index, each in enumerate(RECORDINGS)]
    return Table(RECORDINGS, lines, {"choice": {"threshold": 0.1}})


@pytest.fixture(params=["filled", "empty"])
def table(request):
    return make_table() if request.param == "filled" else make_table({})


def write(name, table, folder):
    target = folder / FORMATS[name].target
    FORMATS[name].write(table, target)
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    FORMATS[name].write(table, target)  # over itself, with the same bytes
    assert first == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return target


def flat(table):
    return [(each, one) for each, annotations in table.rows for one in annotations]


def test_the_command_offers_every_format():
    assert list(OFFERED) == list(FORMATS)


def test_raven(table, tmp_path):
    path = write("raven", table, tmp_path)
    frame = pandas.read_csv(path, sep="\t")
    assert list(frame.columns) == [
        "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)",
        "Begin File", "Begin Path", "File Offset (s)", "Label", "Score",
    ]  # fmt: skip
    rows = flat(table)
    assert len(frame) == len(rows)
    if not rows:
        assert path.read_text().count("\n") == 1
        return
    before = {each.path: sum(one.duration for one in RECORDINGS[:i]) for i, each in enumerate(RECORDINGS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        boxes = crowsetta.formats.bbox.Raven.from_file(path, annot_col="Label").to_bbox()
    for number, ((each, one), box, row) in enumerate(zip(rows, boxes, frame.itertuples(), strict=True), 1):
        assert box.onset == pytest.approx(before[each.path] + one.start, abs=1e-6), "silent files count"
        assert box.offset == pytest.approx(before[each.path] + one.end, abs=1e-6)
        assert (box.low_freq, box.high_freq) == (0, min(16000, each.sample_rate / 2))
        assert box.label == one.label.replace("\t", " ").replace('"quoted"', "'quoted\"")
        assert (row.Selection, row.View, row.Channel) == (number, "Spectrogram 1", 1)
        assert (row[8], row[9]) == (each.name.replace("\t", " "), each.path.replace("\t", " "))
        assert row[10] == pytest.approx(one.start, abs=1e-6)
        assert row.Score == pytest.approx(one.score, abs=5e-5)


def test_audacity(table, tmp_path):
    folder = write("audacity", table, tmp_path)
    for each, annotations in table.rows:
        path = folder / (each.path.removeprefix("/data/") + ".txt")
        if not annotations:
            assert path.read_bytes() == b""
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sequence = crowsetta.formats.seq.AudSeq.from_file(path).to_seq()
        # Audacity's own reader splits at tabs and knows no quotes.
        lines = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        for one, segment, line in zip(annotations, sequence.segments, lines, strict=True):
            label = f"{one.label} {one.score:.4f}".replace("\t", " ")
            assert (segment.onset_s, segment.offset_s) == pytest.approx((one.start, one.end), abs=6e-4)  # rounds
            assert (float(line[0]), float(line[1])) == pytest.approx((one.start, one.end), abs=1e-6)
            assert line[2] == label
            if not label.startswith('"'):
                assert segment.label == label


def test_label_tracks_are_read_with_their_scores(tmp_path):
    """People correct them in Audacity, and train on them."""
    path, wanted = "/data/a.wav", [("robin", 0.91234), ("Parus major 2.5", 1.0), ("-12", -3.25)]
    sound, rows = recording(path, 9), [annotation(float(i), i + 1.0, *each) for i, each in enumerate(wanted)]
    FORMATS["audacity"].write(Table([sound], [(sound, rows)], {}), tmp_path / "x")
    track = tmp_path / "x" / "a.wav.txt"
    track.write_text(track.read_text() + "5\t6\twren\n7\t8\twren 2\n9\t9.5\n")
    found = read_annotations(track)
    assert [each.label for each in found] == ["robin", "Parus major 2.5", "-12", "wren", "wren 2", ""]
    assert [each.fields.get("score") for each in found[:4]] == ["0.9123", "1.0000", "-3.2500", None]
    assert recording_of(track) == "a.wav"


def test_audacity_replaces_no_other_folder(tmp_path):
    (tmp_path / "audacity").mkdir()
    (tmp_path / "audacity" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not replaced; choose another folder"):
        FORMATS["audacity"].write(make_table(), tmp_path / "audacity")


@pytest.mark.parametrize("name", FORMATS)
def test_a_place_that_can_not_be_written_is_an_error(table, name):
    with pytest.raises(StorageError, match="can't be written"):
        FORMATS[name].write(table, Path("/proc/avex/table"))


def test_camtrap_dp_names_the_type_of_each_file(tmp_path):
    types = {"a.WAV": "wav", "b.m4a": "mp4", "c.webm": "webm", "d.aac": "aac", "e.aif": "aiff", "f.oga": "ogg"}
    recordings = [recording(f"/data/{name}", 1.0) for name in types]
    folder = write("camtrap-dp", Table(recordings, [(each, []) for each in recordings], {}), tmp_path)
    media = csv.DictReader((folder / "media.csv").read_text("utf-8").splitlines())
    assert [each["fileMediatype"] for each in media] == [f"audio/{kind}" for kind in types.values()]


def test_birdnet(table, tmp_path):
    frame = pandas.read_csv(write("birdnet", table, tmp_path))
    assert list(frame) == ["Start (s)", "End (s)", "Scientific name", "Common name", "Confidence", "File"]
    rows = flat(table)
    assert frame["File"].tolist() == [each.path for each, _ in rows]
    both = [("Turdus merula", "Eurasian Blackbird") if one.label == PLAIN else (one.label,) * 2 for _, one in rows]
    assert list(zip(frame["Scientific name"], frame["Common name"], strict=True)) == both
    assert frame["Start (s)"].tolist() == pytest.approx([one.start for _, one in rows], abs=5e-4)
    assert frame["End (s)"].tolist() == pytest.approx([one.end for _, one in rows], abs=5.1e-4)
    assert frame["Confidence"].tolist() == pytest.approx([one.score for _, one in rows], abs=5e-5)


def test_kaleidoscope(table, tmp_path):
    frame = pandas.read_csv(write("kaleidoscope", table, tmp_path), keep_default_na=False)
    assert list(frame) == ["INDIR", "FOLDER", "IN FILE", "OFFSET", "DURATION", "TOP1MATCH", "TOP1DIST"]
    rows = flat(table)
    parts = zip(frame["INDIR"], frame["FOLDER"], frame["IN FILE"], strict=True)
    assert ["/".join(filter(None, part)) for part in parts] == [each.path for each, _ in rows]
    assert frame["OFFSET"].tolist() == pytest.approx([one.start for _, one in rows], abs=5e-4)
    assert frame["DURATION"].tolist() == pytest.approx([one.end - one.start for _, one in rows], abs=5.1e-4)
    assert frame["TOP1MATCH"].tolist() == [one.label for _, one in rows]
    assert frame["TOP1DIST"].tolist() == pytest.approx([1 - one.score for _, one in rows], abs=5e-5)


@pytest.mark.parametrize("name", ["csv", "ndjson", "parquet"])
def test_long(table, tmp_path, name):
    path = write(name, table, tmp_path)
    rows = flat(table)
    if name == "csv":
        frame = pandas.read_csv(path, dtype={"recording": str, "version": str})
    elif name == "parquet":
        frame = pandas.read_parquet(path)
        about = duckdb.sql(f"SELECT value FROM parquet_kv_metadata('{path}') WHERE key = 'avex_serve'").fetchall()
        assert json.loads(bytes(about[0][0])) == {"choice": {"threshold": 0.1}}
    else:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        columns = ("file", "start", "end", "label", "score", "start_time", "bundle", "version", "probe", "recording")
        assert all(tuple(line) == columns for line in lines)
        frame = pandas.DataFrame(lines, columns=columns)
    assert len(frame) == len(rows)
    assert frame["file"].tolist() == [each.path for each, _ in rows]
    assert frame["label"].tolist() == [one.label for _, one in rows]
    assert frame["start"].tolist() == pytest.approx([one.start for _, one in rows], abs=1e-9)
    assert frame["end"].tolist() == pytest.approx([one.end for _, one in rows], abs=1e-9)
    assert frame["score"].tolist() == pytest.approx([one.score for _, one in rows], rel=1e-8)
    assert frame["recording"].tolist() == [each.digest for each, _ in rows]
    if rows:
        times = [None if pandas.isna(each) else each for each in frame["start_time"]]
        assert times[:2] == ["2024-09-03T19:31:30.000+10:00", "2024-09-03T19:32:25.250+10:00"]
        assert times[-2:] == ["2024-09-04T01:02:03.250", None], "an unknown zone and an unknown time stay unknown"


def test_aoef(table, tmp_path):
    path = write("aoef", table, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = soundevent.io.load(path, type="prediction_set")
    theirs = [
        (str(each.clip.recording.path), each.clip.start_time, each.clip.end_time, tag.tag.value, tag.score)
        for each in loaded.clip_predictions
        for tag in each.tags
    ]
    ours = [(each.path, one.start, one.end, one.label, one.score) for each, one in flat(table)]
    assert sorted(theirs) == sorted(ours)
    document = json.loads(path.read_text("utf-8"))
    assert document["version"] == "1.1.0"
    assert [each["path"] for each in document["data"]["recordings"]] == [each.path for each in RECORDINGS]
    assert document["data"]["recordings"][0]["date"] == "2024-09-03"
    assert document["data"]["recordings"][3]["latitude"] == -35.5


def test_aoef_takes_no_logits(tmp_path):
    with pytest.raises(InputError, match=r"raw logits such as -2.5: choose another format"):
        FORMATS["aoef"].write(make_table({0: [annotation(0, 5, "a", -2.5)]}), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_camtrap_dp(table, tmp_path, monkeypatch):
    folder = write("camtrap-dp", table, tmp_path)
    document = json.loads((folder / "datapackage.json").read_text("utf-8"))
    assert document["profile"].endswith("/camtrap-dp-profile.json")
    del document["profile"]  # which frictionless would read from the network
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = frictionless.Package.from_descriptor(document).validate()
    assert report.valid, report.flatten(["rowNumber", "fieldName", "message"])
    deployments, media, observations = (
        list(csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines()))
        for name in ("deployments", "media", "observations")
    )
    assert [(each["deploymentID"], each["deploymentStart"], each["deploymentEnd"]) for each in deployments] == [
        ("site a", "2024-09-03T19:31:30.000+10:00", "2024-09-03T20:31:42.125+10:00"),
        ("site b", "", ""),
        ("data", "", ""),
    ]
    assert [each["timestampIssues"] for each in deployments] == ["false", "true", "true"]
    assert (deployments[2]["latitude"], deployments[2]["longitude"]) == ("-35.5", "149.25")
    assert [each["filePath"] for each in media] == [each.path.removeprefix("/data/") for each in RECORDINGS]
    assert media[2]["mediaComments"] == "local time of unknown zone: 2024-09-04T01:02:03.250"
    assert [each["fileMediatype"] for each in media] == ["audio/wav", "audio/wav", "audio/flac", "audio/mpeg"]
    rows = flat(table)
    assert [each["observationComments"] for each in observations] == [one.label for _, one in rows]
    for each, (source, one) in zip(observations, rows, strict=True):
        species = {PLAIN: "Turdus merula", "Corvus corax": "Corvus corax"}.get(one.label, "")
        assert each["scientificName"] == species
        assert each["observationType"] == ("animal" if species else "unknown")
        assert float(each["frequencyHigh"]) == min(16000, source.sample_rate / 2)
        assert f"score:{one.score:.4f}" in each["observationTags"]
        assert "classificationProbability" not in each, "scores are not calibrated"
        if source.start is not None and source.start.tzinfo is not None:
            moment = source.start + timedelta(seconds=one.start)
            assert datetime.fromisoformat(each["eventStart"]).astimezone(UTC) == moment.astimezone(UTC)
        else:
            assert each["eventStart"] == ""


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_table_of_nothing(name, tmp_path):
    write(name, Table([], [], {}), tmp_path)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_error_leaves_the_old_table(name, tmp_path):
    target = write(name, make_table(), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def failing():
        yield RECORDINGS[0], [annotation(0, 1, "a", 0.5)]
        raise ArithmeticError("a fault")

    with pytest.raises(ArithmeticError, match="a fault"):
        FORMATS[name].write(Table(RECORDINGS, failing(), {}), target)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
