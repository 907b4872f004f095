"""The CSV of Wildlife Acoustics' Kaleidoscope."""

import csv
from typing import Final, TextIO

from avex_serve.annotations.table import Table, text_format

HEADER: Final = ("INDIR", "FOLDER", "IN FILE", "OFFSET", "DURATION", "TOP1MATCH", "TOP1DIST")


def write(table: Table, file: TextIO) -> None:
    """Write one file for all recordings; the distance is 1 − score."""
    root = table.root
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for recording, annotations in table.rows:
        folder = table.folder_of(recording)
        place = (root, "" if folder == "." else folder, recording.name)
        for one in annotations:
            times = (f"{one.start:.3f}", f"{one.end - one.start:.3f}")
            writer.writerow((*place, *times, one.label, f"{1 - one.score:.4f}"))


FORMAT = text_format("kaleidoscope", "kaleidoscope.csv", "text/csv", write)
