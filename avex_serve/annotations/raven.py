"""Selection tables of Raven.

Raven reads a table in two ways. As a *selection table* of an open sequence of files, Begin Time and End Time count
from the start of the first file. As a *sound selection table*, Begin Path and File Offset say where a sound is. Both
are written, so a file without detections moves the times of those behind it all the same.
"""

from collections.abc import Sequence
from typing import TextIO

from avex_serve.annotations.table import Table, one_line, text_format

HEADER = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tBegin File\tBegin Path\t"
    "File Offset (s)\tLabel\tScore"
)


def write(table: Table, file: TextIO, blank: Sequence[str] = ()) -> None:
    """Write a table of all recordings as one sequence, in the order of their paths.

    Args:
        table: the detections.
        file: what to write to.
        blank: names of more columns, which people fill in.
    """
    before = 0.0  # seconds of the files before this one
    selection = 0
    columns = [HEADER, *(["Probability"] if table.calibrated else []), *blank]
    file.write("\t".join(columns) + "\n")
    for recording, annotations in table.rows:
        name, path = _cell(recording.name), _cell(recording.path)
        for one in annotations:
            selection += 1
            known = "" if one.probability is None else f"{one.probability:.4f}"
            file.write(
                f"{selection}\tSpectrogram 1\t1\t{before + one.start:.6f}\t{before + one.end:.6f}\t0.0\t"
                f"{one.high_frequency(recording):.1f}\t{name}\t{path}\t{one.start:.6f}\t{_cell(one.label)}\t"
                f"{one.score:.4f}" + (f"\t{known}" if table.calibrated else "") + "\t" * len(blank) + "\n"
            )
        before += recording.duration


def _cell(text: str) -> str:
    """Raven knows no quotes, and programs that read its tables take one at the start of a cell for a quotation."""
    text = one_line(text)
    return "'" + text[1:] if text.startswith('"') else text


FORMAT = text_format("raven", "raven.selections.txt", "text/tab-separated-values", write)
