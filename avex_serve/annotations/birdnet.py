"""The CSV of BirdNET-Analyzer."""

import csv
import re
from typing import Final, TextIO

from avex_serve.annotations.table import Table, text_format

HEADER: Final = ("Start (s)", "End (s)", "Scientific name", "Common name", "Confidence", "File")
# BirdNET's labels: genus and species, an underscore, and a common name; or one name twice, such as `Dog_Dog`.
BOTH_NAMES: Final = re.compile(r"([A-Z][a-z-]+ [a-z-]+(?: [a-z-]+)?)_(.+)", re.DOTALL)
TWICE: Final = re.compile(r"(.+)_\1", re.DOTALL)


def names(label: str) -> tuple[str, str]:
    """Scientific and common name of a label; a label that isn't both is either."""
    if (both := BOTH_NAMES.fullmatch(label)) is not None:
        return both[1], both[2]
    twice = TWICE.fullmatch(label)
    return (label, label) if twice is None else (twice[1], twice[1])


def write(table: Table, file: TextIO) -> None:
    """Write one file for all recordings."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for recording, annotations in table.rows:
        for one in annotations:
            times = (f"{one.start:.3f}", f"{one.end:.3f}")
            writer.writerow((*times, *names(one.label), f"{one.score:.4f}", recording.path))


FORMAT = text_format("birdnet", "birdnet.csv", "text/csv", write)
