"""``avex-serve demo``: the way from a probe to a running service."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("demo", help="export the demo probe, serve it and query it over HTTP and gRPC")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from avex_serve.demo.run import run_demo

    run_demo()
    return 0
