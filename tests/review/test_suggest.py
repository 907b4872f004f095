"""`avex-serve suggest`: what it writes is compared with the tables and embeddings of the run."""

import csv

import duckdb
import numpy as np
import pytest

from avex_serve.annotations.reviews import COLUMNS, read_reviews
from avex_serve.training.dataset import read_dataset
from tests.bundles import LABELS


@pytest.fixture
def store(archive, bundles, command, tmp_path):
    command("run", bundles["plain"], archive, "--out", tmp_path / "run", "--embeddings")
    return tmp_path / "run"


def read_table(path, delimiter=","):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def decide(path, decisions, delimiter=",", column="decision"):
    """Fill in decisions, as a person does in a spreadsheet or in Raven."""
    rows = read_table(path, delimiter)
    for row, decision in zip(rows, decisions, strict=False):
        row[column] = decision
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def key(row):
    return row["file"], round(float(row["start"]), 3), row["label"]


def test_the_best_windows_of_each_label_in_turn(store, command, tmp_path):
    command("tables", store, "--threshold", "0", "--output", tmp_path / "all.csv")
    code, (path,) = command("suggest", store, "-n", "7", "--output", tmp_path / "next.csv")
    assert (code, path) == (0, str(tmp_path / "next.csv"))
    rows = read_table(tmp_path / "next.csv")
    assert list(rows[0]) == [*COLUMNS, "score"]
    assert [row["label"] for row in rows] == [*LABELS, *LABELS, LABELS[0]]
    unique = {}  # a copy of a recording isn't reviewed twice
    for row in read_table(tmp_path / "all.csv"):
        unique.setdefault((row["recording"], row["start"], row["label"]), row)
    for label in LABELS:
        best = sorted(
            (row for row in unique.values() if row["label"] == label), key=lambda row: -float(row["score"])
        )
        found = [row for row in rows if row["label"] == label]
        assert [(key(row), row["score"]) for row in found] == [
            (key(row), row["score"]) for row in best[: len(found)]
        ]
    assert {row["decision"] for row in rows} == {""}


def test_filled_in_tables_are_read_and_left_out_next_time(store, bundles, command):
    reviews = store / "reviews"
    assert command("suggest", store, "-n", "6")[1] == [str(reviews / "suggested.csv")]
    decide(reviews / "suggested.csv", ["present", "absent", "unsure", "present"])
    decided = read_table(reviews / "suggested.csv")[:4]
    dataset = read_dataset(reviews)
    assert dataset.labels == (LABELS[0],), "the others are not known to be present anywhere"
    assert [read.decision for read in read_reviews(reviews)] == ["present", "absent", "unsure", "present"]
    code, lines = command("evaluate", bundles["plain"], reviews, "--cache", store.parent / "cache")
    assert code == 0, "a label without any decision is left out of the figures"
    assert any(line.startswith(LABELS[0]) for line in lines)
    assert command("suggest", store, "-n", "1000", "--strategy", "random")[1] == [str(reviews / "suggested-2.csv")]
    again = {key(row) for row in read_table(reviews / "suggested-2.csv")}
    assert not again & {key(row) for row in decided}
    (reviews / "suggested-2.csv").unlink()
    empty = store.parent / "none.csv"
    empty.write_text(",".join(COLUMNS) + "\n")
    command("suggest", store, "-n", "1000", "--reviewed", empty)
    assert {key(row) for row in read_table(reviews / "suggested-2.csv")} == again | {key(row) for row in decided}


def test_a_table_for_raven(store, command, tmp_path):
    command("suggest", store, "-n", "9", "--output", tmp_path / "next.csv")
    code, (path,) = command("suggest", store, "-n", "9", "--format", "raven")
    assert (code, path) == (0, str(store / "reviews" / "suggested.selections.txt"))
    table = store / "reviews" / "suggested.selections.txt"
    rows = read_table(table, "\t")
    assert list(rows[0])[-2:] == ["Decision", "Comment"]
    assert [row["Begin Path"] for row in rows] == sorted(row["Begin Path"] for row in rows)
    assert read_reviews(table) == []
    decide(table, ["present"] * 9, "\t", "Decision")
    found = {(review.file, round(review.start, 3), review.label) for review in read_reviews(store / "reviews")}
    assert found == {key(row) for row in read_table(tmp_path / "next.csv")}


def test_windows_near_an_example(store, command, tmp_path, archive):
    example = archive / "site b" / "nächtens.wav"
    arguments = ("--strategy", "nearest", "--label", "robin", "-n", "1000", "--output", tmp_path / "near.csv")
    assert command("suggest", store, *arguments, "--example", f"{example}:0.15")[0] == 0
    windows = {}
    for path, start, embedding in duckdb.sql(
        f"SELECT path, e.start, embedding FROM '{store}/embeddings/*/*/*.parquet' e "
        f"JOIN '{store}/recordings.parquet' USING (recording)"
    ).fetchall():
        vector = np.array(embedding)
        length = np.linalg.norm(vector)
        windows[path, round(start, 3)] = vector / length if length else vector
    similar = {place: vector @ windows[str(example), 0.1] for place, vector in windows.items()}
    found = [similar[row["file"], round(float(row["start"]), 3)] for row in read_table(tmp_path / "near.csv")]
    assert found[0] == pytest.approx(1)
    assert np.diff(found).max() <= 1e-6


def test_sites_are_folders(store, command, tmp_path):
    command("suggest", store, "--site", "site b", "--output", tmp_path / "next.csv")
    assert {"site b" in row["file"] for row in read_table(tmp_path / "next.csv")} == {True}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--label", "eagle"], "no label 'eagle'; one of the 3 labels is 'Zaunkönig'"),
        (["--probe", "eagle"], "no scores of a probe 'eagle'; expected one of linear"),
        (["--example", "dawn.wav"], "expected FILE:SECONDS, such as dawn.wav:12.5"),
        (["--example", "dawn.wav:3"], "the run has no window of dawn.wav at 3 s"),
        (["--strategy", "nearest"], "needs an example"),
        (["--site", "nowhere"], "nothing is left to review here"),
        (["-n", "0"], "expected at least 1"),
    ],
)
def test_errors(store, command, capsys, arguments, reason):
    capsys.readouterr()
    from avex_serve.cli import main

    assert main(["suggest", str(store), *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (store / "reviews").exists()


def test_a_table_is_never_replaced(store, command, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("decisions")
    assert command("suggest", store, "--output", tmp_path / "mine.csv")[0] == 2
    assert (tmp_path / "mine.csv").read_text() == "decisions"
