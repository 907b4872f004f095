"""Labelled recordings: from folders of classes or tables of annotations to targets of windows. Needs no torch.

A folder without tables has a folder for each class; `A,B` stands for both classes, and folders inside it (sites,
dates) are part of the class. Folders `train` and `test` around the classes are a split. A folder with tables of
annotations, or a table, has its labels from there. Several of them are read one by one and joined.
"""

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import numpy as np

from avex_serve.annotations.reading import (
    TABLES,
    Recordings,
    TableError,
    TableRow,
    composed,
    read_annotations,
    recording_of,
)
from avex_serve.annotations.reviews import current_reviews, is_reviewed
from avex_serve.archive.files import SUFFIXES, find_recordings
from avex_serve.audio.reader import open_audio
from avex_serve.bundles.reading import sha256_of
from avex_serve.errors import AudioError, AvexServeError, InputError, NotFoundError, naming
from avex_serve.scheduling.cores import usable_cores
from avex_serve.training.pieces import recordings_of

NEGATIVES: Final = ("noise", "background", "other")
MIN_OVERLAP: Final = 0.25  # seconds
SPLITS: Final = {
    **dict.fromkeys(("train", "training", "val", "valid", "validation", "dev"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ABSENT: Final = "-"  # in front of a label: the sound is known to be absent
_SHEETS: Final = (".xlsx", ".xlsm", ".xls", ".ods")
_SAME: Final = 0.05  # seconds: spans of reviews may be rounded
_UNREVIEWED: Final = -2
_MISSPELLED: Final = 0.85  # how alike labels are, from 0 to 1, of which one may be a misspelling of the other
_DECIDED: Final = {"present": 1, "absent": 0, "unsure": -1}


@dataclass(frozen=True)
class Recording:
    """A recording with its annotations."""

    path: Path
    name: str  # relative to the data, with `/`
    annotations: tuple[TableRow, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)  # other columns of its rows
    split: str | None = None  # "train", "test", or None where the data doesn't say
    digest: str = ""  # sha256 of the file
    seconds: float = 0.0
    group: str = ""  # what stays together in a split


@dataclass(frozen=True)
class Dataset:
    """Labelled recordings, and what is wrong with them."""

    labels: tuple[str, ...]
    recordings: tuple[Recording, ...]
    negatives: frozenset[str]  # labels, in lower case, of stretches without any of the sounds
    fully_annotated: bool
    problems: tuple[str, ...]

    def targets(self, recording: Recording, spans: np.ndarray, min_overlap: float = MIN_OVERLAP) -> np.ndarray:
        """Whether the windows of a recording have each label.

        Args:
            recording: of this data.
            spans: (N, 2) start and end of each window in seconds.
            min_overlap: seconds that a window shares with an annotation to count as annotated; of a shorter
                annotation or window, all of it.

        Returns:
            (N, C) int8: 1 with the label, 0 without it, -1 unknown.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        targets = np.full((len(spans), len(index)), 0 if self.fully_annotated else -1, np.int8)
        longest = float((spans[:, 1] - spans[:, 0]).max())
        touched = np.zeros(targets.shape, bool)
        present = np.zeros(targets.shape, bool)
        absent = np.zeros(targets.shape, bool)
        for annotation in recording.annotations:
            if annotation.decision:
                continue
            end = min(annotation.end, recording.seconds)
            shared = np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], annotation.start)
            # An annotation of a point in time lies in the window that it starts in.
            inside = (spans[:, 0] <= annotation.start) & (annotation.start < spans[:, 1])
            needed = min(min_overlap, end - annotation.start, longest)
            covered = (shared >= needed - 1e-9) & (shared > 0) | inside & (needed <= 0)
            label = annotation.label
            if label.startswith(_ABSENT) and label[1:] in index:
                absent[covered, index[label[1:]]] = True
                continue
            targets[covered] = np.maximum(targets[covered], 0)
            if label in index:
                present[covered, index[label]] = True
                touched[(shared > 0) & ~covered, index[label]] = True
        targets[absent] = 0
        targets[touched] = -1
        targets[present] = 1
        reviewed = _reviewed(recording, spans, index)
        return np.asarray(np.where(reviewed == _UNREVIEWED, targets, reviewed))


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How labelled recordings are read: the options of all commands that take them, see `read_dataset`."""

    negatives: tuple[str, ...] = ()
    fully_annotated: bool = False
    group_by: str | None = None
    label_column: str | None = None
    min_overlap: float = MIN_OVERLAP  # seconds; see `Dataset.targets`

    def read(self, data: Path | Sequence[Path], labels: Sequence[str] | None = None) -> Dataset:
        """The data with these options; errors as of `read_dataset`."""
        return read_dataset(
            data,
            negatives=self.negatives,
            fully_annotated=self.fully_annotated,
            group_by=self.group_by,
            label_column=self.label_column,
            labels=labels,
        )


def read_dataset(
    data: Path | Sequence[Path],
    *,
    negatives: Iterable[str] = (),
    fully_annotated: bool = False,
    group_by: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Read labelled recordings; files that can't be read become problems.

    Args:
        data: a folder of classes, a folder with tables of annotations, or a table; or several of these, whose
            recordings are joined. With others, a table without labels adds its columns to their recordings.
        negatives: labels of stretches without any of the sounds, besides `NEGATIVES`.
        fully_annotated: whether stretches without an annotation have none of the sounds.
        group_by: column of the tables that says which recordings stay together, such as ``site``.
        label_column: column of the tables with the labels; reviews that have none keep their own labels.
        labels: of a head, to evaluate it; None: those of the data.

    Raises:
        NotFoundError: no such file or folder.
        InputError: no labels, a table that can't be read, or a recording in two groups or splits.
    """
    problems: list[str] = []
    places = [data] if isinstance(data, Path) else data
    describing = [place for place in places if len(places) > 1 and _only_describes(place, label_column)]
    read = [
        _read_place(place, label_column, problems, fully_annotated=fully_annotated)
        for place in places
        if place not in describing
    ]
    recordings = read[0] if len(read) == 1 else _merged(read)
    recordings = [_spelled(each, labels or ()) for each in _described(recordings, describing)]
    ignored = frozenset(name.lower() for name in (*NEGATIVES, *negatives))
    known = tuple(labels) if labels is not None else _labels_of(recordings, ignored)
    if not known:
        expected = (
            "expected a folder for each class with recordings in it, or tables of annotations (Raven, Audacity, CSV "
            "with the columns file, start, end, label)"
        )
        raise InputError("; ".join((f"{', '.join(map(str, places))} has no labels: {expected}", *problems)))
    recordings = _scanned(recordings, problems)
    recordings = _grouped(recordings, group_by)
    recordings = _joined(recordings, problems)
    problems += _late_problems(recordings)
    problems += _piece_problems(recordings)
    problems += _label_problems(recordings, known, ignored, foreign=labels is not None)
    return Dataset(known, tuple(recordings), ignored, fully_annotated, tuple(problems))


def _reviewed(recording: Recording, spans: np.ndarray, index: Mapping[str, int]) -> np.ndarray:
    """What reviews say of windows, (N, C) int8 as targets; `_UNREVIEWED` where they say nothing.

    A sound in a span is in every window that holds the span. A sound that is absent from a span is absent from every
    window inside it.
    """
    found = np.full((len(spans), len(index)), _UNREVIEWED, np.int8)
    for review in recording.annotations:
        if not review.decision or review.label not in index:
            continue
        end = min(review.end, recording.seconds)
        holding = (spans[:, 0] <= review.start + _SAME) & (end <= spans[:, 1] + _SAME)
        inside = (review.start <= spans[:, 0] + _SAME) & (spans[:, 1] <= end + _SAME)
        rows = {"present": holding, "absent": inside, "unsure": holding | inside}[review.decision]
        column, value = found[:, index[review.label]], _DECIDED[review.decision]
        differs = rows & (column != _UNREVIEWED) & (column != value)
        column[rows] = value
        column[differs] = -1  # annotators disagree
    return found


# -- from files to recordings -----------------------------------------------------------------------------------


def _read_place(
    data: Path, label_column: str | None, problems: list[str], *, fully_annotated: bool
) -> list[Recording]:
    """The recordings of a folder or table; errors as of `read_dataset`."""
    if not data.exists():
        raise NotFoundError(f"{data}: no such file or folder")
    if data.is_file() and data.suffix.lower() in SUFFIXES:
        raise InputError(f"{data} is a recording; give a table of its annotations, or the folder of the classes")
    root = data if data.is_dir() else data.parent
    found = find_recordings([str(root)])
    files = sorted(Path(path) for path, fault in found.recordings.items() if fault is None)
    problems += [str(fault) for fault in found.recordings.values() if isinstance(fault, InputError)]
    if (hidden := found.note()) is not None:
        problems.append(hidden)
    rows = _read_tables(data, files, label_column, problems)
    if not any(annotation.label for annotations in rows.values() for annotation in annotations):
        if data.is_file():
            without = f"{data} has no labels of recordings that are there; expected rows of file, start, end, label"
            raise InputError("; ".join((without, *problems)))
        return [_from_folders(path, root, rows.get(path, [])) for path in files]
    if not fully_annotated:
        if left_out := [path for path in files if path not in rows]:
            problems.append(
                f"left out: {len(left_out)} of {len(files)} recordings in {root}, which its tables don't annotate, "
                f"such as {_relative(left_out[0], root)}; where tables have labels, folders are no classes"
            )
        files = []
    files = sorted({*files, *rows})  # tables may annotate recordings that are elsewhere
    return [_from_tables(path, root, rows.get(path, [])) for path in files]


def _only_describes(table: Path, label_column: str | None) -> bool:
    """Whether the rows of a table say something of recordings, but no labels."""
    if not table.is_file() or table.suffix.lower() not in TABLES:
        return False
    try:
        rows = read_annotations(table)
    except TableError:
        return False
    labelled = any(row.label or row.fields.get((label_column or "").lower()) for row in rows)
    return bool(rows) and not labelled and all(math.isinf(row.end) for row in rows)


def _described(recordings: Sequence[Recording], tables: Iterable[Path]) -> list[Recording]:
    """The recordings with the columns of tables that may be about others too."""
    for table in tables:
        rows = _read_tables(table, [each.path for each in recordings], None, [])
        found = {path: _fields_of(path, own) for path, own in rows.items()}
        recordings = [
            _with_fields(each, found[each.path], _split_of(each.path, found[each.path].get("split")))
            if each.path in found
            else each
            for each in recordings
        ]
    return list(recordings)


def _with_fields(recording: Recording, fields: Mapping[str, str], split: str | None) -> Recording:
    """The recording with what another place says of it; InputError if that is another split."""
    if recording.split and split and recording.split != split:
        raise InputError(f"{recording.path} is in several splits; a recording belongs to one: its windows are alike")
    return replace(recording, fields=_agreeing([recording.fields, fields]), split=recording.split or split)


def _merged(read: Iterable[Iterable[Recording]]) -> list[Recording]:
    """The recordings of several places: one for each file, with all its annotations and a name of its own."""
    found: dict[Path, Recording] = {}
    for each in (recording for recordings in read for recording in recordings):
        twin = found.setdefault(each.path.resolve(), each)
        if twin is each:
            continue
        found[each.path.resolve()] = replace(
            _with_fields(twin, each.fields, each.split), annotations=(*twin.annotations, *each.annotations)
        )
    names = Counter(recording.name for recording in found.values())
    return [
        recording if names[recording.name] == 1 else replace(recording, name=path.as_posix())
        for path, recording in found.items()
    ]


def _spelled(recording: Recording, labels: Sequence[str]) -> Recording:
    """The recording with labels that look the same spelled the same: as the head does, else composed."""
    spelling = {composed(label): label for label in labels}
    return replace(
        recording,
        annotations=tuple(
            row._replace(label=spelling.get(composed(row.label), composed(row.label)))
            for row in recording.annotations
        ),
    )


def _read_tables(
    data: Path, files: Sequence[Path], label_column: str | None, problems: list[str]
) -> dict[Path, list[TableRow]]:
    """The rows of the tables by recording."""
    tables, sheets = [data], []
    if data.is_dir():
        inside = [
            path
            for path in sorted(data.rglob("*"))
            if not any(part.startswith((".", "~$")) for part in path.relative_to(data).parts)
        ]
        tables = [path for path in inside if path.suffix.lower() in TABLES]
        sheets = [path for path in inside if path.suffix.lower() in _SHEETS]
    known, by_place = Recordings(files), {path.resolve(): path for path in files}
    rows: dict[Path, list[TableRow]] = defaultdict(list)
    unused: list[TableError] = []
    for table in tables:
        try:
            annotations = _read_labelled(table, label_column)
        except TableError as error:
            if data.is_file():
                raise
            if error.has_times:
                problems.append(f"left out: {error}; --label-column names the column with the labels")
            elif table.suffix.lower() != ".txt":  # such as a README
                unused.append(error)
            continue
        if is_reviewed(annotations):
            annotations = [
                TableRow(*review.subject, {**review.fields, "decision": review.decision})
                for review in current_reviews(annotations, table)
            ]
        absent: Counter[str] = Counter()
        for annotation in annotations:
            name = annotation.file or recording_of(table)
            path = table.parent / name
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found: Path | None = by_place.get(path.resolve(), path.resolve())
            else:
                with naming(str(table)):
                    found = known.find(name, table.parent)
            if found is None:
                absent[name] += 1
            else:
                rows[found].append(annotation)
        unnamed = "; a table without a column file is about the recording of its name"
        problems += [
            f"{table.name} annotates {name}, which is not there ({n} rows)"
            + (unnamed if all(annotation.file is None for annotation in annotations) else "")
            for name, n in absent.items()
        ]
    annotated = any(row.label for found in rows.values() for row in found)
    if unused and not (annotated and rows.keys() >= {*files}):  # else they come with the tables of a program
        more = len(unused) - 1
        such = ("", "; so is 1 other table", f"; so are {more} other tables")[min(more, 2)]
        problems.append(f"left out: {unused[0]}{such}")
    problems += [f"left out: {path} is a spreadsheet; save it as a table (in Excel: CSV UTF-8)" for path in sheets]
    return rows


def _read_labelled(table: Path, label_column: str | None) -> list[TableRow]:
    """The rows of a table; reviews without the column keep their own labels. Errors as of `read_annotations`."""
    try:
        return read_annotations(table, label_column)
    except TableError:
        if label_column is not None:
            with contextlib.suppress(TableError):
                if is_reviewed(reviews := read_annotations(table)):
                    return reviews
        raise


def _from_tables(path: Path, root: Path, rows: Sequence[TableRow]) -> Recording:
    fields = _fields_of(path, rows)
    annotations = tuple(row for row in rows if row.label)
    return Recording(path, _relative(path, root), annotations, fields, _split_of(path, fields.get("split")))


def _from_folders(path: Path, root: Path, rows: Sequence[TableRow]) -> Recording:
    fields = _fields_of(path, rows)
    parts = path.relative_to(root).parts[:-1]
    split = fields.get("split")
    if parts and parts[0].lower() in SPLITS:
        split, parts = split or parts[0], parts[1:]
    # Commas separate classes; `-A,B` is the absence of both.
    folder = parts[0] if parts else ""
    sign = _ABSENT if folder.startswith(_ABSENT) else ""
    names = [name.strip() for name in folder.removeprefix(sign).split(",") if name.strip()]
    annotations = tuple(TableRow(None, 0.0, math.inf, sign + name) for name in names)
    return Recording(path, _relative(path, root), annotations, fields, _split_of(path, split))


def _fields_of(path: Path, rows: Sequence[TableRow]) -> dict[str, str]:
    """The columns that have one value for a recording; InputError if `split` has several."""
    fields = _agreeing([row.fields for row in rows])
    if "split" not in fields and any("split" in row.fields for row in rows):
        raise InputError(f"{path} is in several splits; a recording belongs to one: its windows are alike")
    return fields


def _agreeing(rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The columns with the same value in every row that has them; tables differ in their columns."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for name, value in row.items():
            values[name].add(value)
    return {name: next(iter(found)) for name, found in values.items() if len(found) == 1}


def _split_of(path: Path, text: str | None) -> str | None:
    if not text:
        return None
    if text.lower() not in SPLITS:
        raise InputError(f"{path}: split {text!r}; expected one of {', '.join(SPLITS)}")
    return SPLITS[text.lower()]


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _scanned(recordings: Sequence[Recording], problems: list[str]) -> list[Recording]:
    """The recordings that can be read, each with its digest and length."""

    def scan(recording: Recording) -> Recording | str:
        if not recording.name.isascii() and recording.name.encode(errors="replace").decode() != recording.name:
            return f"left out: {recording.name}: the name is not UTF-8; rename the file"
        try:
            with open_audio(recording.path) as stream:
                frames = stream.frames or sum(block.size for block in stream.blocks)
                if not frames:
                    raise AudioError(f"{recording.path} has no samples")
                seconds = frames / stream.sample_rate
            return replace(recording, digest=sha256_of(recording.path), seconds=seconds)
        except (AvexServeError, OSError) as error:
            return f"left out: {error}"

    with ThreadPoolExecutor(usable_cores()) as pool:
        scanned = list(pool.map(scan, recordings))
    problems += [found for found in scanned if isinstance(found, str)]
    return [found for found in scanned if isinstance(found, Recording)]


def _grouped(recordings: Sequence[Recording], column: str | None) -> list[Recording]:
    """The recordings with their groups; InputError if some have none."""
    if column is None:
        return [replace(recording, group=recording.name) for recording in recordings]
    groups = [recording.fields.get(column.lower(), "") for recording in recordings]
    if "" in groups:
        raise InputError(
            f"{groups.count('')} of {len(groups)} recordings, such as {recordings[groups.index('')].name}, have no "
            f"single value in the column {column!r} of --group-by; write a CSV of file,{column} with a row for each "
            "and give it along with the data"
        )
    return [replace(recording, group=group) for recording, group in zip(recordings, groups, strict=True)]


def _joined(recordings: Sequence[Recording], problems: list[str]) -> list[Recording]:
    """Recordings with groups joined where they share a file of the same content."""
    pairs = []
    first: dict[str, Recording] = {}  # by digest
    for recording in recordings:
        twin = first.setdefault(recording.digest, recording)
        if twin is recording:
            continue
        problems.append(f"{recording.name} has the same content as {twin.name}; they stay together")
        if {recording.split, twin.split} == {"train", "test"}:
            problems[-1] = f"{recording.name} has the same content as {twin.name}, in the other split; remove one"
        else:
            pairs.append((recording.group, twin.group))
    return list(together(recordings, pairs))


def _late_problems(recordings: Sequence[Recording]) -> list[str]:
    """A sentence if annotations begin after the end of their recording, so that no window has them."""
    late = [
        (each, annotation)
        for each in recordings
        for annotation in each.annotations
        if annotation.start > 0 and annotation.start >= each.seconds
    ]
    if not late:
        return []
    names = {each.name for each, _ in late}
    (first, annotation), rows = late[0], "row begins" if len(late) == 1 else "rows begin"
    of = "its recording" if len(names) == 1 else f"the {len(names)} recordings"
    return [
        f"left out: {len(late)} {rows} after the end of {of}, such as {annotation.label!r} at "
        f"{annotation.start:g} s of {first.name}, which lasts {first.seconds:.1f} s; times are seconds from the "
        "start of the recording (in Raven: File Offset, which counts in each file)"
    ]


def _piece_problems(recordings: Sequence[Recording]) -> list[str]:
    """A sentence if clips of one recording are in different groups, and so may be on both sides of a split."""
    names = recordings_of([each.path.stem for each in recordings], [each.seconds for each in recordings])
    clips: dict[str, list[Recording]] = defaultdict(list)
    for recording, name in zip(recordings, names, strict=True):
        if name is not None:
            clips[name].append(recording)
    apart = [
        each
        for each in clips.values()
        if len({clip.group for clip in each}) > 1 and (len({clip.split for clip in each}) > 1 or not each[0].split)
    ]
    if not apart:
        return []
    return [
        f"{sum(map(len, apart))} recordings look by their names like clips of {len(apart)} longer ones, such as "
        f"{apart[0][0].name} and {apart[0][1].name}; these don't stay together, so figures may be too good: write a "
        "CSV of file,source with a row for each clip, give it along with the data, and say --group-by source"
    ]


def together(recordings: Sequence[Recording], pairs: Iterable[tuple[str, str]]) -> tuple[Recording, ...]:
    """The recordings with the groups of each pair made one."""
    leader: dict[str, str] = {}  # of a group

    def find(group: str) -> str:
        while leader.get(group, group) != group:
            group = leader[group]
        return group

    for one, other in pairs:
        leader[find(one)] = find(other)
    return tuple(replace(recording, group=find(recording.group)) for recording in recordings)


# -- labels -------------------------------------------------------------------------------------------------------


def _labels_of(recordings: Iterable[Recording], negatives: frozenset[str]) -> tuple[str, ...]:
    found = {
        annotation.label
        for recording in recordings
        for annotation in recording.annotations
        if annotation.decision in ("", "present")
    }
    return tuple(sorted(name for name in found if name.lower() not in negatives and not name.startswith(_ABSENT)))


def _label_problems(
    recordings: Sequence[Recording], labels: Sequence[str], negatives: frozenset[str], *, foreign: bool
) -> list[str]:
    problems = []
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[_letters(label)].append(label)
    problems += [
        f"labels that differ by case or spaces alone: {', '.join(map(repr, names))}; they are trained as several"
        for names in alike.values()
        if len(names) > 1
    ]
    groups: dict[str, set[str]] = defaultdict(set)
    for recording in recordings:
        for annotation in recording.annotations:
            if annotation.decision in ("", "present"):
                groups[annotation.label].add(recording.group)
    for label in labels:
        if len(groups[label]) == 0 and not foreign:
            problems.append(f"{label}: no recording of it can be read")
        elif len(groups[label]) == 1:
            close = _alike(label, [other for other in labels if other != label])
            meant = f"; did you mean {close[0]!r}?" if close and not foreign else ""
            problems.append(
                f"{label}: one recording (or group) only, so nothing can be said about new recordings{meant}"
            )
    annotated = {each.label for recording in recordings for each in recording.annotations if not each.decision}
    for label in sorted(groups):
        if label.startswith(_ABSENT) and label[1:] not in labels:
            problems.append(f"{label}: says that {label[1:]} is absent, which is no label here")
        elif foreign and label not in labels and label.lower() not in negatives and not label.startswith(_ABSENT):
            meant = f"; did you mean {close[0]!r}?" if (close := _alike(label, labels)) else ""
            lost = (
                "its stretches count as without the head's labels"
                if label in annotated
                else "its reviews say nothing"
            )
            problems.append(f"{label}: not a label of the head; {lost}{meant}")
    return problems


def _letters(label: str) -> str:
    """A label without case and spaces."""
    return "".join(label.lower().replace("_", " ").split())


def _alike(label: str, others: Iterable[str]) -> list[str]:
    """The label of which this one may be a misspelling, if there is one."""
    by_letters = {_letters(other): other for other in others}
    return [by_letters[found] for found in get_close_matches(_letters(label), by_letters, 1, _MISSPELLED)]
