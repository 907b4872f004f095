"""``avex-serve inventory``: the recordings of an archive, from their headers and names."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from avex_serve.cli.output import add_timezone, note, read_timezone

if TYPE_CHECKING:
    from avex_serve.archive.inventory import Row

SOME_UNREADABLE = 1
UNKNOWN = "unknown"


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "inventory",
        help="list recordings with their lengths, times and places, without decoding them",
        epilog="Exit codes: 0, or 1 if some recordings can't be read; their rows say why.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="files, folders, patterns, @list.txt, or @- for standard input"
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    add_timezone(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a row for each recording as soon as it is read."""
    from avex_serve.archive.files import find_recordings
    from avex_serve.archive.inventory import list_recordings

    zone = read_timezone(arguments)
    found = find_recordings(arguments.paths)
    if (hidden := found.note()) is not None:
        note(hidden)
    counts = {True: 0, False: 0}
    write = {"table": _write_table, "csv": _write_csv, "json": _write_json}[arguments.format]
    write(_counted(list_recordings(found.recordings, zone), counts))
    if counts[False]:
        note(f"{counts[False]} of {sum(counts.values())} can't be read")
    return SOME_UNREADABLE if counts[False] else 0


def _counted(rows: "Iterable[Row]", counts: dict[bool, int]) -> "Iterable[Row]":
    for row in rows:
        counts[row.format is not None] += 1
        yield row


def _write_json(rows: "Iterable[Row]") -> None:
    separator = "["
    for row in rows:
        print(separator, json.dumps(row._asdict(), ensure_ascii=False), sep="\n", end="")
        separator = ","
    print("\n]" if separator == "," else "[]")


def _write_csv(rows: "Iterable[Row]") -> None:
    from avex_serve.archive.inventory import Row

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow(["" if value is None else value for value in (*row[:-1], "; ".join(row.warnings))])


def _write_table(rows: "Iterable[Row]") -> None:
    line = "{:<23} {:<7} {:>10} {:>7} {:>2} {:<5} {:>9} {:>9}  {}".format
    print(line("start", "zone", "seconds", "Hz", "ch", "kind", "latitude", "longitude", "path, recorder, warnings"))
    for row in rows:
        place = ["" if each is None else f"{each:.4f}" for each in (row.latitude, row.longitude)]
        seconds = UNKNOWN if row.duration is None else f"{row.duration:.2f}"
        start, zone = row.start or UNKNOWN, (row.offset or UNKNOWN) if row.start else ""
        name = "  ".join([row.path, *([f"[{row.recorder}]"] if row.recorder else []), *row.warnings])
        print(
            line(
                start[:23], zone, seconds, row.sample_rate or "", row.channels or "", row.format or "", *place, name
            )
        )
