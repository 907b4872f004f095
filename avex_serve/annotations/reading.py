"""Annotations from the tables that people label in: Raven, Audacity, and CSV with a header.

Raven's times count on the whole sequence of open files. `File Offset (s)` counts in the file and is used where a
table has it. A table without a column of files is about the recording that it is named after:
`dawn.Table.1.selections.txt`, `dawn.BirdNET.results.csv`, `dawn.txt` and `dawn.csv` belong to `dawn.wav`.
"""

import codecs
import csv
import io
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Final, NamedTuple

from avex_serve.errors import InputError, NotFoundError

TABLES: Final = (".csv", ".tsv", ".txt")
# Names of columns, in lower case; the first that a table has counts.
FILES: Final = ("begin path", "begin file", "file", "filename", "audiofilename", "audio_file", "path", "recording")
STARTS: Final = ("start", "start_time", "start (s)", "start time (s)", "begin time (s)", "begin", "onset")
ENDS: Final = ("end", "end_time", "end (s)", "end time (s)", "stop", "offset")
LABELS: Final = (
    "label",
    "species",
    "annotation",
    "label:species",
    "common name",
    "scientific name",
    "species code",
    "class",
)
_SCORED: Final = re.compile(r"(.+) (-?\d+\.\d{4})")  # a label as `audacity` writes it
_DECIMAL: Final = re.compile(r"-?\d+,\d+")
_UNREADABLE: Final = "\ufffd"  # stands for a byte that the encoding doesn't have


class TableError(InputError):
    """A file that is no table of annotations, since it has no labels."""

    def __init__(self, message: str, *, has_times: bool = False) -> None:
        super().__init__(message)
        self.has_times = has_times  # it may be a table of annotations whose labels are in another column


class Annotation(NamedTuple):
    """A labelled stretch of a recording, a row of a table."""

    file: str | None  # as the table says; None: the recording that the table is named after
    start: float  # seconds from the start of the recording
    end: float  # infinite: up to the end of the recording
    label: str  # may be empty, if the table describes recordings only
    fields: Mapping[str, str] = {}  # every column of the row, by its name in lower case

    @property
    def decision(self) -> str:
        """Of a review (see `reviews`): present, absent or unsure; empty for a label that somebody set."""
        return self.fields.get("decision", "")


def read_annotations(path: Path, label_column: str | None = None) -> list[Annotation]:
    """The annotations in a table of any of the formats.

    Args:
        path: of the table.
        label_column: name of the column with the labels; None: the first of `LABELS` that there is.

    Raises:
        NotFoundError: no such file.
        TableError: not a table of annotations.
        InputError: a row without numbers where times are expected, or letters in another encoding than Unicode.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    text = decode_table(data)
    if "\0" in text:
        raise TableError(f"{path} is no table of annotations: it isn't text; expected CSV (in Excel: CSV UTF-8)")
    if _is_number(text.partition("\n")[0].split("\t")[0]):
        annotations = read_audacity(text.split("\n"), path)
    else:
        annotations = _read_columns(text, path, label_column)
    if _UNREADABLE in text and _UNREADABLE.encode() not in data:
        raise InputError(
            f"{path} is not in UTF-8, so its letters can't be told; save it again as UTF-8 (in Excel: CSV UTF-8)"
        )
    return annotations


def decode_table(data: bytes) -> str:
    """The text of a table; letters in another encoding than Unicode become replacement characters."""
    # Excel writes "Unicode text" as UTF-16 with a byte order mark, and "CSV" in the code page of the computer.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return data.decode(encoding, errors="replace")


def recording_of(table: Path) -> str:
    """The name, without its suffix, of the recording that a table is named after."""
    return table.stem.removesuffix(".selections").partition(".Table.")[0].partition(".BirdNET.")[0]


def composed(text: str) -> str:
    """The text with one character for each letter with an accent (Unicode's form NFC)."""
    return unicodedata.normalize("NFC", text)


class Recordings:
    """Recordings by what tables call them: the name of the file in any folder, with or without its suffix.

    Names are compared as they look: macOS and other systems store letters with accents differently.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            for name in {path.name, path.stem}:
                self._by_name[composed(name)].append(path)

    def named(self, name: str) -> list[Path]:
        """Those of that name, or that the last part of a path names; it may have either kind of slash."""
        return self._by_name.get(composed(PureWindowsPath(name).name), [])

    def find(self, name: str, folder: Path) -> Path | None:
        """The recording that a table in a folder means; of several with that name, the one in the same folder.

        Raises:
            InputError: several with that name, and not one of them in the folder.
        """
        found = self.named(name)
        beside = [path for path in found if path.parent == folder]
        if len(found) > 1 and len(beside) != 1:
            raise InputError(
                f"{name} may mean {len(found)} recordings, such as {found[0]} and {found[1]}; give their paths"
            )
        return next(iter(beside or found), None)


def read_audacity(lines: Iterable[str], path: Path) -> list[Annotation]:
    """Audacity's label track: start, end, label. Lines of a spectral selection begin with a backslash."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("\\"):
            continue
        cells = line.split("\t")
        start, end = (_seconds(cell, path, number) for cell in (*cells, "")[:2])
        label, fields = cells[2] if len(cells) > 2 else "", {}
        if (scored := _SCORED.fullmatch(label.strip())) is not None:
            label, fields = scored[1], {"score": scored[2]}
        rows.append(_annotation(None, start, end, label, fields, path, number))
    return rows


def _read_columns(text: str, path: Path, label_column: str | None) -> list[Annotation]:
    delimiter = max("\t,;", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    names = [name.strip().lower() for name in next(reader, [])]
    start, end, file = _first(names, STARTS), _first(names, ENDS), _first(names, FILES)
    label = _first(names, LABELS if label_column is None else (label_column.lower(),))
    if label is None and (label_column is not None or file is None):
        expected = label_column or " or ".join(LABELS)
        raise TableError(
            f"{path} is no table of annotations: no column {expected}; it has {', '.join(names)}",
            has_times=start is not None and end is not None,
        )
    if (start is None) != (end is None):
        raise InputError(f"{path} has a column {start or end}, but none for the other end of an annotation")
    rows = []
    for cells in reader:
        number = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        fields = {name: cell.strip() for name, cell in zip(names, cells, strict=False)}
        first, last = 0.0, math.inf
        if delimiter != ",":  # where Excel separates columns so, it may write 0,5
            fields |= {
                name: cell.replace(",", ".")
                for name, cell in fields.items()
                if name not in (file, label) and _DECIMAL.fullmatch(cell)
            }
        if start is not None and end is not None and (fields.get(start) or fields.get(end)):
            first, last = _seconds(fields.get(start, ""), path, number), _seconds(fields.get(end, ""), path, number)
        if offset := fields.get("file offset (s)"):  # Raven's Begin Time counts on the whole sequence of files
            first, last = _seconds(offset, path, number), _seconds(offset, path, number) + last - first
        name = (fields.get(file) if file else None) or fields.get("begin file") or None
        rows.append(_annotation(name, first, last, fields.get(label, "") if label else "", fields, path, number))
    if "begin time (s)" in names and "file offset (s)" not in names and len({row.file for row in rows}) > 1:
        raise InputError(
            f"{path} has selections of several files without File Offset (s): its times can't be told apart; add "
            "this measurement in Raven and save the table again"
        )
    if "view" in names:  # Raven writes a row for each view of a selection, waveform and spectrogram
        return list({row[:4]: row for row in rows}.values())
    return rows


def _annotation(
    file: str | None, start: float, end: float, label: str, fields: Mapping[str, str], path: Path, number: int
) -> Annotation:
    if not 0 <= start <= end:
        raise InputError(
            f"{path}, line {number}: from {start} to {end} s; expected a start of 0 or more, then the end"
        )
    return Annotation(file, start, end, label.strip(), fields)


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _seconds(cell: str, path: Path, number: int) -> float:
    if not _is_number(cell):
        raise InputError(f"{path}, line {number}: {cell!r} is not a time; expected seconds, such as 12.5")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
