"""Suggestions as a table with empty columns for decisions, as CSV or for Raven."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from avex_serve.annotations import raven
from avex_serve.annotations.reviews import COLUMNS
from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.archive.plan import ResultSet
from avex_serve.archive.store import Store
from avex_serve.review.book import REVIEWS
from avex_serve.review.pool import Pool, Suggestion
from avex_serve.writing import new_file

SUFFIXES: Final = {"csv": ".csv", "raven": ".selections.txt"}


def new_target(store: Store, form: str) -> Path:
    """The name of a table in the folder of reviews that is not there yet."""
    folder = store.folder / REVIEWS
    names = ("suggested" if i == 1 else f"suggested-{i}" for i in range(1, 10**6))
    return next(path for name in names if not (path := folder / f"{name}{SUFFIXES[form]}").exists())


def write_suggestions(
    suggestions: Sequence[Suggestion], pool: Pool, results: ResultSet, form: str, target: Path
) -> None:
    """Write suggestions.

    Args:
        suggestions: in the order of review, which CSV keeps.
        pool: their windows.
        results: the set that the pool was read from.
        form: ``csv``, or ``raven``: sorted by recording and time.
        target: the file.
    """
    if form == "raven":
        with new_file(target) as file:
            raven.write(_as_table(suggestions, pool, results), file, blank=("Decision", "Comment"))
        return
    with new_file(target) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*COLUMNS, "score"))
        for each in suggestions:
            start, end = pool.spans[each.window].tolist()
            path, label = pool.sounds[pool.recording[each.window]].path, pool.labels[each.label]
            score = "" if math.isnan(each.score) else f"{each.score:.9g}"
            writer.writerow((path, round(start, 9), round(end, 9), label, *[""] * (len(COLUMNS) - 4), score))


def _as_table(suggestions: Sequence[Suggestion], pool: Pool, results: ResultSet) -> Table:
    by_recording: dict[int, list[Suggestion]] = {}
    for each in sorted(suggestions, key=lambda each: (each.window, each.label)):
        by_recording.setdefault(int(pool.recording[each.window]), []).append(each)
    rows = [
        (_recording(pool, place), [_annotation(each, pool, results) for each in found])
        for place, found in by_recording.items()
    ]
    return Table([recording for recording, _ in rows], rows, {})


def _recording(pool: Pool, place: int) -> Recording:
    sound = pool.sounds[place]
    assert sound.entry is not None
    return Recording(
        path=sound.path,
        digest=sound.entry.recording or "",
        duration=sound.duration,
        sample_rate=sound.entry.sample_rate,
    )


def _annotation(each: Suggestion, pool: Pool, results: ResultSet) -> Annotation:
    start, end = pool.spans[each.window].tolist()
    label = pool.labels[each.label]
    return Annotation(start, end, label, each.score, results.cut.bandwidth, results.bundle, results.version, "")
