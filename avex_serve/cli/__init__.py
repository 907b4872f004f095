"""``avex-serve``: one module for each command.

A module adds the command's options in `add_parser` and names the function that runs it. This function imports what
the command needs, so that a small command starts at once.
"""

import argparse
from collections.abc import Sequence

from avex_serve import __version__
from avex_serve.cli import (
    calibrate,
    classify,
    compare,
    demo,
    density,
    evaluate,
    fit,
    info,
    inventory,
    merge,
    plot,
    predict,
    report,
    retrain,
    review,
    run,
    settings,
    status,
    suggest,
    tables,
    tune,
    verify,
)
from avex_serve.cli.output import drop_output, escape_unprintable, fail, note
from avex_serve.errors import AvexServeError

COMMANDS = (
    inventory,
    predict,
    run,
    merge,
    status,
    tables,
    classify,
    report,
    plot,
    suggest,
    review,
    density,
    fit,
    retrain,
    evaluate,
    compare,
    calibrate,
    info,
    verify,
    tune,
    settings,
    demo,
)


INTERRUPTED = 130  # exit code of a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or the error's own (see `avex_serve.errors`)."""
    arguments = _parser().parse_args(argv)
    escape_unprintable()
    try:
        return int(arguments.run(arguments))
    except AvexServeError as error:
        return fail(error)
    except KeyboardInterrupt as error:
        note(f"interrupted; {error}" if str(error) else "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `avex-serve predict … | head`: the reader has what it wanted
        drop_output()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avex-serve", description="Name the sounds in recordings with a bundle.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for each in commands.choices.values():
        each.add_argument("--version", action="version", version=__version__)
    return parser
