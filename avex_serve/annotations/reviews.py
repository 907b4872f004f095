"""Decisions of people about single windows: CSV with the columns of `COLUMNS`, a file or a folder of them.

Files only grow, one for each annotator: a later row about the same window and label replaces the earlier one, and an
empty decision withdraws it. A decision is about its label alone; it says nothing about other sounds in the window.
Other tables of annotations are read too if they have a column of `DECIDED` with the `WORDS`.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from avex_serve.annotations.reading import (
    TABLES,
    TableError,
    TableRow,
    decode_table,
    read_annotations,
    recording_of,
)
from avex_serve.errors import InputError, NotFoundError

Decision = Literal["present", "absent", "unsure"]
DECISIONS: Final[tuple[Decision, ...]] = get_args(Decision)
WORDS: Final[dict[str, Decision | None]] = {
    **dict.fromkeys(("present", "correct", "yes", "true", "1"), "present"),
    **dict.fromkeys(("absent", "incorrect", "no", "false", "0"), "absent"),
    **dict.fromkeys(("unsure", "unknown", "?"), "unsure"),
    "": None,
}
DECIDED: Final = ("decision", "correct")  # columns; the first that a table has counts
_LONGEST: Final = 2**16  # bytes of a line with the names of columns
COLUMNS: Final = ("file", "start", "end", "label", "decision", "annotator", "comment", "time")


class Subject(NamedTuple):
    """What a decision is about."""

    file: str
    start: float  # seconds
    end: float
    label: str


class Review(NamedTuple):
    """A decision that holds: the last one of an annotator about a window and a label."""

    file: str
    start: float  # seconds
    end: float
    label: str
    decision: Decision
    annotator: str = ""
    comment: str = ""
    time: str = ""
    fields: Mapping[str, str] = {}  # every column of the row, by its name in lower case

    @property
    def subject(self) -> Subject:
        """What the decision is about."""
        return Subject(*self[:4])


def read_reviews(path: Path) -> list[Review]:
    """The decisions that hold, in the order in which they were made.

    Args:
        path: a table with the columns `file`, `start`, `end`, `label` and `decision`, or a folder of such tables,
            where other tables are left out.

    Raises:
        NotFoundError: no such file or folder, or a folder without reviews.
        InputError: not a table of reviews, or an unknown decision.
    """
    if not path.is_dir():
        annotations = read_annotations(path)
        if annotations and not is_reviewed(annotations):
            raise InputError(f"{path} has no column decision; expected {', '.join(COLUMNS)}")
        return current_reviews(annotations, path)
    found: list[Review] = []
    tables = 0
    for table in sorted(each for each in path.iterdir() if each.suffix.lower() in TABLES and each.is_file()):
        try:
            annotations = read_annotations(table)
        except TableError:
            continue
        if is_reviewed(annotations):
            tables += 1
            found += current_reviews(annotations, table)
    if not tables:
        raise NotFoundError(f"{path} holds no table with a column decision; expected {', '.join(COLUMNS)}")
    return list({(review.subject, review.annotator): review for review in found}.values())


def is_reviewed(annotations: Sequence[TableRow]) -> bool:
    """Whether the rows of a table are reviews."""
    return bool(annotations) and any(column in annotations[0].fields for column in DECIDED)


def has_decisions(table: Path) -> bool:
    """Whether a file has a column of decisions, which people add to tables; it reads the first line alone."""
    try:
        with table.open("rb") as file:
            head = file.readline(_LONGEST)
    except OSError:  # a folder, or nothing is there
        return False
    text = decode_table(head + b"\0" if head.startswith(codecs.BOM_UTF16_LE) else head)
    return any(name.strip().strip('"').lower() in DECIDED for name in re.split(r"[\t,;]", text))


def current_reviews(annotations: Iterable[TableRow], table: Path) -> list[Review]:
    """The decisions of a table's rows that hold; errors as of `read_reviews`."""
    found: dict[tuple[Subject, str], Review] = {}
    for row in annotations:
        subject = Subject(row.file or recording_of(table), row.start, row.end, row.label)
        annotator, decision = row.fields.get("annotator", ""), _decision(row, table)
        found.pop((subject, annotator), None)
        if decision is not None:
            comment, time = row.fields.get("comment", ""), row.fields.get("time", "")
            found[subject, annotator] = Review(*subject, decision, annotator, comment, time, row.fields)
    return list(found.values())


def agreed(reviews: Iterable[Review]) -> dict[Subject, Decision]:
    """One decision for each window and label: that of all its annotators, or `unsure` where they differ."""
    found: dict[Subject, Decision] = {}
    for review in reviews:
        same = found.get(review.subject, review.decision) == review.decision
        found[review.subject] = review.decision if same else "unsure"
    return found


def _decision(row: TableRow, table: Path) -> Decision | None:
    text = next((row.fields[column] for column in DECIDED if column in row.fields), "").lower()
    if text not in WORDS:
        raise InputError(
            f"{table}: decision {text!r} at {row.start:g} s; expected {', '.join(DECISIONS)} or nothing"
        )
    if text and not row.label:
        raise InputError(f"{table}: the decision {text!r} at {row.start:g} s has no label")
    return WORDS[text]
