"""``avex-serve report``: the results of a run as one page of HTML."""

import argparse
from pathlib import Path
from typing import Any

from avex_serve.cli.tables import add_selection, read_choice
from avex_serve.errors import InputError


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("report", help="one HTML page of the results of a run, with pictures and sounds")
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, metavar="DIR", help="made by avex-serve run")
    parser.add_argument("--output", type=Path, help="the page (default: DIR/report.html)")
    parser.add_argument(
        "--examples", type=int, default=3, help="for each label, with picture and sound (default: 3)"
    )
    add_selection(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and print where it is."""
    from avex_serve.archive.report import MOST_EXAMPLES, PAGE, make_report
    from avex_serve.archive.store import Store
    from avex_serve.seeing.pictures import check_installed
    from avex_serve.writing import new_file

    check_installed()
    if not 0 <= arguments.examples <= MOST_EXAMPLES:
        raise InputError(f"--examples is {arguments.examples}; expected 0 to {MOST_EXAMPLES}")
    store = Store(arguments.store)
    target = arguments.output or store.folder / PAGE
    text = make_report(store, read_choice(arguments), arguments.examples)
    with new_file(target) as file:
        file.write(text)
    print(target)
    return 0
