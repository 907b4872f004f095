"""The CSV of BirdNET-Analyzer."""

import csv
import re
from typing import Final, TextIO

from avex_serve.annotations.table import Table, text_format

HEADER: Final = ("Start (s)", "End (s)", "Scientific name", "Common name", "Confidence", "File")
# BirdNET's labels: genus and species, an underscore, and a common name.
BOTH_NAMES: Final = re.compile(r"([A-Z][a-z-]+ [a-z-]+(?: [a-z-]+)?)_(.+)", re.DOTALL)


def names(label: str) -> tuple[str, str]:
    """Scientific and common name of a label; a label that isn't both is either."""
    match = BOTH_NAMES.fullmatch(label)
    return (match[1], match[2]) if match else (label, label)


def write(table: Table, file: TextIO) -> None:
    """Write one file for all recordings."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for recording, annotations in table.rows:
        for one in annotations:
            times = (f"{one.start:.3f}", f"{one.end:.3f}")
            writer.writerow((*times, *names(one.label), f"{one.score:.4f}", recording.path))


FORMAT = text_format("birdnet", "birdnet.csv", "text/csv", write)
