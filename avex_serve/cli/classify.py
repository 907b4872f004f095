"""``avex-serve classify``: another probe on the stored embeddings of a run."""

import argparse
from pathlib import Path
from typing import Any

from avex_serve.cli.output import interruptible
from avex_serve.cli.progress import reporting
from avex_serve.cli.run import GO_ON, add_progress, finish
from avex_serve.cli.tables import add_choice, read_choice, write_tables


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("classify", help="score the stored embeddings of a run with another probe")
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, metavar="DIR", help="made by avex-serve run --embeddings")
    parser.add_argument(
        "bundle", help="folder or URL, made by avex-export --offline, of a probe on the same backbone"
    )
    add_progress(parser)
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compute what is missing, and write the tables."""
    from avex_serve.archive.run import classify
    from avex_serve.archive.store import Store
    from avex_serve.evidence.first import open_checked

    Store(arguments.store)  # raises if there is none, where `writing` would make one
    choice = read_choice(arguments)
    with open_checked(arguments.bundle, "cpu") as reader, Store.writing(arguments.store) as store:
        with interruptible(GO_ON), reporting(arguments.progress) as report:
            progress = classify(store, reader, report)
        tables = write_tables(store, arguments.format, choice)
    return finish(progress, tables, arguments.progress)
