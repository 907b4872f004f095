"""Decisions of annotators about windows."""

import pytest

from avex_serve.annotations.reviews import COLUMNS, agreed, read_reviews
from avex_serve.errors import InputError, NotFoundError

HEADER = ",".join(COLUMNS) + "\n"
ALICE = HEADER + (
    "a.wav,0,3,wren,present,alice,clear,2026-05-01T05:00:00Z\n"
    "a.wav,3,6,wren,absent,alice,,\n"
    "a.wav,6,9,wren,Unsure,alice,,\n"
    "a.wav,9,12,wren,present,alice,,\n"
    "a.wav,3,6,wren,present,alice,changed,\n"
    "a.wav,9,12,wren,,alice,undone,\n"
    "a.wav,12,15,wren,,,not reviewed yet,\n"
)
BOB = HEADER + "a.wav,0,3,wren,absent,bob,,\na.wav,3,6,wren,present,bob,,\na.wav,0,3,robin,absent,bob,,\n"


def decisions(reviews):
    return {(review.start, review.label, review.annotator): review.decision for review in reviews}


def test_the_last_decision_holds_and_an_empty_one_withdraws(tmp_path):
    (tmp_path / "alice.csv").write_text(ALICE)
    found = read_reviews(tmp_path / "alice.csv")
    assert decisions(found) == {
        (0, "wren", "alice"): "present",
        (3, "wren", "alice"): "present",
        (6, "wren", "alice"): "unsure",
    }
    assert (found[0].comment, found[0].time) == ("clear", "2026-05-01T05:00:00Z")
    assert found[-1].comment == "changed", "in the order of the decisions"


def test_a_folder_of_annotators_who_differ(tmp_path):
    (tmp_path / "alice.csv").write_text(ALICE)
    (tmp_path / "bob.csv").write_text(BOB)
    (tmp_path / "README.txt").write_text("by Alice and Bob\n")
    found = read_reviews(tmp_path)
    assert len(found) == 6
    by_window = {(subject.start, subject.label): decision for subject, decision in agreed(found).items()}
    assert by_window == {
        (0, "wren"): "unsure",
        (3, "wren"): "present",
        (6, "wren"): "unsure",
        (0, "robin"): "absent",
    }


def test_tables_of_other_programs(tmp_path):
    (tmp_path / "x.csv").write_text(
        "file,start,end,label,correct\na.wav,0,3,wren,Yes\na.wav,3,6,wren,0\na.wav,6,9,wren,\n"
    )
    assert [review.decision for review in read_reviews(tmp_path / "x.csv")] == ["present", "absent"]


def test_a_table_of_nothing_but_its_header(tmp_path):
    (tmp_path / "new.csv").write_text(HEADER)
    assert read_reviews(tmp_path / "new.csv") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            HEADER + "a.wav,0,3,wren,maybe,,,\n",
            "decision 'maybe' at 0 s; expected present, absent, unsure or nothing",
        ),
        (HEADER + "a.wav,0,3,,present,,,\n", "the decision 'present' at 0 s has no label"),
        ("file,start,end,label\na.wav,0,3,wren\n", "has no column decision; expected file, start, end, label"),
    ],
)
def test_what_is_no_table_of_reviews(tmp_path, text, reason):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_reviews(tmp_path / "x.csv")


def test_a_folder_without_reviews(tmp_path):
    (tmp_path / "x.csv").write_text("file,start,end,label\na.wav,0,3,wren\n")
    with pytest.raises(NotFoundError, match="no table with a column decision"):
        read_reviews(tmp_path)
