"""Reviewed detections: tables whose rows say whether a label is right.

A table has the columns of annotations (see `avex_serve.annotations.reading`) and `decision` or `correct`. Decisions
are words of `DECISIONS`; rows without one, or with one of doubt, say nothing.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from avex_serve.annotations.reading import read_annotations, recording_of
from avex_serve.errors import InputError

COLUMNS: Final = ("decision", "correct")
DECISIONS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("present", "correct", "yes", "true", "1"), True),
    **dict.fromkeys(("absent", "incorrect", "no", "false", "0"), False),
    **dict.fromkeys(("unsure", "unknown", "?", ""), None),
}


class Review(NamedTuple):
    """A decision about a label over a stretch of a recording."""

    file: str  # as the table says
    table: Path
    start: float  # seconds from the start of the recording
    end: float
    label: str
    present: bool
    score: str | None  # as the table has it


def read_reviews(tables: Iterable[Path]) -> list[Review]:
    """The decisions in tables. Of several about the same stretch and label, the last one counts.

    Raises:
        NotFoundError: no such file.
        InputError: no table of reviewed detections, or another decision than those of `DECISIONS`.
    """
    found: dict[tuple[str, float, float, str], Review | None] = {}
    for table in tables:
        for row in read_annotations(table):
            column = next((name for name in COLUMNS if name in row.fields), None)
            if column is None:
                raise InputError(
                    f"{table} has no column {' or '.join(COLUMNS)}; expected whether each label is right"
                )
            word = row.fields[column].lower()
            if word not in DECISIONS:
                known = ", ".join(each for each in DECISIONS if each)
                raise InputError(f"{table}: {column} {row.fields[column]!r}; expected one of {known}")
            present, file = DECISIONS[word], row.file or recording_of(table)
            score = row.fields.get("score") or None
            review = None if present is None else Review(file, table, row.start, row.end, row.label, present, score)
            found[file, row.start, row.end, row.label] = review
    return [review for review in found.values() if review is not None]


def rounded_score(review: Review) -> float:
    """The score in the table. A rounded one is not 0 or 1: it is at most half a unit of its last digit away.

    Raises:
        InputError: the row has no score, or none between 0 and 1.
    """
    text = review.score or ""
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise InputError(
            f"{review.table}: a row of {review.file} has the score {text!r}; expected a number from 0 to 1 in the "
            "column score"
        )
    digits = len(text.partition(".")[2]) if set(text) <= set("0123456789.") else 9
    half = 0.5 * 10.0**-digits
    return min(max(score, half), 1 - half)
