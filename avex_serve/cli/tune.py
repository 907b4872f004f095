"""``avex-serve tune``: what serves a bundle fastest on this machine."""

import argparse
from typing import Any

from avex_serve.cli.output import note


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "tune",
        help="measure what serves a bundle fastest on this machine",
        description="Measure each engine, precision and number of threads that this machine has, after a check that "
        "its answers are right. Run it while nothing else does.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the fastest for this bundle and processor, in the folder AVEX_BUNDLE_CACHE: the service uses it "
        "where these settings are auto",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table and the settings of the fastest, and keep them if asked to."""
    from avex_serve.bundles import bundle_cache
    from avex_serve.evidence.tuning import check_folder, keep, table, tune

    if arguments.save:
        check_folder(bundle_cache())  # before minutes of measuring
    tuning = tune(arguments.bundle, lambda name: note(f"checking {name}"))
    print(table(tuning))
    usual = " (as without them)" if tuning.best is tuning.usual else ""
    print(f"\nset: {tuning.best.choice.settings()}{usual}")
    if arguments.save:
        print(f"kept for this processor in {keep(tuning, bundle_cache())}")
    return 0
