"""The CSV of Wildlife Acoustics' Kaleidoscope."""

import csv
import os
from pathlib import Path
from typing import Final

from avex_serve.annotations.table import Format, Table, new_file

HEADER: Final = ("INDIR", "FOLDER", "IN FILE", "OFFSET", "DURATION", "TOP1MATCH", "TOP1DIST")


def write(table: Table, target: Path) -> None:
    """Write one file for all recordings; the distance is 1 − score."""
    root = table.root
    with new_file(target) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for recording, annotations in table.rows:
            folder = os.path.relpath(os.path.dirname(recording.path), root)  # noqa: PTH120
            place = (root, "" if folder == "." else folder, recording.name)
            for one in annotations:
                times = (f"{one.start:.3f}", f"{one.end - one.start:.3f}")
                writer.writerow((*place, *times, one.label, f"{1 - one.score:.4f}"))


FORMAT = Format("kaleidoscope", "kaleidoscope.csv", write)
