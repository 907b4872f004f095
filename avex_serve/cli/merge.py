"""``avex-serve merge``: the shards of a run as one store."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from avex_serve.cli.run import SOME_FAILED
from avex_serve.cli.tables import add_choice, read_choice, write_tables
from avex_serve.errors import InputError


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "merge",
        help="join the shards of a run: the result is that of a run without shards",
        epilog="Exit codes: 0, all recordings are done; 1, some failed; 2, shards are missing, not done or differ.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("shards", nargs="+", metavar="DIR", help="the --out of the shards, or each shard")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where the joined results are kept: a folder or a URL"
    )
    add_choice(parser)


def run(arguments: argparse.Namespace) -> int:
    """Join them, and write the tables; the exit code tells whether recordings failed."""
    from avex_serve.archive.shards import check_shards, find_stores, merge
    from avex_serve.archive.store import adding, opened
    from avex_serve.archive.tables import check_choice

    places = find_stores(arguments.shards)
    if Path(arguments.out).resolve() in {Path(place).resolve() for place in places}:
        raise InputError(f"{arguments.out} is a shard itself; choose an empty or new folder")
    choice = read_choice(arguments)
    with ExitStack() as stack:
        shards = check_shards([stack.enter_context(opened(place)) for place in places])
        scores = [results for results in shards[0].current() if results.kind == "scores"]
        if scores:
            check_choice(scores, choice)
        store = stack.enter_context(adding(arguments.out))
        entries = merge(shards, store)
        tables = write_tables(store, arguments.format, choice) if scores else []
    for table in tables:
        print(table)
    failed = sum(entry.error is not None for entry in entries)
    print(f"{len(places)} shards: {len(entries) - failed} recordings done, {failed} failed")
    return SOME_FAILED if failed else 0
