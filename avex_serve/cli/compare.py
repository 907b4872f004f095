"""``avex-serve compare``: two reports on the same recordings, side by side."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="compare two reports of fit or evaluate",
        description="Compare two reports of fit or evaluate on the same recordings. Differences have intervals from "
        "a paired bootstrap over recordings (or the groups of --group-by).",
    )
    parser.set_defaults(run=run)
    parser.add_argument("a", type=Path, metavar="A", help="folder of a report, or its evaluation.json")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures of both."""
    import msgspec

    from avex_serve.training.compare import compare_reports, table
    from avex_serve.writing import new_file

    comparison = compare_reports(arguments.a, arguments.b, arguments.seed)
    print(table(comparison))
    if arguments.output is not None:
        with new_file(arguments.output) as file:
            file.write(msgspec.json.format(msgspec.json.encode(comparison).decode(), indent=1) + "\n")
    return 0
