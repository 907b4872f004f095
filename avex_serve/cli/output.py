"""What commands print, and where; options that several of them have."""

import argparse
import contextlib
import csv
import io
import math
import os
import signal
import sys
from collections.abc import Iterator
from datetime import tzinfo
from pathlib import Path
from typing import Literal

from avex_serve.errors import AvexServeError, InputError, NotFoundError


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


@contextlib.contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Let SIGTERM, which schedulers of clusters send, end the block as Ctrl-C does; `main` prints what is kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_channel(text: str) -> int | Literal["mix"]:
    """The value of an option that names a channel."""
    if text == "mix" or (text.isdecimal() and int(text)):
        return "mix" if text == "mix" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no channel; expected a number from 1, or mix")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options of where a bundle runs, and which of its graphs."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "int8"), default="auto")
    add_runtime(parser)


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add the option of what runs the graph."""
    parser.add_argument(
        "--runtime",
        choices=("auto", "openvino"),
        default="auto",
        help="openvino: float32 on the CPU by OpenVINO (pip install 'avex-serve[openvino]')",
    )


def add_timezone(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the option that `read_timezone` reads."""
    parser.add_argument(
        "--timezone",
        metavar="ZONE",
        help="of times without an offset, such as Australia/Brisbane or +10:00 (default: they stay without one)",
    )


def read_timezone(arguments: argparse.Namespace) -> tzinfo | None:
    """The zone of times without an offset, None if it stays unknown; InputError for another text."""
    from avex_serve.audio.recorder import parse_zone

    try:
        return None if arguments.timezone is None else parse_zone(arguments.timezone)
    except ValueError as error:
        raise InputError(f"--timezone: {error}") from None


def add_shown(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the options of which labels are shown, and how consecutive windows become one row."""
    parser.add_argument(
        "--label", action="append", metavar="LABEL|@FILE", help="show this label, or those of a file; several times"
    )
    parser.add_argument(
        "--merge", type=float, metavar="GAP", help="join windows of a label that are at most GAP seconds apart"
    )
    parser.add_argument(
        "--merge-score", choices=("max", "mean"), default="max", help="of joined windows (default: max)"
    )


def read_labels(given: list[str] | None) -> tuple[str, ...] | None:
    """The labels that ``--label`` names; None: all."""
    if given is None:
        return None
    from avex_serve.bundles.labels import read_label_file

    return tuple(
        label for one in given for label in (read_label_file(Path(one[1:])) if one.startswith("@") else [one])
    )


def note(text: str) -> None:
    """Print a line that is no result."""
    print(f"avex-serve: {text}", file=sys.stderr)


def read_threshold(given: str | None) -> float | dict[str, float] | None:
    """The value of ``--threshold``: a number, or the rows of a CSV file of label,threshold.

    Raises:
        InputError: a file that can't be used.
        NotFoundError: neither a number nor a file.
    """
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        path = Path(given)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise NotFoundError(f"--threshold {given!r} is neither a number nor a file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if rows and rows[0] == ["label", "threshold"]:
        del rows[0]
    thresholds: dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        try:
            label, text = row
            thresholds[label] = float(text)
        except ValueError:
            raise InputError(f"{path}, row {number}: {','.join(row)}; expected label,threshold") from None
        if not math.isfinite(thresholds[label]):
            raise InputError(f"{path}, row {number}: a threshold of {text}; expected a finite number")
    if len(thresholds) < len(rows) or not rows:
        raise InputError(
            f"{path} has {'a label twice' if rows else 'no thresholds'}; expected one row for each label"
        )
    return thresholds
