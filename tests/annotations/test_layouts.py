"""Tables in the layouts of the programs that write them, with their columns, order and separators.

Each layout has detections in three recordings, two of which have the same name; the third has none.
"""

import csv
import io

import numpy as np
import pytest
import soundfile

from avex_serve.annotations.formats import FORMATS
from avex_serve.annotations.reading import read_annotations
from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.cli import main
from avex_serve.errors import InputError
from avex_serve.review.pool import Queue
from avex_serve.review.sources import read_tables
from avex_serve.training.dataset import read_dataset

BLACKBIRD = ("Turdus merula", "Eurasian Blackbird", "eurbla")
ROBIN = ("Erithacus rubecula", "European Robin", "eurrob1")
SOUNDS = {"site 1/rec.wav": 30.0, "site 2/rec.wav": 24.0, "site 2/quiet.wav": 12.0}
FOUND = (
    ("site 1/rec.wav", 0.0, *BLACKBIRD, 0.9012),
    ("site 1/rec.wav", 12.0, *BLACKBIRD, 0.31),
    ("site 1/rec.wav", 12.0, *ROBIN, 0.25),
    ("site 2/rec.wav", 3.0, *ROBIN, 0.75),
)
RAVEN = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\t"
KALEIDOSCOPE = "INDIR,FOLDER,IN FILE,OFFSET,DURATION,"
GO = (
    "Selection\tView\tChannel\tBegin File\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\t"
    "Species Code\tCommon Name\tConfidence"
)
CSV = "Start (s),End (s),Scientific name,Common name,Confidence"


def lines(header, rows, form, separator="\n"):
    return separator.join([*([header] if header else []), *(form(i, *row) for i, row in enumerate(rows, 1))]) + "\n"


def span(path, start, combined):
    """The times of a selection, which count on from the recordings in front of it if there are any in its table."""
    begin = start + (SOUNDS["site 1/rec.wav"] if combined and path == "site 2/rec.wav" else 0.0)
    return f"{begin}\t{begin + 3}"


def birdnet_table(root, rows, combined):  # BirdNET-Analyzer 1.1 to 2.4
    return lines(
        RAVEN + "Common Name\tSpecies Code\tConfidence\tBegin Path\tFile Offset (s)",
        rows,
        lambda i, path, start, _, common, code, score: (
            f"{i}\tSpectrogram 1\t1\t{span(path, start, combined)}\t0\t12000\t{common}\t{code}\t"
            f"{score:.4f}\t{root}/{path}\t{start}"
        ),
    )


def birdnet_table_1_0(root, rows, combined):  # BirdNET-Analyzer 1.0
    return lines(
        "Selection\tView\tChannel\tBegin Path\tFile Duration (s)\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\t"
        "High Freq (Hz)\tSpecies Code\tCommon Name\tConfidence",
        rows,
        lambda i, path, start, _, common, code, score: (
            f"{i}\tSpectrogram 1\t1\t{root}/{path}\t{SOUNDS[path]}\t{start}\t{start + 3}\t0\t12000.0\t"
            f"{code}\t{common}\t{score:.4f}"
        ),
    )


def birdnet_table_later(root, rows, combined):  # BirdNET-Analyzer after 2.4, August 2026
    return lines(
        "Selection\tBegin Time (s)\tEnd Time (s)\tCommon Name\tScientific Name\tSpecies Code\tConfidence\tView\t"
        "Channel\tFile Offset (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tBegin Path",
        rows,
        lambda i, path, start, scientific, common, code, score: (
            f"{i}\t{span(path, start, combined)}\t{common}\t{scientific}\t{code}\t"
            f"{score}\tSpectrogram 1\t1\t{start}\t0\t12000\t{root}/{path}"
        ),
    )


def birdnet_csv_1_0(root, rows, combined):  # BirdNET-Analyzer 1.0 to 1.2
    return lines(CSV, rows, lambda i, path, start, a, b, _, score: f"{start},{start + 3},{a},{b},{score:.4f}")


def birdnet_csv(root, rows, combined):  # BirdNET-Analyzer 1.3 and later
    return lines(
        CSV + ",File",
        rows,
        lambda i, path, start, a, b, _, score: f"{start},{start + 3},{a},{b},{score:.4f},{root}/{path}",
    )


def birdnet_csv_columns(root, rows, combined):  # BirdNET-Analyzer 2.1 and later, --additional_columns
    return lines(
        CSV + ",File,lat,lon,week,overlap,sensitivity,min_conf,species_list,model",
        rows,
        lambda i, path, start, a, b, _, score: (
            f"{start},{start + 3},{a},{b},{score:.4f},{root}/{path},-1,-1,-1,0.0,1.0,0.25,,"
            "BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite"
        ),
    )


def birdnet_r(root, rows, combined):  # BirdNET-Analyzer 1
    return lines(
        "filepath,start,end,scientific_name,common_name,confidence,lat,lon,week,overlap,sensitivity,min_conf,"
        "species_list,model",
        rows,
        lambda i, path, start, a, b, _, score: (
            f"{root}/{path},{start},{start + 3},{a},{b},{score:.4f},-1.0000,-1.0000,-1,0.0,1.0,0.1,,"
            "BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite"
        ),
    )


def birdnet_kaleidoscope(root, rows, combined):  # BirdNET-Analyzer 1.0 to 2.4
    return lines(
        KALEIDOSCOPE + "scientific_name,common_name,confidence,lat,lon,week,overlap,sensitivity",
        rows,
        lambda i, path, start, a, b, _, score: (
            f"{root},{path.replace('/', ',')},{start},3.0,{a},{b},{score:.4f},-1.0000,-1.0000,-1,0.0,1.0"
        ),
    )


def birdnet_kaleidoscope_later(root, rows, combined):  # BirdNET-Analyzer after 2.4, August 2026
    return lines(
        "OFFSET,confidence,INDIR,FOLDER,IN FILE,DURATION,TOP1MATCH",
        rows,
        lambda i, path, start, _, common, __, score: f"{start},{score},{root},{path.replace('/', ',')},3.0,{common}",
    )


def birdnet_audacity(root, rows, combined):  # BirdNET-Analyzer 1.0 to 2.4
    return lines("", rows, lambda i, path, start, a, b, _, score: f"{start}\t{start + 3}\t{a}, {b}\t{score:.4f}")


def birdnet_audacity_later(root, rows, combined):  # BirdNET-Analyzer after 2.4, August 2026
    return lines("", rows, lambda i, path, start, a, b, _, score: f"{start}\t{start + 3}\t{a}_{b}\t{score}")


def birdnet_package(root, rows, combined):  # the package birdnet, 0.2 to 1.3
    return lines(
        "input,start_time,end_time,species_name,confidence",
        rows,
        lambda i, path, start, a, b, _, score: (
            f'"{root}/{path}","00:00:{start:05.2f}","00:00:{start + 3:05.2f}","{a}_{b}",{score:.6f}'
        ),
    )


def birdnet_go_table(root, rows, combined):  # BirdNET-Go 0.3
    return lines(
        GO,
        rows,
        lambda i, path, start, _, common, code, score: (
            f"{i}\tSpectrogram 1\t1\t{path.rpartition('/')[2]}\t{start:.1f}\t{start + 3:.1f}\t0\t15000\t"
            f"{code}\t{common}\t{score:.4f}"
        ),
    )


def birdnet_go_table_clock(root, rows, combined):  # BirdNET-Go 0.6
    return lines(
        GO,
        rows,
        lambda i, path, start, _, common, code, score: (
            f"{i}\tSpectrogram 1\t1\t{root}/{path}\t00:00:{start:02.0f}\t00:00:{start + 3:02.0f}\t0\t15000\t{code}\t"
            f"{common}\t{score:.4f}"
        ),
    )


def birdnet_go_csv(root, rows, combined):  # BirdNET-Go 0.6
    return lines(
        CSV,
        rows,
        lambda i, path, start, a, b, _, score: (
            f"0001-01-01 00:00:{start:02.0f},0001-01-01 00:00:{start + 3:02.0f},{a},{b},{score:.4f}"
        ),
    )


def kaleidoscope_clusters(root, rows, combined):  # Kaleidoscope Pro 5, cluster.csv, on Windows
    return lines(
        "INDIR,FOLDER,IN FILE,CHANNEL,OFFSET,DURATION,Fmin,Fmean,Fmax,DATE,TIME,HOUR,TOP1MATCH*,TOP1DIST,TOP2MATCH,"
        "TOP2DIST,VOCALIZATIONS,MANUAL ID",
        rows,
        lambda i, path, start, _, common, __, score: (
            f"D:\\season,{path.replace('/', ',')},0,{start},3,1800,2900,4100,2024-05-01,05:30:00,5,{common},"
            f"{1 - score:.4f},Noise,1.2,1,"
        ),
        "\r\n",
    )


def kaleidoscope_bats(root, rows, combined):  # Kaleidoscope Pro 5, id.csv, with some files verified
    return lines(
        "INDIR,OUTDIR,FOLDER,IN FILE,CHANNEL,OFFSET,DURATION,OUT FILE FS,OUT FILE ZC,DATE,TIME,HOUR,AUTO ID*,PULSES,"
        "MATCHING,MATCH RATIO,MANUAL ID",
        rows,
        lambda i, path, start, _, common, __, score: (
            f"D:\\season,,{path.replace('/', ',')},0,{start},3,,,2024-05-01,05:30:00,5,NoID,12,10,0.83,{common}"
        ),
        "\r\n",
    )


def britekit(root, rows, combined):  # BriteKit 1.8
    return lines(
        "recording,name,start_time,end_time,score",
        rows,
        lambda i, path, start, _, common, __, score: f"rec,{common},{start:.3f},{start + 3:.3f},{score:.3f}",
    )


def britekit_audacity(root, rows, combined):  # BriteKit 1.8
    return lines(
        "", rows, lambda i, path, start, _, common, __, score: f"{start:.2f}\t{start + 3:.2f}\t{common};{score:.3f}"
    )


def hoplite(root, rows, combined):  # perch-hoplite 1.0
    return lines(
        "idx,project,filename,window_start,window_end,label,logits",
        rows,
        lambda i, path, start, _, common, __, score: f"{i},demo,{path},{start},{start + 3},{common},{score}",
        "\r\n",
    )


def raven_pro(root, rows, combined):  # Raven Pro 1.6 on Windows, with a column of the user
    return lines(
        RAVEN + "Species\tNotes",
        [row for row in rows for _ in "ab"],
        lambda i, path, start, _, common, __, score: (
            f"{(i + 1) // 2}\t{'Waveform 1' if i % 2 else 'Spectrogram 1'}\t1\t{start:.9f}\t{start + 3:.9f}\t"
            f'1340.5\t2899.9\t{common}\t"loud'
        ),
        "\r\n",
    )


EACH, ALL = ".BirdNET.", "BirdNET_"  # in the names of BirdNET-Analyzer's files: of one recording, of all of them
LAYOUTS = {
    "birdnet table": (birdnet_table, EACH + "selection.table.txt", ALL + "SelectionTable.txt"),
    "birdnet table, 1.0": (birdnet_table_1_0, EACH + "selection.table.txt", None),
    "birdnet table, later": (birdnet_table_later, EACH + "selection.table.txt", ALL + "SelectionTable.txt"),
    "birdnet csv, 1.0": (birdnet_csv_1_0, EACH + "results.csv", None),
    "birdnet csv": (birdnet_csv, EACH + "results.csv", ALL + "CombinedTable.csv"),
    "birdnet csv, columns": (birdnet_csv_columns, EACH + "results.csv", ALL + "CombinedTable.csv"),
    "birdnet r": (birdnet_r, EACH + "results.r.csv", ALL + "RTable.csv"),
    "birdnet kaleidoscope": (birdnet_kaleidoscope, EACH + "results.kaleidoscope.csv", ALL + "Kaleidoscope.csv"),
    "birdnet kaleidoscope, later": (
        birdnet_kaleidoscope_later,
        EACH + "results.kaleidoscope.csv",
        ALL + "Kaleidoscope.csv",
    ),
    "birdnet audacity": (birdnet_audacity, EACH + "results.txt", None),
    "birdnet audacity, later": (birdnet_audacity_later, EACH + "results.txt", None),
    "package birdnet": (birdnet_package, None, "result.csv"),
    "birdnet-go table": (birdnet_go_table, ".wav.txt", None),
    "birdnet-go table, clock": (birdnet_go_table_clock, ".wav.txt", None),
    "birdnet-go csv": (birdnet_go_csv, ".wav.csv", None),
    "kaleidoscope clusters": (kaleidoscope_clusters, None, "cluster.csv"),
    "kaleidoscope bats": (kaleidoscope_bats, None, "id.csv"),
    "britekit": (britekit, ".csv", None),
    "britekit audacity": (britekit_audacity, "_scores.txt", None),
    "perch-hoplite": (hoplite, None, "detections.csv"),
    "raven": (raven_pro, ".Table.1.selections.txt", None),
}
UNSCORED = ("raven", "kaleidoscope bats")


@pytest.fixture
def sounds(tmp_path):
    random = np.random.default_rng(0)
    for name, seconds in SOUNDS.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "data" / name, random.normal(0, 0.1, int(seconds * 8000)), 8000)
    return tmp_path / "data"


def written(layout, folder, root, combined):
    """The tables of a layout, next to the recordings or one of them in a folder."""
    write, one, every = LAYOUTS[layout]
    if combined:
        tables = {folder / every: FOUND}
    else:
        tables = {folder / f"{name[:-4]}{one}": [row for row in FOUND if row[0] == name] for name in SOUNDS}
        tables = {path: rows for path, rows in tables.items() if rows}
    for path, rows in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write(root, rows, combined).encode())
    return list(tables)


WAYS = [(layout, combined) for layout, names in LAYOUTS.items() for combined in (False, True) if names[1 + combined]]


@pytest.mark.parametrize(("layout", "combined"), WAYS)
@pytest.mark.parametrize("root", ["here", "/elsewhere/season"])
def test_review_reads_every_layout(sounds, layout, combined, root):
    tables = written(layout, sounds, sounds if root == "here" else root, combined)
    pool, left_out = read_tables(tables)
    assert left_out == 0
    found = set()
    for place, label in enumerate(pool.labels):
        for window, score in zip(*pool.select(place, Queue()), strict=True):
            sound = pool.sounds[pool.recording[window]].path
            found.add((sound, *pool.spans[window], label, None if np.isnan(score) else round(float(score), 3)))
    scored = layout not in UNSCORED
    assert found == {
        (str(sounds / row[0]), row[1], row[1] + 3, row[3], round(row[5], 3) if scored else None) for row in FOUND
    }


@pytest.mark.parametrize(("layout", "combined"), WAYS)
@pytest.mark.parametrize("apart", [False, True], ids=["next to the recordings", "apart"])
def test_fit_and_evaluate_read_every_layout(sounds, tmp_path, layout, combined, apart):
    written(layout, tmp_path / "tables" / "season" if apart else sounds, "D:/season", combined)
    data = [tmp_path] if apart else [sounds]
    dataset = read_dataset(data, labels=("Eurasian Blackbird", "European Robin"))
    found = {
        (each.path.relative_to(sounds).as_posix(), row.start, row.end, row.label)
        for each in dataset.recordings
        for row in each.annotations
    }
    assert found == {(row[0], row[1], row[1] + 3, row[3]) for row in FOUND}


def test_a_recording_without_detections_has_no_label(sounds, capsys):
    """BirdNET-Analyzer writes a row into its selection table all the same."""
    written("birdnet table", sounds, sounds, combined=False)
    (sounds / "site 2" / "quiet.BirdNET.selection.table.txt").write_text(
        birdnet_table(sounds, [], combined=False)
        + f"1\tSpectrogram 1\t1\t0\t3\t0\t12000\tnocall\tnocall\t1.0\t{sounds}/site 2/quiet.wav\t0\n"
    )
    for name in ("BirdNET_analysis_params.csv", "BirdNET_SelectionTable.list.txt"):  # next to the tables
        (sounds / name).write_text(
            "Segment length,Audio speed\n3.0,1.0\n" if "params" in name else f"{sounds}/a.wav\n"
        )
    dataset = read_dataset(sounds, fully_annotated=True)
    assert dataset.labels == ("Eurasian Blackbird", "European Robin")
    quiet = next(each for each in dataset.recordings if each.name == "site 2/quiet.wav")
    assert dataset.targets(quiet, np.array([[0, 3], [3, 6]], float)).tolist() == [[0, 0], [0, 0]]
    assert not [each for each in dataset.problems if "left out" in each or "nocall" in each]
    main(["fit", str(sounds), "--check", "--fully-annotated"])
    said = capsys.readouterr()
    assert "European Robin" in said.out
    assert "nocall" not in said.out + said.err


def test_a_label_of_one_name_is_in_either_column(sounds):
    """BirdNET-Analyzer after 2.4 leaves the common name empty for labels of custom classifiers."""
    path = sounds / "found.csv"
    path.write_text(f"{CSV},File\n0.0,3.0,Turdus merula,Eurasian Blackbird,0.9,a.wav\n3.0,6.0,Chainsaw,,0.8,a.wav\n")
    assert [row.label for row in read_annotations(path)] == ["Eurasian Blackbird", "Chainsaw"]
    assert [row.label for row in read_annotations(path, "Scientific name")] == ["Turdus merula", "Chainsaw"]
    track = sounds / "rec.BirdNET.results.txt"
    track.write_text("0.0\t3.0\tNoise\t0.9\n3.0\t6.0\tDog, Dog\t0.8\n6.0\t9.0\tcall, nasal\t0.7\n")
    assert [row.label for row in read_annotations(track)] == ["Noise", "Dog", "call, nasal"]


@pytest.mark.parametrize("separator", [",", ";"])
def test_separators_without_quotes_are_found(sounds, separator):
    """BirdNET-Analyzer 1 and 2 quote nothing, and some of its names in Polish, Russian and Thai have commas."""
    rows = [
        "0.0,3.0,Turdus merula,kos,0.9,/my, own/rec.wav",
        "3.0,6.0,Pica pica,sroka, młoda,0.8,/b/rec.wav",
        ",,,,,,,",
    ]
    path = sounds / "found.csv"
    path.write_text("\n".join([f"{CSV},File", *rows]).replace(",", separator), "utf-8")
    found = [(row.file, row.start, row.label, row.fields["confidence"]) for row in read_annotations(path)]
    assert found == [
        (f"/my{separator} own/rec.wav", 0.0, "kos", "0.9"),
        ("/b/rec.wav", 3.0, f"sroka{separator} młoda", "0.8"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "start,end,label,file\n0,1,call,nasal,a.wav\n",
        "file,label\na.wav,call,nasal\n",
        "file,start,end,label\n1,2,3,4,5\n",
    ],
)
def test_separators_that_may_be_anywhere_are_refused(tmp_path, text):
    path = tmp_path / "found.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"line 2: \d cells, but \d columns; put text with ',' in quotation marks"):
        read_annotations(path)


def test_a_quotation_mark_in_raven_hides_no_rows(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(
        f'{RAVEN}Species\n1\tSpectrogram 1\t1\t0\t1\t0\t1\t"odd\n2\tSpectrogram 1\t1\t2\t3\t0\t1\t"a ""b"""\n'
    )
    assert [(row.start, row.label) for row in read_annotations(path)] == [(0, '"odd'), (2, 'a "b"')]


def test_labels_that_people_verified_count_in_kaleidoscope(tmp_path):
    path = tmp_path / "cluster.csv"
    path.write_text(f"{KALEIDOSCOPE}TOP1MATCH*,MANUAL ID\n,a,x.wav,0,2,wren,\n,a,x.wav,2,2,wren,robin\n")
    assert [row.label for row in read_annotations(path)] == ["", "robin"]
    assert [row.label for row in read_annotations(path, "TOP1MATCH*")] == ["wren", "wren"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [  # OpenSoundscape's scores, and Perch's of 2023
        (
            "file,start_time,end_time,robin,wren\na.wav,0.0,5.0,0.9,-1.2\n",
            "no column label or species .* robin, wren",
        ),
        (
            "filename, timestamp_s, label, logit\na.wav,5.00,robin,1.23\n",
            "a column timestamp_s, but none for the other",
        ),
    ],
)
def test_times_are_never_ignored(tmp_path, text, reason):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_annotations(path)


def test_csv_of_a_macintosh(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"file,start,end,label\ra.wav,0,1,wren\r")
    assert read_annotations(path)[0][:4] == ("a.wav", 0, 1, "wren")


def test_an_empty_label_track_has_no_labels(tmp_path):
    (tmp_path / "x.txt").write_text("\n")
    assert read_annotations(tmp_path / "x.txt") == []


@pytest.mark.parametrize("name", ["rec.wav", "rec", "/season/site 3/rec.wav", "C:\\season\\rec.wav"])
def test_a_name_of_several_recordings_is_refused(sounds, name):
    (sounds / "labels.csv").write_text(f"file,start,end,label\n{name},0,1,wren\n")
    with pytest.raises(InputError, match="may mean 2 recordings"):
        read_dataset(sounds)


@pytest.mark.parametrize("form", ["birdnet", "kaleidoscope", "raven", "csv", "audacity"])
def test_review_reads_what_we_write(sounds, form):
    recordings = {
        name: Recording(path=str(sounds / name), digest="0" * 64, duration=seconds, sample_rate=8000)
        for name, seconds in SOUNDS.items()
    }
    rows = {each.path: [] for each in recordings.values()}
    for path, start, scientific, common, _, score in FOUND:
        label = f"{scientific}_{common}"
        rows[recordings[path].path].append(Annotation(start, start + 3, label, score, 4000.0, "b", "1", "p"))
    table = Table([*recordings.values()], [(each, rows[each.path]) for each in recordings.values()], {})
    target = sounds / FORMATS[form].target
    FORMATS[form].write(table, target)
    tables = [target]
    if form == "audacity":
        for path in sorted(target.rglob("*.txt")):
            path.rename(sounds / path.relative_to(target))
        tables = sorted(sounds.rglob("*.txt"))
    pool, left_out = read_tables(tables)
    assert left_out == 0
    found = {
        (pool.sounds[pool.recording[window]].path, *pool.spans[window], label, round(float(score), 4))
        for place, label in enumerate(pool.labels)
        for window, score in zip(*pool.select(place, Queue()), strict=True)
    }
    whole = form in ("raven", "csv", "audacity")
    assert found == {
        (
            str(sounds / path),
            start,
            start + 3,
            f"{a}_{b}" if whole else (b if form == "birdnet" else f"{a}_{b}"),
            score,
        )
        for path, start, a, b, _, score in FOUND
    }


def read_as_birdnet(text):
    """What BirdNET-Analyzer 2.4 takes from its CSV for segments: it knows no quotes, and columns by their names."""
    header, *rows = text.splitlines()
    place = {name: i for i, name in enumerate(header.split(","))}
    cells = [row.split(",") for row in rows]
    return [
        (*(float(row[place[name]]) for name in ("Start (s)", "End (s)", "Confidence")), row[place["Common name"]])
        for row in cells
    ]


def test_birdnet_reads_what_we_write():
    recording = Recording(path="/a/rec.wav", digest="0" * 64, duration=9.0, sample_rate=8000)
    labels = ("Turdus merula_Eurasian Blackbird", "Dog_Dog", "chainsaw")
    rows = [Annotation(0.0, 3.0, label, 0.5, 4000.0, "b", "1", "p") for label in labels]
    file = io.StringIO()
    FORMATS["birdnet"].text(Table([recording], [(recording, rows)], {}), file)
    found = read_as_birdnet(file.getvalue())
    assert found == [(0.0, 3.0, 0.5, name) for name in ("Eurasian Blackbird", "Dog", "chainsaw")]
    scientific = [row["Scientific name"] for row in csv.DictReader(io.StringIO(file.getvalue()))]
    assert scientific == ["Turdus merula", "Dog", "chainsaw"]
