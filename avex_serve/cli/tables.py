"""``avex-serve tables``: the results of a run as a table of another program."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.output import add_shown, add_timezone, read_labels, read_threshold, read_timezone
from avex_serve.errors import InputError

if TYPE_CHECKING:
    from avex_serve.archive.store import Store
    from avex_serve.archive.tables import Choice

FORMATS = ("csv", "ndjson", "parquet", "raven", "audacity", "birdnet", "kaleidoscope", "aoef", "camtrap-dp")


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("tables", help="write the results of a run as a table; needs no inference")
    parser.set_defaults(run=run)
    parser.add_argument("store", metavar="DIR", help="made by avex-serve run: a folder or a URL")
    parser.add_argument("--output", type=Path, help="the file, or the folder of formats that need several files")
    add_choice(parser)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the options of a table's format and of what it shows."""
    add_selection(parser).add_argument(
        "--format", action="append", choices=FORMATS, help="of the table; several times for several (default: csv)"
    )


def add_selection(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Add the options that choose which detections are shown."""
    group = parser.add_argument_group(
        "detections", "None of these needs inference: change them as often as you like."
    )
    group.add_argument(
        "--threshold",
        metavar="SCORE|FILE",
        help="lowest score to show, or a CSV file of label,threshold (default: those of the bundle, else 0.5)",
    )
    group.add_argument("--top-k", type=int, help="show at most this number of labels for each window")
    add_shown(group)
    add_timezone(group)
    return group


def run(arguments: argparse.Namespace) -> int:
    """Write the tables, and print where they are."""
    from avex_serve.archive.store import opened

    if arguments.output is not None and len(arguments.format or ()) > 1:
        raise InputError("--output is for one --format; leave it out to write several into the store")
    with opened(arguments.store) as store:
        for target in write_tables(store, arguments.format, read_choice(arguments), arguments.output):
            print(target)
    return 0


def write_tables(
    store: "Store", formats: Sequence[str] | None, choice: "Choice", output: Path | None = None
) -> list[str]:
    """Write a table in each format, by default CSV and into the store; returns where they are.

    Raises:
        InputError: a table that would be replaced has decisions of people.
    """
    from avex_serve.annotations.formats import FORMATS as WRITERS
    from avex_serve.annotations.reviews import has_decisions
    from avex_serve.archive.store import TABLES
    from avex_serve.archive.tables import make_table

    targets = []
    for name in dict.fromkeys(formats or ["csv"]):
        target = output or store.folder / TABLES / WRITERS[name].target
        if has_decisions(target):
            raise InputError(
                f"{target} has a column of decisions: not replaced. Move it to keep them, and run avex-serve tables"
            )
        WRITERS[name].write(make_table(store, choice), target)
        targets.append(store.keep_table(target))
    return targets


def read_choice(arguments: argparse.Namespace) -> "Choice":
    """What the options choose.

    Raises:
        InputError: a number or a file that can't be used.
        NotFoundError: no such file.
    """
    from avex_serve.archive.tables import Choice

    return Choice(
        threshold=read_threshold(arguments.threshold),
        top_k=arguments.top_k,
        labels=read_labels(arguments.label),
        merge_gap=arguments.merge,
        zone=read_timezone(arguments),
        merge_mean=arguments.merge_score == "mean",
    )
