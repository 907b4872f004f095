"""``avex-serve suggest``: what to review next, as a table for people to fill in."""

import argparse
import math
import os
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from avex_serve.annotations.reviews import Review
    from avex_serve.archive.plan import ResultSet
    from avex_serve.archive.store import Store
    from avex_serve.review.pool import Pool, Queue

# Each strategy by what it puts first.
STRATEGIES = {
    "highest": "the highest score",
    "lowest": "the lowest score",
    "margin": "the scores nearest to --threshold",
    "chronological": "the earliest",
    "random": "any",
    "bands": "any, evenly over ten bands of scores of equal width",
    "quantiles": "any, evenly over ten bands of scores with equal numbers",
    "density": "any, evenly over the bands of scores that avex-serve density counts in",
    "recordings": "the best of each recording, then the second best of each",
    "sites": "the best of each site",
    "dates": "the best of each date",
    "hours": "the best of each hour of the day",
    "any-site": "any, evenly over sites",
    "any-date": "any, evenly over dates",
    "any-hour": "any, evenly over hours of the day",
    "everywhere": "any, evenly over sites, dates and hours together",
    "nearest": "the most similar to --example",
}


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "suggest",
        help="write a table of what to review next, from the results of a run",
        description="Write a table of windows to review: is this label in it? Fill in the column decision with "
        "present, absent or unsure, and give the table to fit, evaluate or calibrate. avex-serve review does the "
        "same in a browser.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, metavar="RUN_DIR", help="made by avex-serve run")
    parser.add_argument("-n", "--count", type=int, default=100, help="of windows, at most (default: 100)")
    parser.add_argument(
        "--format",
        choices=("csv", "raven"),
        default="csv",
        help="of the table (default: csv; in the order of review)",
    )
    parser.add_argument("--output", type=Path, help="the table (default: a new one in RUN_DIR/reviews)")
    parser.add_argument(
        "--reviewed",
        type=Path,
        action="append",
        metavar="PATH",
        help="leave out what these tables or folders have decisions about (default: RUN_DIR/reviews)",
    )
    add_queue(parser)


def add_queue(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is reviewed, and in which order."""
    group = parser.add_argument_group(
        "what to review",
        "A strategy says what comes first: "
        + "; ".join(f"{name}: {first}" for name, first in STRATEGIES.items())
        + ".",
    )
    group.add_argument("--strategy", choices=tuple(STRATEGIES), default="highest", help="default: highest")
    group.add_argument("--label", action="append", help="review this label; several times (default: all take turns)")
    group.add_argument("--probe", help="the probe whose scores count (default: the first)")
    group.add_argument("--min-score", type=float, metavar="SCORE", help="lowest score to offer")
    group.add_argument("--max-score", type=float, metavar="SCORE", help="highest score to offer")
    group.add_argument(
        "--threshold", type=float, metavar="SCORE", help="which strategy margin is near to (default: 0.5)"
    )
    group.add_argument(
        "--site", action="append", help="a folder of recordings, below the folder of all; several times"
    )
    group.add_argument("--from", dest="first", type=_date, metavar="DATE", help="first date, such as 2026-05-01")
    group.add_argument("--to", dest="last", type=_date, metavar="DATE", help="last date")
    group.add_argument("--hours", type=_hours, metavar="FROM-TO", help="of the day, such as 4-9 or 22-3")
    group.add_argument("--per-recording", type=int, metavar="N", help="at most this number for each label")
    group.add_argument(
        "--example", metavar="FILE:SECONDS", help="a window of the run, for the strategy nearest; needs embeddings"
    )
    group.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the table, and print where it is."""
    from avex_serve.archive.store import Store
    from avex_serve.review.pool import suggest
    from avex_serve.review.sources import read_pool
    from avex_serve.review.suggestions import new_target, write_suggestions

    store = Store(arguments.store)
    if arguments.output is not None and arguments.output.exists():
        raise InputError(f"{arguments.output} exists and may hold decisions: not replaced; name another file")
    pool, results = read_pool(store, arguments.probe)
    queue = read_queue(arguments, store, pool, results)
    found = suggest(pool, queue, arguments.count, arguments.label, _read_reviewed(arguments.reviewed, store))
    if not found:
        raise NotFoundError("nothing is left to review here; choose other labels, scores, sites or times")
    target = arguments.output or new_target(store, arguments.format)
    write_suggestions(found, pool, results, arguments.format, target)
    print(target)
    return 0


def read_queue(arguments: argparse.Namespace, store: "Store", pool: "Pool", results: "ResultSet") -> "Queue":
    """What the options choose; errors as of `find_example`."""
    from avex_serve.review.pool import Queue
    from avex_serve.review.sources import similarity_to

    similarity = None
    if arguments.example is not None:
        similarity = similarity_to(store, pool, results, find_example(arguments.example, pool))
    return Queue(
        strategy=arguments.strategy,
        seed=arguments.seed,
        lowest=arguments.min_score,
        highest=arguments.max_score,
        sites=arguments.site,
        first=arguments.first,
        last=arguments.last,
        hours=arguments.hours,
        per_recording=arguments.per_recording,
        middle=arguments.threshold,
        similarity=similarity,
    )


def find_example(text: str, pool: "Pool") -> int:
    """The window of a pool that ``FILE:SECONDS`` is in.

    Raises:
        InputError: not of that form.
        NotFoundError: no such recording in the run, or no such window.
    """
    path, _, seconds = text.rpartition(":")
    try:
        moment = float(seconds)
    except ValueError:
        moment = math.nan
    if not path or not math.isfinite(moment):
        raise InputError(f"--example {text}: expected FILE:SECONDS, such as dawn.wav:12.5")
    window = pool.window_at(os.path.abspath(path), moment)  # noqa: PTH100 - as `run` writes it
    if window is None:
        raise NotFoundError(f"--example {text}: the run has no window of {path} at {seconds} s")
    return window


def _read_reviewed(given: list[Path] | None, store: "Store") -> "list[Review]":
    from avex_serve.annotations.reviews import read_reviews
    from avex_serve.review.book import REVIEWS, Book

    if given is None:
        return Book(store.folder / REVIEWS).reviews
    return [review for path in given for review in read_reviews(path)]


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; expected one such as 2026-05-01") from None


def _hours(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,2})-(\d{1,2})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}; expected hours of the day such as 4-9 or 22-3")
    return int(found[1]), int(found[2])
