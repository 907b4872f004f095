"""Decisions on disk: a file for each annotator, which only grows and is read by others at any time."""

import csv
import errno
import os
import subprocess
import sys

import pytest

from avex_serve.annotations.reviews import COLUMNS, Subject, read_reviews
from avex_serve.errors import InputError, StorageError
from avex_serve.review.book import Answer, Book

WREN = Subject("/a/dawn.wav", 0.0, 3.0, "wren")
ROBIN = WREN._replace(label="robin")


def decisions(reviews):
    return [(review.start, review.label, review.annotator, review.decision) for review in reviews]


def test_decisions_are_read_by_what_trains(tmp_path):
    book = Book(tmp_path / "reviews")
    book.write("Åsa", [Answer(WREN, "present", 'clear,\n"loud"')])
    book.write("Bo", [Answer(WREN, "absent"), Answer(ROBIN, "present")])
    assert decisions(read_reviews(tmp_path / "reviews")) == [
        (0, "wren", "Bo", "absent"),
        (0, "robin", "Bo", "present"),
        (0, "wren", "Åsa", "present"),
    ]
    with (tmp_path / "reviews" / "Åsa.csv").open(encoding="utf-8", newline="") as file:
        header, row = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert row[:7] == ["/a/dawn.wav", "0.0", "3.0", "wren", "present", "Åsa", 'clear, "loud"']
    assert decisions(Book(tmp_path / "reviews").reviews) == decisions(read_reviews(tmp_path / "reviews"))


def test_undo_withdraws_what_belongs_together(tmp_path):
    book = Book(tmp_path)
    book.write("bo", [Answer(WREN, "absent"), Answer(ROBIN, "present")])
    later = WREN._replace(start=3.0, end=6.0)
    book.write("bo", [Answer(later, "unsure")])
    book.write("al", [Answer(later, "present")])
    assert [review.subject for review in book.undo("bo")] == [later]
    again = Book(tmp_path)  # after a restart
    assert [review.subject for review in again.undo("bo")] == [WREN, ROBIN]
    assert again.undo("bo") == []
    assert decisions(read_reviews(tmp_path)) == [(3, "wren", "al", "present")]
    lines = (tmp_path / "bo.csv").read_text().splitlines()
    assert len(lines) == 7, "the file only grows"


def test_a_changed_decision_replaces_the_first(tmp_path):
    book = Book(tmp_path)
    book.write("bo", [Answer(WREN, "absent")])
    book.write("bo", [Answer(WREN, "present")])
    assert decisions(book.reviews) == decisions(read_reviews(tmp_path)) == [(0, "wren", "bo", "present")]


def test_what_others_write_is_seen(tmp_path):
    book, other = Book(tmp_path), Book(tmp_path)
    other.write("al", [Answer(WREN, "present")])
    assert book.reviews == []
    book.refresh()
    book.write("bo", [Answer(WREN, "present")])
    assert {review.annotator for review in book.reviews} == {"al", "bo"}


def test_what_others_write_under_the_same_name_is_seen(tmp_path):
    one, other = Book(tmp_path), Book(tmp_path)
    one.write("bo", [Answer(WREN, "present")])
    other.write("bo", [Answer(ROBIN, "absent")])
    for book in (one, other):
        book.refresh()
        assert sorted(decisions(book.reviews)) == [(0, "robin", "bo", "absent"), (0, "wren", "bo", "present")]


def test_a_line_that_a_killed_process_left_is_removed(tmp_path):
    book = Book(tmp_path)
    book.write("bo", [Answer(WREN, "present")])
    whole = (tmp_path / "bo.csv").read_text()
    with (tmp_path / "bo.csv").open("a") as file:
        file.write('/a/dawn.wav,3.0,6.0,"wr')
    Book(tmp_path).write("bo", [Answer(ROBIN, "absent")])
    assert (tmp_path / "bo.csv").read_text().startswith(whole)
    assert [review.label for review in read_reviews(tmp_path)] == ["wren", "robin"]


def test_a_last_line_that_an_editor_left_without_its_end_is_kept(tmp_path):
    later = WREN._replace(start=3.0, end=6.0)
    Book(tmp_path).write("bo", [Answer(WREN, "present"), Answer(later, "absent")])
    path = tmp_path / "bo.csv"
    path.write_text(path.read_text().rstrip("\n"))
    Book(tmp_path).write("bo", [Answer(ROBIN, "absent")])
    expected = [(0, "wren", "bo", "present"), (3, "wren", "bo", "absent"), (0, "robin", "bo", "absent")]
    assert decisions(read_reviews(tmp_path)) == expected


def test_decisions_are_written_where_files_can_not_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("avex_serve.review.book.fcntl.flock", refuse)
    Book(tmp_path).write("bo", [Answer(WREN, "present")])
    assert decisions(read_reviews(tmp_path)) == [(0, "wren", "bo", "present")]


def test_a_file_that_a_spreadsheet_has_changed_is_not_added_to(tmp_path):
    Book(tmp_path).write("bo", [Answer(WREN, "present")])
    path = tmp_path / "bo.csv"
    comma = path.read_text()
    path.write_text("\ufeff" + comma.replace("\n", "\r\n"), "utf-8", newline="")  # Excel's CSV UTF-8, with commas
    Book(tmp_path).write("bo", [Answer(ROBIN, "absent")])
    assert len(Book(tmp_path).reviews) == 2
    for changed in (comma.replace(",", ";").encode(), comma.replace(",", "\t").encode("utf-16")):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"bo\.csv was saved by another program.*Rename it"):
            Book(tmp_path).write("bo", [Answer(ROBIN, "absent")])
        assert path.read_bytes() == changed
    path.rename(tmp_path / "bo of May.csv")
    Book(tmp_path).write("bo", [Answer(ROBIN, "absent")])
    assert len(Book(tmp_path).reviews) == 2


def test_a_killed_process_loses_nothing_that_it_reported(tmp_path):
    program = (
        "import sys; from pathlib import Path; from avex_serve.review.book import *\n"
        "book = Book(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n"
        "    book.write('bo', [Answer(Subject('/a.wav', float(i), i + 1.0, 'wren'), 'present')])\n"
        "    print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reported = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        reported += [int(line) for line in process.stdout.read().split()]
    assert [review.start for review in Book(tmp_path).reviews][: len(reported)] == reported


@pytest.mark.parametrize(
    ("annotator", "answer", "reason"),
    [
        ("", Answer(WREN, "present"), "annotator ''; expected a name"),
        ("../bo", Answer(WREN, "present"), "expected a name"),
        ("bo\n", Answer(WREN, "present"), "expected a name"),
        ("bo", Answer(WREN, "maybe"), "decision 'maybe'; expected one of present, absent, unsure"),
        ("bo", Answer(WREN._replace(label=" "), "present"), "label ' '; expected a name on one line"),
        ("bo", Answer(WREN._replace(label="a\tb"), "present"), "expected a name on one line"),
        ("bo", Answer(WREN, "present", "x" * 1001), "more than 1000 characters"),
        ("bo", Answer(WREN._replace(file="/a\nb.wav"), "present"), "rename the recording"),
        ("bo", Answer(WREN._replace(file="/a\udcff.wav"), "present"), "rename the recording"),
    ],
)
def test_what_is_refused(tmp_path, annotator, answer, reason):
    book = Book(tmp_path)
    with pytest.raises(InputError, match=reason):
        book.write(annotator, [answer])
    assert list(tmp_path.iterdir()) == []
    assert book.reviews == []


def test_a_full_disk(tmp_path, monkeypatch):
    book = Book(tmp_path)
    book.write("bo", [Answer(WREN, "present")])
    before = (tmp_path / "bo.csv").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        book.write("bo", [Answer(ROBIN, "present")])
    assert (tmp_path / "bo.csv").read_bytes() == before
    assert [review.label for review in book.reviews] == ["wren"]
