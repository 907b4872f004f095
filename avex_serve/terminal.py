"""Standard output of the commands: characters that it can't show, and a reader that goes away."""

import io
import os
import sys


def escape_unprintable() -> None:
    """Let standard output escape what it can't show: file names are bytes and labels are Unicode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Let standard output go nowhere, since nobody reads on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
