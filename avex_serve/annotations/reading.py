"""Annotations from tables: Raven, Audacity, BirdNET, Kaleidoscope, and CSV with a header.

Raven's times count on the whole sequence of open files. `File Offset (s)` counts in the file and is used where a
table has it. A table without a column of files is about the recording that it is named after:
`dawn.Table.1.selections.txt`, `dawn.BirdNET.results.csv`, `dawn.txt` and `dawn.csv` belong to `dawn.wav`.

`tests/annotations/test_layouts.py` has an example of each layout, which comes from the program that writes it.
"""

import codecs
import csv
import io
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import Final, NamedTuple

from avex_serve.annotations.birdnet import names as both_names
from avex_serve.errors import InputError, NotFoundError

TABLES: Final = (".csv", ".tsv", ".txt")
# Names of columns, in lower case and without the asterisks of Kaleidoscope; the first that a table has counts.
FILES: Final = (
    "begin path",
    "begin file",
    "file",
    "filename",
    "filepath",
    "audiofilename",
    "audio_file",
    "path",
    "recording",
    "in file",
    "input",
)
STARTS: Final = ("start", "start_time", "start (s)", "start time (s)", "begin time (s)", "begin", "onset")
ENDS: Final = ("end", "end_time", "end (s)", "end time (s)", "stop", "offset")
# Other names of these columns, such as "window_start" (perch-hoplite) and "Start (sec)".
_START: Final = re.compile(
    r"(?:(?:t|time|window|clip)[ _])?(?:start|begin|onset)(?:[ _]\(?s(?:ec)?\)?)?|timestamp_s"
)
_END: Final = re.compile(r"(?:(?:t|time|window|clip)[ _])?(?:end|stop|offset)(?:[ _]\(?s(?:ec)?\)?)?")
_VERIFIED: Final = "manual id"  # labels of people, in tables of Kaleidoscope
LABELS: Final[tuple[str, ...]] = (
    "label",
    "species",
    "annotation",
    "label:species",
    "common name",
    "common_name",
    "scientific name",
    "scientific_name",
    "species code",
    "species_name",
    "class",
    _VERIFIED,
    "top1match",
    "auto id",
)
SCORES: Final = ("score", "confidence", "probability", "logits")
# Columns to take the label from where the first is empty, as in rows of BirdNET's labels that are a single name.
_INSTEAD: Final = {
    "common name": ("scientific name",),
    "common_name": ("scientific_name",),
}
_OFFSET: Final = "file offset (s)"
_NAMED: Final = "name"  # the labels of BriteKit, in tables of times; others have files there
_SCORED: Final = re.compile(r"(.+)(?: (?=-?\d+\.\d{4}$)|;(?=\d\.\d+$))(.+)")  # as `audacity` and BriteKit write it
_DECIMAL: Final = re.compile(r"-?\d+,\d+")
# Hours, minutes and seconds from the start of a recording; the date is what BirdNET-Go has for none.
_CLOCK: Final = re.compile(r"(?:0001-01-01 )?(\d+):([0-5]\d):([0-5]\d(?:\.\d*)?)")
_SEPARATOR: Final = re.compile(r'"?sep=[^\n]"?\s*?\n', re.IGNORECASE)
_NOTHING: Final = "nocall"  # what BirdNET-Analyzer writes for a recording without detections
_UNREADABLE: Final = "\ufffd"  # stands for a byte that the encoding doesn't have


class TableError(InputError):
    """A file that is no table of annotations, since it has no labels."""

    def __init__(self, message: str, *, has_times: bool = False) -> None:
        super().__init__(message)
        self.has_times = has_times  # it may be a table of annotations whose labels are in another column


class TableRow(NamedTuple):
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


def read_annotations(path: Path, label_column: str | None = None) -> list[TableRow]:
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
    if "\n" not in text:
        text = text.replace("\r", "\n")  # "CSV (Macintosh)" of Excel
    if not text.strip() and path.suffix.lower() == ".txt":
        annotations = []  # a label track of nothing
    elif _is_number(text.partition("\n")[0].split("\t")[0]):
        annotations = read_audacity(text.split("\n"), path)
    else:
        try:
            annotations = _read_columns(text, path, label_column)
        except csv.Error as error:
            raise TableError(f"{path} is no table of annotations: {error}") from None
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
    stem = table.stem.removesuffix(".selections").partition(".Table.")[0].partition(".BirdNET.")[0]
    return stem.removesuffix("_scores")  # of BriteKit


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
        """The recording that a table in a folder means.

        Of several with that name, the one at the end of the path that the table gives, else the one in the table's
        folder, else the one in a folder of the same names: programs write tables into a copy of the folders.

        Raises:
            InputError: several with that name, and none of these ways tells them apart.
        """
        found = self.named(name)
        if len(found) < 2:
            return next(iter(found), None)
        beside = [path for path in found if path.parent == folder]
        parts = PureWindowsPath(name).parts
        for chosen in (_ending(found, parts), beside, _ending(found, (*folder.parts, *parts))):
            if len(chosen) == 1:
                return chosen[0]
        raise InputError(
            f"{name} may mean {len(found)} recordings, such as {found[0]} and {found[1]}; give their paths"
        )


def _ending(paths: Sequence[Path], parts: Sequence[str]) -> list[Path]:
    """Those whose folders, below the deepest one that holds all the paths, are the last folders of other parts."""
    folders = [[composed(part) for part in path.parts[:-1]] for path in paths]
    pairs = zip(min(folders), max(folders), strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    given = [composed(part) for part in parts[:-1]]
    return [
        path
        for path, folder in zip(paths, folders, strict=True)
        if (own := folder[common:]) and given[-len(own) :] == own
    ]


def read_audacity(lines: Iterable[str], path: Path) -> list[TableRow]:
    """Audacity's label track: start, end, label. Lines of a spectral selection begin with a backslash.

    BirdNET-Analyzer adds the confidence to each line, which Audacity ignores.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("\\"):
            continue
        cells = line.split("\t")
        start, end = (_seconds(cell, path, number) for cell in (*cells, "")[:2])
        label, fields = cells[2].strip() if len(cells) > 2 else "", {}
        if len(cells) == 4 and _is_number(cells[3]):
            names = label if "_" in label else label.replace(", ", "_", 1)
            common = both_names(names)[1]
            label, fields = label if common == names else common, {"score": cells[3].strip()}
        elif (scored := _SCORED.fullmatch(label)) is not None:
            label, fields = scored[1], {"score": scored[2]}
        rows.append(_annotation(None, start, end, label, fields, path, number))
    return rows


class _Layout(NamedTuple):
    """The columns of a table that say what its rows are."""

    names: Sequence[str]
    file: str | None
    start: str | None
    end: str | None  # or of the duration
    lasts: bool  # whether that is the duration
    labels: Sequence[str]  # the first counts


def _read_columns(text: str, path: Path, label_column: str | None) -> list[TableRow]:
    # Excel separates cells as a first line says that other programs write for it.
    hint, header = _SEPARATOR.match(text), text.partition("\n")[0]
    if hint is not None:
        header = text[hint.end() :].partition("\n")[0]
    delimiter = max("\t,;", key=header.count)
    # Raven knows no quotes: one at the start of a cell doesn't hide the rows behind it.
    raven = delimiter == "\t" and "begin time (s)" in header.lower()
    reader = csv.reader(
        io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE if raven else csv.QUOTE_MINIMAL
    )
    if hint is not None:
        next(reader)
    layout = _layout([_column(_unquoted(name)) for name in next(reader, [])], path, label_column)
    names, labels = layout.names, layout.labels
    found: list[tuple[int, dict[str, str]]] = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(names) and delimiter != "\t":
            cells = _rejoined(cells, layout, delimiter, f"{path}, line {reader.line_num}")
        fields = {name: _unquoted(cell.strip()) for name, cell in zip(names, cells, strict=False)}
        if delimiter != ",":  # where Excel separates columns so, it may write 0,5
            fields |= {
                name: cell.replace(",", ".")
                for name, cell in fields.items()
                if name != layout.file and name not in labels and _DECIMAL.fullmatch(cell)
            }
        found.append((reader.line_num, fields))
    if label_column is None and labels[:1] == [_VERIFIED] and not any(fields.get(_VERIFIED) for _, fields in found):
        labels = labels[1:]  # nobody has verified anything
    rows = []
    for number, fields in found:
        first, last = _span(fields, layout, path, number)
        label = _label(fields, labels)
        rows.append(_annotation(_file(fields, layout.file), first, last, label, _scored(fields), path, number))
    if "begin time (s)" in names and _OFFSET not in names and len({row.file for row in rows}) > 1:
        raise InputError(
            f"{path} has selections of several files without File Offset (s): its times can't be told apart; add "
            "this measurement in Raven and save the table again, or give a table for each file"
        )
    if "view" in names:  # Raven writes a row for each view of a selection, waveform and spectrogram
        return list({row[:4]: row for row in rows}.values())
    return rows


def _layout(names: Sequence[str], path: Path, label_column: str | None) -> _Layout:
    """What the names of the columns say; errors as of `read_annotations`."""
    file = _first(names, FILES)
    start = _first(names, STARTS) or next(filter(_START.fullmatch, names), None)
    end = _first(names, ENDS) or next(filter(_END.fullmatch, names), None)
    lasts = start is None and {"offset", "duration"} <= {*names}  # as Kaleidoscope has it
    if lasts:
        start, end = "offset", "duration"
    if label_column is not None:
        labels = [name for name in (_column(label_column),) if name in names]
    else:
        labels = [name for name in LABELS if name in names]
        if not labels and _NAMED in names and file and start and end:
            labels = [_NAMED]
    if not labels and (label_column is not None or file is None or start):
        expected = label_column or " or ".join(LABELS)
        raise TableError(
            f"{path} is no table of annotations: no column {expected}; it has {', '.join(names)}",
            has_times=start is not None and end is not None,
        )
    if (start is None) != (end is None):
        raise InputError(f"{path} has a column {start or end}, but none for the other end of an annotation")
    return _Layout(names, file, start, end, lasts, labels)


def _column(name: str) -> str:
    """The name of a column for comparison; Kaleidoscope marks columns by an asterisk that it searches by."""
    return name.strip().lower().removesuffix("*")


def _unquoted(cell: str) -> str:
    """A cell without the quotes that other programs than Raven write into its tables."""
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _span(fields: Mapping[str, str], layout: _Layout, path: Path, number: int) -> tuple[float, float]:
    """The start and end of a row in its recording."""

    def seconds(column: str | None) -> float:
        return _seconds(fields.get(column or "", ""), path, number)

    first, last = 0.0, math.inf
    if layout.start and (fields.get(layout.start) or fields.get(layout.end or "")):
        first, last = seconds(layout.start), seconds(layout.end)
        last += first if layout.lasts else 0.0
    if fields.get(_OFFSET):  # Raven's Begin Time counts on the whole sequence of files
        offset = seconds(_OFFSET)
        first, last = offset, offset + last - first
    return first, last


def _label(fields: Mapping[str, str], columns: Sequence[str]) -> str:
    """The label of a row."""
    if not columns:
        return ""
    first = columns[0]
    label = next((fields[name] for name in (first, *_INSTEAD.get(first, ())) if fields.get(name)), "")
    if first == "species_name":
        return both_names(label)[1]
    return "" if label == fields.get("species code") == _NOTHING else label


def _file(fields: Mapping[str, str], column: str | None) -> str | None:
    """The recording of a row; Kaleidoscope's is in three columns."""
    name = (fields.get(column) if column else None) or fields.get("begin file") or None
    if name is None or column != "in file":
        return name
    folders = [folder for folder in (fields.get("indir"), fields.get("folder")) if folder]
    slash = "\\" if any("\\" in folder for folder in folders) else "/"
    return slash.join([*(folder.rstrip("/\\") for folder in folders), name])


def _scored(fields: dict[str, str]) -> dict[str, str]:
    """The fields with a score in place of Kaleidoscope's distance, which is 1 - score in our tables."""
    distance = fields.get("top1dist", "")
    if any(name in fields for name in SCORES) or not _is_number(distance):
        return fields
    return {**fields, "score": f"{1 - float(distance):.{len(distance.partition('.')[2])}f}"}


def _rejoined(cells: Sequence[str], layout: _Layout, delimiter: str, where: str) -> list[str]:
    """The cells of a row of which one has separators without quotes, as BirdNET-Analyzer 1 and 2 write them.

    Args:
        cells: more than there are columns.
        layout: of the table.
        delimiter: separates cells.
        where: the file and line, for an error.

    Raises:
        InputError: the label and the recording both may have the separators, or neither.
    """
    names, excess = layout.names, len(cells) - len(layout.names)
    if not any(cell.strip() for cell in cells[len(names) :]):
        return list(cells[: len(names)])
    numbers = [names.index(name) for name in (layout.start, layout.end, _first(names, SCORES)) if name]
    found = []
    for name in (*layout.labels[:1], layout.file):
        if name is not None:
            first = names.index(name)
            last = first + excess + 1
            joined = [*cells[:first], delimiter.join(cells[first:last]), *cells[last:]]
            if numbers and all(_is_number(joined[place].replace(",", ".")) for place in numbers):
                found.append(joined)
    if len(found) != 1:
        raise InputError(
            f"{where}: {len(cells)} cells, but {len(names)} columns; put text with {delimiter!r} in quotation marks"
        )
    return found[0]


def _annotation(
    file: str | None, start: float, end: float, label: str, fields: Mapping[str, str], path: Path, number: int
) -> TableRow:
    if not 0 <= start <= end:
        raise InputError(
            f"{path}, line {number}: from {start} to {end} s; expected a start of 0 or more, then the end"
        )
    return TableRow(file, start, end, label.strip(), fields)


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _seconds(cell: str, path: Path, number: int) -> float:
    if (clock := _CLOCK.fullmatch(cell.strip())) is not None:
        return 3600.0 * int(clock[1]) + 60.0 * int(clock[2]) + float(clock[3])
    if not _is_number(cell):
        raise InputError(f"{path}, line {number}: {cell!r} is not a time; expected seconds, such as 12.5")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
