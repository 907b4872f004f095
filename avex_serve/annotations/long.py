"""A row for each detection, with everything that is known about it: CSV, NDJSON and Parquet."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from avex_serve.annotations.table import Annotation, Format, Recording, Table, absolute_time, text_format
from avex_serve.writing import new_file, new_path

# Name and type, as DuckDB calls it.
COLUMNS: Final = {
    "file": "VARCHAR",
    "start": "DOUBLE",
    "end": "DOUBLE",
    "label": "VARCHAR",
    "score": "DOUBLE",
    "start_time": "VARCHAR",  # ISO 8601, with the zone if that is known
    "bundle": "VARCHAR",
    "version": "VARCHAR",
    "probe": "VARCHAR",
    "recording": "VARCHAR",  # SHA-256 of the file
}
PROBABILITY: Final = "probability"  # a further column, if a bundle is calibrated


def write_csv(table: Table, file: TextIO) -> None:
    """Write CSV; an empty cell is an unknown time or probability."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_columns(table))
    for row in _rows(table):
        writer.writerow(row)


def write_ndjson(table: Table, file: TextIO) -> None:
    """Write a line of JSON for each detection; null is an unknown time or probability."""
    for row in _rows(table):
        file.write(json.dumps(dict(zip(_columns(table), row, strict=True)), ensure_ascii=False) + "\n")


def write_parquet(table: Table, target: Path) -> None:
    """Write a Parquet file, whose metadata ``avex_serve`` says what the rows were made from."""
    from avex_serve.database import connect, quoted

    rows = target.with_name(f".{target.name}.ndjson")
    try:
        with new_file(rows) as file:
            write_ndjson(table, file)
        columns = ", ".join(f"'{name}': '{kind}'" for name, kind in _columns(table).items())
        about = quoted(json.dumps(table.about, ensure_ascii=False, sort_keys=True))
        with new_path(target) as unfinished, connect() as database:
            database.execute(
                f"COPY (SELECT * FROM read_ndjson({quoted(rows)}, columns = {{{columns}}})) TO "
                f"{quoted(unfinished)} (FORMAT parquet, COMPRESSION zstd, KV_METADATA {{avex_serve: {about}}})"
            )
    finally:
        rows.unlink(missing_ok=True)


def _columns(table: Table) -> dict[str, str]:
    return {**COLUMNS, PROBABILITY: "DOUBLE"} if table.calibrated else COLUMNS


def _rows(table: Table) -> Iterator[tuple[Any, ...]]:
    for recording, annotations in table.rows:
        for one in annotations:
            row = _row(recording, one)
            known = None if one.probability is None else float(f"{one.probability:.9g}")
            yield (*row, known) if table.calibrated else row


def _row(recording: Recording, one: Annotation) -> tuple[Any, ...]:
    # Nine digits tell any two float32 apart, and times to the nanosecond.
    times = (round(one.start, 9), round(one.end, 9))
    place = (one.bundle, one.version, one.probe, recording.digest)
    score = float(f"{one.score:.9g}")
    return (recording.path, *times, one.label, score, absolute_time(recording, one.start) or None, *place)


FORMATS = (
    text_format("csv", "detections.csv", "text/csv", write_csv),
    text_format("ndjson", "detections.ndjson", "application/x-ndjson", write_ndjson),
    Format("parquet", "detections.parquet", write_parquet, "application/vnd.apache.parquet"),
)
