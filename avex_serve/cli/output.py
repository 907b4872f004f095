"""What commands print, and where; values of options that several of them have."""

import io
import os
import sys
from typing import Literal

from avex_serve.errors import AvexServeError


def escape_unprintable() -> None:
    """Make standard output escape characters that it can't show: labels and file names may have any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard further output: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: AvexServeError) -> int:
    """Print an error; returns its exit code."""
    note(str(error))
    return error.exit_code


def parse_channel(text: str) -> int | Literal["mix"]:
    """The value of an option that names a channel."""
    return "mix" if text == "mix" else int(text)


def note(text: str) -> None:
    """Print a line that is no result."""
    print(f"avex-serve: {text}", file=sys.stderr)
