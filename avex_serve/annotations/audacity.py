"""Label tracks of Audacity: a file for each recording, in folders like those of the recordings."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from avex_serve.annotations.table import Annotation, Format, Table, one_line
from avex_serve.writing import new_folder

MARKER = "labels.of.audacity"


def write(table: Table, target: Path) -> None:
    """Write a label track for each recording, an empty one where nothing was found."""
    root = table.root
    with new_folder(target, MARKER) as folder:
        (folder / MARKER).touch()
        for recording, annotations in table.rows:
            file = folder / (os.path.relpath(recording.path, root) + ".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_track(annotations), "utf-8", newline="")


def write_track(table: Table, file: TextIO) -> None:
    """Write the label track of one recording."""
    for _, annotations in table.rows:
        file.write(_track(annotations))


def _track(annotations: Sequence[Annotation]) -> str:
    return "".join(f"{one.start:.6f}\t{one.end:.6f}\t{one_line(one.label)} {one.score:.4f}\n" for one in annotations)


FORMAT = Format("audacity", "audacity", write, "text/plain", write_track)
