"""``avex-serve density``: the share of windows that hold a sound, from reviewed windows."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "density",
        help="estimate how many windows hold a sound, by label and site, from reviewed windows",
        description="Estimate the call density: the share of windows that hold a sound, by label and site, with "
        "intervals of 95 %. No threshold has a part in it. The reviewed windows must be drawn by chance from bands "
        "of scores, or from all windows.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, metavar="RUN_DIR", help="made by avex-serve run")
    parser.add_argument(
        "reviewed",
        type=Path,
        metavar="REVIEWED",
        help="decisions: CSV with the columns file, start, end, label, decision (present, absent, unsure), or a "
        "folder of such files",
    )
    parser.add_argument("--probe", help="whose scores make the bands, if several have a label")
    parser.add_argument(
        "--sites", type=Path, metavar="TABLE", help="CSV with the columns file and site (default: folders are sites)"
    )
    parser.add_argument("--bands", type=int, default=8, help="of scores, at most (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as CSV too")


def run(arguments: argparse.Namespace) -> int:
    """Print the densities."""
    from avex_serve.annotations.reviews import read_reviews
    from avex_serve.archive.density import densities_table, densities_text, read_sites, store_densities
    from avex_serve.archive.store import Store
    from avex_serve.writing import new_file

    found = store_densities(
        Store(arguments.store),
        read_reviews(arguments.reviewed),
        probe=arguments.probe,
        sites=None if arguments.sites is None else read_sites(arguments.sites),
        bands=arguments.bands,
        seed=arguments.seed,
    )
    print(densities_text(found))
    if arguments.output is not None:
        with new_file(arguments.output) as file:
            file.write(densities_table(found))
    return 0
