"""``avex-serve verify``: the evidence of a bundle, run again."""

import argparse
from typing import Any

from avex_serve.cli.output import add_runtime
from avex_serve.errors import VerificationError


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("verify", help="run the bundle's evidence again, on this machine")
    parser.set_defaults(run=run)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    add_runtime(parser)
    parser.add_argument("--full", action="store_true", help="show all checks, not only the worst of each format")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison of each format with the evidence.

    Raises:
        VerificationError: a format differs.
    """
    from avex_serve.evidence.verify import verify_bundle

    report, passed = verify_bundle(
        arguments.bundle, arguments.device, full=arguments.full, runtime=arguments.runtime
    )
    print(report)
    if not passed:
        raise VerificationError(
            f"on this machine {arguments.bundle} differs from its evidence (✗ above); copy it again, or send this "
            "table to its makers"
        )
    return 0
