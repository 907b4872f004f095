"""``avex-serve settings``: the settings of the service with their values."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("settings", help="list the settings of the service with their values")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="as a JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print each setting: its variable, value and meaning."""
    from avex_serve.service.settings import list_settings, table

    settings = list_settings()
    print(json.dumps([setting._asdict() for setting in settings], indent=2) if arguments.json else table(settings))
    return 0
