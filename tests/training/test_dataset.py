"""From folders and tables to the targets of windows."""

import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve.errors import InputError, NotFoundError
from avex_serve.training.dataset import read_dataset

RATE = 8000
WINDOWS = np.array([[0, 2], [2, 4], [4, 6], [6, 7]], float)  # of a recording of 7 s


def write(path, seconds=7.0, seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(str(path))) if seed is None else seed)
    soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * RATE)), RATE)
    return path


def table(folder, text, name="labels.csv"):
    (folder / name).write_text("file,start,end,label\n" + text)
    return folder


def targets_of(dataset, name, spans=WINDOWS, **options):
    recording = next(recording for recording in dataset.recordings if recording.name == name)
    rows = dataset.targets(recording, spans, **options)
    return {label: rows[:, i].tolist() for i, label in enumerate(dataset.labels)}


def test_folders_of_classes(tmp_path):
    for name in (
        "robin/a.wav",
        "robin/site 1/b.wav",
        "wren/c.flac",
        "robin, wren/d.wav",
        "Noise/e.wav",
        "-wren/f.wav",
    ):
        write(tmp_path / name)
    (tmp_path / "wren" / "notes.txt").write_text("nothing to see")
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("robin", "wren")
    assert targets_of(dataset, "robin/a.wav") == {"robin": [1] * 4, "wren": [0] * 4}
    assert targets_of(dataset, "robin/site 1/b.wav") == {"robin": [1] * 4, "wren": [0] * 4}
    assert targets_of(dataset, "robin, wren/d.wav") == {"robin": [1] * 4, "wren": [1] * 4}
    assert targets_of(dataset, "Noise/e.wav") == {"robin": [0] * 4, "wren": [0] * 4}
    assert targets_of(dataset, "-wren/f.wav") == {"robin": [-1] * 4, "wren": [0] * 4}
    assert dataset.problems == ()


def test_folders_may_be_split(tmp_path):
    for name in ("train/robin/a.wav", "train/wren/b.wav", "test/robin/c.wav", "Test/wren/d.wav"):
        write(tmp_path / name)
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("robin", "wren")
    assert {r.name: r.split for r in dataset.recordings}["Test/wren/d.wav"] == "test"


def test_a_table_of_recordings_adds_columns_to_folders(tmp_path):
    write(tmp_path / "robin" / "a.wav")
    write(tmp_path / "wren" / "b.wav")
    (tmp_path / "sites.csv").write_text("file,site,split\nrobin/a.wav,north,train\nwren/b.wav,south,test\n")
    dataset = read_dataset(tmp_path, group_by="Site")
    assert [(r.group, r.split) for r in dataset.recordings] == [("north", "train"), ("south", "test")]
    assert dataset.labels == ("robin", "wren")


def test_clips_and_reviews_of_the_same_recordings_stay_together(tmp_path):
    """The two ways of docs/review.md."""
    clips, archive = tmp_path / "clips", tmp_path / "archive"
    for name in ("a", "b"):
        write(archive / f"{name}.wav")
        write(clips / "robin" / f"{name}1.wav", 2.0)
    header, row = "file,start,end,label,decision", "archive/{0}.wav,2,4,robin,present"
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("\n".join([header, *(row.format(name) for name in "ab")]) + "\n")
    labels = tmp_path / "labels.csv"
    labels.write_text("file,start,end,label\narchive/a.wav,0,2,robin\narchive/b.wav,0,2,robin\n")
    assert len({each.group for each in read_dataset([clips, reviews]).recordings}) == 4, "the program can't know"
    assert len({each.group for each in read_dataset([labels, reviews]).recordings}) == 2

    sources = tmp_path / "sources.csv"
    sources.write_text("file,source\nrobin/a1.wav,a\nrobin/b1.wav,b\na.wav,a\nb.wav,b\n")
    dataset = read_dataset([clips, reviews, sources], group_by="source")
    assert sorted(each.group for each in dataset.recordings) == ["a", "a", "b", "b"]


def test_windows_with_around_and_without_annotations(tmp_path):
    write(tmp_path / "a.wav")
    table(tmp_path, "a.wav,1.9,3,robin\na.wav,4.5,4.55,wren\n")
    # The first window shares 0.1 s with the robin: neither with it nor without it.
    assert targets_of(read_dataset(tmp_path), "a.wav") == {"robin": [-1, 1, 0, -1], "wren": [-1, 0, 1, -1]}
    fully = read_dataset(tmp_path, fully_annotated=True)
    assert targets_of(fully, "a.wav") == {"robin": [-1, 1, 0, 0], "wren": [0, 0, 1, 0]}
    assert targets_of(fully, "a.wav", min_overlap=0.05)["robin"] == [1, 1, 0, 0]


def test_windows_shorter_than_the_overlap_are_covered_whole(tmp_path):
    write(tmp_path / "robin" / "a.wav")
    spans = np.array([[0, 0.1], [0.1, 0.2], [0.2, 0.25]])
    assert targets_of(read_dataset(tmp_path), "robin/a.wav", spans)["robin"] == [1, 1, -1]


def test_points_negatives_and_known_absences(tmp_path):
    write(tmp_path / "a.wav")
    table(tmp_path, "a.wav,2,2,robin\na.wav,4,6,Background\na.wav,6,7,-robin\na.wav,0,2,rain\na.wav,0,2,wren\n")
    dataset = read_dataset(tmp_path, negatives=["rain"])
    assert targets_of(dataset, "a.wav") == {"robin": [0, 1, 0, 0], "wren": [1, 0, 0, -1]}


def test_annotations_outside_of_a_recording_are_cut(tmp_path):
    write(tmp_path / "a.wav")
    table(tmp_path, "a.wav,6.9,9,robin\na.wav,10,12,wren\n")
    assert targets_of(read_dataset(tmp_path), "a.wav") == {"robin": [-1, -1, -1, 1], "wren": [-1, -1, -1, 0]}


def test_rows_behind_the_end_of_a_recording_are_counted(tmp_path):
    """Their times count in a sequence of files, or are milliseconds; they would be lost without a word."""
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav")
    table(tmp_path, "a.wav,1,2,robin\na.wav,6.5,9,robin\nb.wav,61,62,robin\na.wav,7,7,wren\nb.wav,1,2,wren\n")
    (found,) = (problem for problem in read_dataset(tmp_path).problems if "after the end" in problem)
    assert found.startswith("left out: 2 rows begin after the end of the 2 recordings, such as ")
    assert "'wren' at 7 s of a.wav, which lasts 7.0 s" in found
    table(tmp_path, "a.wav,1,2,robin\na.wav,6.9,90,robin\nb.wav,1,2,wren\n")
    assert "after the end" not in str(read_dataset(tmp_path).problems)


def test_fully_annotated_takes_recordings_without_annotations(tmp_path):
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name)
    table(tmp_path, "a.wav,0,2,robin\n")
    assert [r.name for r in read_dataset(tmp_path).recordings] == ["a.wav"]
    assert targets_of(read_dataset(tmp_path, fully_annotated=True), "b.wav") == {"robin": [0] * 4}


def test_tables_beside_recordings(tmp_path):
    for name in ("x/dawn.wav", "y/dawn.wav", "x/dusk.wav"):
        write(tmp_path / name)
    (tmp_path / "x" / "dawn.txt").write_text("0\t2\trobin\n")
    (tmp_path / "y" / "dawn.Table.1.selections.txt").write_text(
        "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n1\t2\t4\twren\n"
    )
    dataset = read_dataset(tmp_path)
    assert [r.name for r in dataset.recordings] == ["x/dawn.wav", "y/dawn.wav"]
    assert targets_of(dataset, "x/dawn.wav")["robin"] == [1, -1, -1, -1]
    assert targets_of(dataset, "y/dawn.wav")["wren"] == [-1, 1, -1, -1]


@pytest.mark.parametrize("written", ["../recordings/a.wav", "{folder}/recordings/a.wav", "a.wav", "x/../a"])
def test_a_recording_is_the_same_however_tables_write_its_path(tmp_path, monkeypatch, written):
    write(tmp_path / "data" / "recordings" / "a.wav")
    write(tmp_path / "data" / "recordings" / "b.wav")
    (tmp_path / "data" / "tables").mkdir()
    table(tmp_path / "data" / "tables", f"{written.format(folder=tmp_path / 'data')},2,4,wren\n")
    table(tmp_path / "data" / "recordings", "a.wav,0,2,robin\nb.wav,0,2,robin\n")
    monkeypatch.chdir(tmp_path)
    for data in (tmp_path / "data", Path("data")):
        for options in ({}, {"fully_annotated": True}):
            dataset = read_dataset(data, **options)
            assert [recording.name for recording in dataset.recordings] == ["recordings/a.wav", "recordings/b.wav"]
            found = targets_of(dataset, "recordings/a.wav", WINDOWS[:2])
            assert found == {"robin": [1, 0], "wren": [0, 1]}


def test_recordings_of_every_name_that_a_run_finds(tmp_path):
    content = write(tmp_path / "robin" / "a.wav").read_bytes()
    for i, suffix in enumerate((".wave", ".AIFC", ".snd", ".m4a", ".aac", ".webm")):  # the content says the format
        (tmp_path / "robin" / f"{i}{suffix}").write_bytes(content + bytes(2 * i))
    assert len(read_dataset(tmp_path).recordings) == 7


def test_a_table_alone_with_paths_of_another_machine(tmp_path):
    write(tmp_path / "deep" / "a.wav")
    table(tmp_path, "C:\\season 1\\a.wav,0,2,robin\nnone.wav,0,2,robin\n")
    dataset = read_dataset(tmp_path / "labels.csv")
    assert [r.name for r in dataset.recordings] == ["deep/a.wav"]
    assert "labels.csv annotates none.wav, which is not there (1 rows)" in dataset.problems


def test_files_of_one_name_need_paths(tmp_path):
    for name in ("x/a.wav", "y/a.wav"):
        write(tmp_path / name)
    table(tmp_path, "a.wav,0,2,robin\n")
    with pytest.raises(InputError, match=r"labels.csv: .* may mean 2 recordings"):
        read_dataset(tmp_path)


def test_problems_are_listed(tmp_path):
    for name in ("robin/a.wav", "Robin /b.wav", "wren/c.wav"):
        write(tmp_path / name)
    shutil.copy(tmp_path / "robin" / "a.wav", tmp_path / "wren" / "copy.wav")
    (tmp_path / "robin" / "broken.wav").write_bytes(b"RIFF")
    dataset = read_dataset(tmp_path)
    text = "\n".join(dataset.problems)
    assert "labels that differ by case or spaces alone: 'Robin', 'robin'" in text
    assert "broken.wav" in text
    assert "wren/copy.wav has the same content as robin/a.wav; they stay together" in text
    assert "robin: one recording (or group) only" in text
    groups = {r.name: r.group for r in dataset.recordings}
    assert groups["wren/copy.wav"] == groups["robin/a.wav"] != groups["wren/c.wav"]


def test_the_same_content_in_both_splits_is_said(tmp_path):
    write(tmp_path / "train" / "robin" / "a.wav")
    write(tmp_path / "test" / "robin" / "b.wav")
    shutil.copy(tmp_path / "train" / "robin" / "a.wav", tmp_path / "test" / "robin" / "a.wav")
    dataset = read_dataset(tmp_path)
    assert any("in the other split; remove one" in problem for problem in dataset.problems)
    # As with near-duplicates: in one group, no split would be left.
    assert [len({r.group for r in dataset.recordings if r.split == part}) for part in ("train", "test")] == [1, 2]
    assert len({r.group for r in dataset.recordings}) == 3


def test_labels_of_a_head(tmp_path):
    write(tmp_path / "robin" / "a.wav")
    write(tmp_path / "wren" / "b.wav")
    dataset = read_dataset(tmp_path, labels=("wren", "owl"))
    assert targets_of(dataset, "robin/a.wav") == {"wren": [0] * 4, "owl": [0] * 4}
    assert any(problem.startswith("robin: not a label of the head") for problem in dataset.problems)
    said = " ".join(read_dataset(tmp_path, labels=("Wren", "Rob_in", "owl")).problems)
    assert (
        "wren: not a label of the head; its stretches count as without the head's labels; did you mean 'Wren'?"
        in said
    )
    assert "did you mean 'Rob_in'?" in said
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("file,start,end,label,decision\nrobin/a.wav,0,2,rain,present\nrobin/a.wav,0,2,wren,absent\n")
    dataset = read_dataset(reviews, labels=("wren", "owl"))
    assert "rain: not a label of the head; its reviews say nothing" in dataset.problems
    assert targets_of(dataset, "robin/a.wav") == {"wren": [0, -1, -1, -1], "owl": [-1] * 4}


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("a.wav,0,2,noise\n", {}, "has no labels"),
        ("a.wav,0,2,robin\n", {"group_by": "site"}, "no single value in the column 'site'"),
    ],
)
def test_what_can_not_be_used_is_refused(tmp_path, text, options, reason):
    write(tmp_path / "a.wav")
    with pytest.raises(InputError, match=reason):
        read_dataset(table(tmp_path, text), **options)


def test_a_recording_belongs_to_one_split(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "x.csv").write_text("file,start,end,label,split\na.wav,0,2,robin,train\na.wav,2,4,robin,test\n")
    with pytest.raises(InputError, match="several splits"):
        read_dataset(tmp_path)
    (tmp_path / "x.csv").write_text("file,start,end,label,split\na.wav,0,2,robin,fold 1\n")
    with pytest.raises(InputError, match="split 'fold 1'; expected one of train"):
        read_dataset(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(NotFoundError):
        read_dataset(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder for each class"):
        read_dataset(tmp_path / "empty")


def test_reviews_say_something_about_their_label_alone(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "alice.csv").write_text(
        "file,start,end,label,decision,annotator\n"
        "a.wav,0,2,x,present,alice\na.wav,2,4,x,absent,alice\na.wav,4,6,y,present,alice\na.wav,4,6,x,unsure,alice\n"
        "a.wav,6,7,x,present,alice\n"
    )
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("x", "y")
    assert targets_of(dataset, "a.wav") == {"x": [1, 0, -1, 1], "y": [-1, -1, 1, -1]}
    (tmp_path / "bob.csv").write_text("file,start,end,label,decision,annotator\na.wav,0,2,x,absent,bob\n")
    assert targets_of(read_dataset(tmp_path), "a.wav")["x"] == [-1, 0, -1, 1], "they differ about the first window"
    # A sound in a window is somewhere in every longer one; one that is absent is absent from every shorter one.
    longer, shorter = np.array([[0, 4], [4, 7]], float), np.array([[0, 1], [2, 3], [6, 7]], float)
    (tmp_path / "bob.csv").unlink()
    dataset = read_dataset(tmp_path)
    assert targets_of(dataset, "a.wav", longer)["x"] == [1, -1]
    assert targets_of(dataset, "a.wav", shorter)["x"] == [-1, 0, 1]


def test_reviews_change_what_annotations_say(tmp_path):
    table(tmp_path, "a.wav,0,4,x\n")
    write(tmp_path / "a.wav")
    (tmp_path / "reviews.csv").write_text("file,start,end,label,decision\na.wav,2,4,x,absent\na.wav,4,6,z,absent\n")
    dataset = read_dataset(tmp_path, fully_annotated=True)
    assert targets_of(dataset, "a.wav") == {"x": [1, 0, 0, 0]}


def test_several_sources_are_joined(tmp_path):
    write(tmp_path / "clips" / "x" / "a.wav")
    write(tmp_path / "clips" / "y" / "b.wav")
    write(tmp_path / "season" / "c.wav")
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "me.csv").write_text(
        "file,start,end,label,decision\n../season/c.wav,0,2,x,present\n../clips/x/a.wav,2,4,x,absent\n"
    )
    dataset = read_dataset((tmp_path / "clips", tmp_path / "reviews"))
    season = (tmp_path / "season" / "c.wav").resolve().as_posix()
    assert [r.name for r in dataset.recordings] == ["x/a.wav", "y/b.wav", season]
    assert targets_of(dataset, "x/a.wav") == {"x": [1, 0, 1, 1], "y": [0] * 4}
    assert targets_of(dataset, season) == {"x": [1, -1, -1, -1], "y": [-1] * 4}


def test_recordings_that_tables_leave_out_are_counted(tmp_path):
    """A folder of classes with a table of labels in it: the folders would be lost without a word."""
    for name in ("x/a.wav", "x/b.wav", "y/c.wav"):
        write(tmp_path / name)
    table(tmp_path, "x/a.wav,0,2,x\n")
    (found,) = (problem for problem in read_dataset(tmp_path).problems if problem.startswith("left out"))
    assert found.startswith("left out: 2 of 3 recordings in ")
    assert "such as x/b.wav" in found


def test_tables_with_labels_in_another_column_are_named(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav")
    (tmp_path / "README.txt").write_text("nothing to see\n")
    (tmp_path / "a.Table.1.selections.txt").write_text("Begin Time (s)\tEnd Time (s)\tcall\n0\t2\trobin\n")
    with pytest.raises(InputError, match=r"has no labels: .*a\.Table.* it has .*call; --label-column names"):
        read_dataset(tmp_path)
    assert read_dataset(tmp_path, label_column="call").labels == ("robin",)
    (tmp_path / "b.txt").write_text("0\t2\twren\n")
    assert [problem for problem in read_dataset(tmp_path).problems if "a.Table.1" in problem]


def test_tables_that_can_not_be_used_are_named(tmp_path):
    """A CSV with columns in another language, and the workbook that it was saved from."""
    write(tmp_path / "a.wav")
    (tmp_path / "labels.csv").write_text("Datei;Anfang;Ende;Art\na.wav;0,5;2;robin\n")
    (tmp_path / "labels.xlsx").write_bytes(b"PK\x03\x04\0\0")
    (tmp_path / "~$labels.xlsx").write_bytes(b"Ana")
    with pytest.raises(
        InputError, match=r"has no labels: .*labels\.csv .* it has datei, anfang.*xlsx is a spreadsheet"
    ):
        read_dataset(tmp_path)
    with pytest.raises(
        InputError, match=r"annotates labels, which is not there \(1 rows\); a table without a column"
    ):
        read_dataset(tmp_path, label_column="Art")
    (tmp_path / "weather.csv").write_text("day,rain\n1,2\n")
    write(tmp_path / "b.wav")
    (tmp_path / "b.txt").write_text("0\t2\trobin\n")
    found = [problem for problem in read_dataset(tmp_path).problems if problem.startswith("left out")]
    assert len(found) == 3
    assert "labels.csv is no table of annotations" in found[0]
    assert found[0].endswith("ende, art; so is 1 other table")
    assert found[2].startswith("left out: 1 of 2 recordings")
    assert found[1].endswith("labels.xlsx is a spreadsheet; save it as a table (in Excel: CSV UTF-8)")


def test_labels_and_names_that_look_the_same_are_the_same(tmp_path):
    """macOS stores accents apart from their letters, and a spreadsheet doesn't."""
    apart, composed = (unicodedata.normalize(form, "Türkentaube") for form in ("NFD", "NFC"))
    for name in (f"{apart}/a.wav", f"{composed}/b.wav", f"wren/{apart}.wav"):
        write(tmp_path / "clips" / name)
    (tmp_path / "more").mkdir()
    (tmp_path / "clips" / "sites.csv").write_text(f"file,site\n{composed}.wav,north\n")
    dataset = read_dataset(tmp_path / "clips")
    assert dataset.labels == (composed, "wren")
    assert [r.fields for r in dataset.recordings if "wren" in r.name] == [
        {"file": f"{composed}.wav", "site": "north"}
    ]
    dataset = read_dataset(tmp_path / "clips", labels=(apart,))
    assert targets_of(dataset, f"{composed}/b.wav") == {apart: [1] * 4}


def test_what_systems_leave_in_folders_is_no_data(tmp_path):
    write(tmp_path / "robin" / "a.wav")
    (tmp_path / "__MACOSX" / "robin").mkdir(parents=True)
    for name in ("__MACOSX/robin/._a.wav", "robin/._a.wav", "._sites.csv", ".DS_Store", "robin/.x.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\xb0\xff")
    dataset = read_dataset(tmp_path)
    assert dataset.labels == ("robin",)
    assert [r.name for r in dataset.recordings] == ["robin/a.wav"]
    assert "2 hidden files were left out" in dataset.problems[0]


def test_a_misspelled_label_is_named(tmp_path):
    for name in ("Chaffinch/a.wav", "Chaffinch/b.wav", "Chafinch/c.wav", "Wren/d.wav"):
        write(tmp_path / name)
    problems = read_dataset(tmp_path).problems
    assert [
        problem for problem in problems if problem.startswith("Chafinch") and "did you mean 'Chaffinch'?" in problem
    ]
    assert not [problem for problem in problems if problem.startswith("Wren") and "did you mean" in problem]


def test_a_recording_is_no_data(tmp_path):
    with pytest.raises(InputError, match="is a recording; give a table of its annotations"):
        read_dataset(write(tmp_path / "a.wav"))


def test_reviews_are_grouped_by_a_table_next_to_them_or_given_along(tmp_path):
    """Reviews name recordings by their paths, and have no column of sites."""
    archive, run = tmp_path / "archive", tmp_path / "run"
    paths = [write(archive / site / f"{i}.wav") for i, site in enumerate(("north", "north", "south"))]
    (run / "reviews").mkdir(parents=True)
    rows = [f"{path},0,2,robin,present,me,,{i}" for i, path in enumerate(paths)]
    header = "file,start,end,label,decision,annotator,comment,time"
    (run / "reviews" / "me.csv").write_text("\n".join([header, *rows]) + "\n")
    with pytest.raises(
        InputError, match=r"3 of 3 recordings, such as .*0\.wav, have no single value .*'site'.*along"
    ):
        read_dataset(run / "reviews", group_by="site")
    # By name or by path, along with recordings of which there is no review.
    write(archive / "west" / "9.wav")
    sites = tmp_path / "sites.csv"
    sites.write_text("file,site\n0.wav,north\n1.wav,north\narchive/south/2.wav,south\n9.wav,west\n8.wav,west\n")
    for data in ([run / "reviews", sites], [sites, run / "reviews"]):
        dataset = read_dataset(data, group_by="site", fully_annotated=True)
        assert [each.group for each in dataset.recordings] == ["north", "north", "south"]
        assert not any("9.wav" in problem or "8.wav" in problem for problem in dataset.problems)
    rows = [f"{path},{path.parent.name}" for path in paths]
    (run / "reviews" / "sites.csv").write_text("\n".join(["file,site", *rows]) + "\n")
    dataset = read_dataset(run / "reviews", group_by="site")
    assert [each.group for each in dataset.recordings] == ["north", "north", "south"]
    (tmp_path / "more.csv").write_text("file,site\n0.wav,east\n")
    with pytest.raises(InputError, match="no single value"):
        read_dataset([run / "reviews", tmp_path / "more.csv"], group_by="site")


def test_a_table_with_times_and_an_unknown_column_is_no_description(tmp_path):
    write(tmp_path / "a" / "robin" / "a.wav")
    write(tmp_path / "b" / "b.wav")
    (tmp_path / "b" / "x.csv").write_text("file,start,end,art\nb.wav,0,2,robin\n")
    with pytest.raises(InputError, match=r"no column label or species .* it has file, start, end, art"):
        read_dataset([tmp_path / "a", tmp_path / "b" / "x.csv"])
    write(tmp_path / "b" / "robin" / "c.wav")
    dataset = read_dataset([tmp_path / "a", tmp_path / "b" / "x.csv"], label_column="art")
    assert len(dataset.recordings) == 2


def test_clips_of_one_recording_that_do_not_stay_together(tmp_path):
    for name in ("robin/rec1_000.wav", "robin/rec1_004.wav", "wren/rec1_020.wav", "wren/rec2_008.wav"):
        write(tmp_path / name, 4.0)
    for i in range(8):
        write(tmp_path / "robin" / f"rec2_{40 + 4 * i}.wav", 4.0)
    (found,) = [each for each in read_dataset(tmp_path).problems if "longer ones" in each]
    assert found.startswith(
        "12 recordings look by their names like clips of 2 longer ones, such as robin/rec1_000.wav"
    )
    assert "--group-by source" in found
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.wav"))]
    rows = [f"{name},{name.partition('/')[2].partition('_')[0]}" for name in names]
    (tmp_path / "sources.csv").write_text("\n".join(["file,source", *rows]) + "\n")
    dataset = read_dataset(tmp_path, group_by="source")
    assert {each.group for each in dataset.recordings} == {"rec1", "rec2"}
    assert not any("longer ones" in each for each in dataset.problems)
