"""From the store to tables: which scores are shown, and how consecutive windows become one row."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Any, Final, Protocol, TypeVar

import duckdb
import numpy as np

from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.archive.choice import Choice as Choice
from avex_serve.archive.choice import describe, in_zone
from avex_serve.archive.plan import Probe, ResultSet
from avex_serve.archive.store import Entry, Store
from avex_serve.calibration.scales import Calibrator
from avex_serve.database import connect, quoted
from avex_serve.inference.results import Merger, check_gap
from avex_serve.inference.scores import Selection, check_labels
from avex_serve.scheduling.cores import usable_cores

CHUNK_FILES: Final = 500  # result files that one statement reads
CHUNK_SECONDS: Final = 48 * 3600  # of the recordings that one statement reads


class HasDuration(Protocol):
    """A recording."""

    @property
    def duration(self) -> float:
        """Seconds."""


Timed = TypeVar("Timed", bound=HasDuration)


def make_table(store: Store, choice: Choice, paths: Collection[str] | None = None) -> Table:
    """The table of the last run's results; its rows are read while they are written.

    Args:
        store: open for reading.
        choice: what is shown.
        paths: of the recordings that the table is about; None: of all.

    Raises:
        NotFoundError: the store has no results, or a label of the choice is in no probe.
        InputError: a choice that can't be.
    """
    sets = store.current_scores()
    classes = check_choice(sets, choice)
    done = [store.done(results) for results in sets]
    entries = sorted(store.journal().values(), key=lambda entry: entry.path)
    recordings = [
        _recording(entry, choice.zone)
        for entry in entries
        if (paths is None or entry.path in paths)
        and entry.computed
        and any(entry.recording in names for names in done)
    ]
    calibrated = any(probe.calibration is not None for results in sets for probe in results.probes)
    rows = _rows(store, sets, done, recordings, classes, choice)
    return Table(recordings, rows, describe(sets, choice), calibrated)


def _recording(entry: Entry, zone: tzinfo | None) -> Recording:
    assert entry.recording is not None
    start = None if entry.start is None else datetime.fromisoformat(f"{entry.start}{entry.offset or ''}")
    return Recording(
        path=entry.path,
        digest=entry.recording,
        duration=entry.duration,
        sample_rate=entry.sample_rate,
        channels=entry.channels,
        start=in_zone(start, zone),
        latitude=entry.latitude,
        longitude=entry.longitude,
    )


def check_choice(sets: Sequence[ResultSet], choice: Choice) -> dict[str, np.ndarray]:
    """Check a choice before anything is computed; errors as of `make_table`.

    Returns:
        The classes that are shown, as columns: set, probe, label, their order, and the lowest score of each.
    """
    if choice.merge_gap is not None:
        check_gap(choice.merge_gap)
    known = {label for results in sets for probe in results.probes for label in probe.labels}
    check_labels(
        [*(choice.labels or ()), *(choice.threshold if isinstance(choice.threshold, Mapping) else ())], known
    )
    shown = known if choice.labels is None else set(choice.labels)
    rows: list[tuple[int, str, str, int, float]] = []
    for index, results in enumerate(sets):
        for probe in results.probes:
            lowest = np.broadcast_to(_selection(probe, choice).threshold, len(probe.labels)).tolist()
            for label, limit in zip(probe.labels, lowest, strict=True):
                if label in shown:
                    rows.append((index, probe.name, label, len(rows), limit))
    columns = list(zip(*rows, strict=True))
    kinds = (np.int32, object, object, np.int32, np.float64)
    names = ("source", "probe", "label", "class", "lowest")
    return {name: np.array(column, kind) for name, column, kind in zip(names, columns, kinds, strict=True)}


def _selection(probe: Probe, choice: Choice) -> Selection:
    threshold = choice.threshold
    if isinstance(threshold, Mapping):
        threshold = {label: value for label, value in threshold.items() if label in probe.labels}
    return Selection.of(probe.activation, threshold, choice.top_k, probe.labels, probe.calibrator)


def _rows(
    store: Store,
    sets: Sequence[ResultSet],
    done: Sequence[set[str]],
    recordings: Sequence[Recording],
    classes: dict[str, np.ndarray],
    choice: Choice,
) -> Iterator[tuple[Recording, list[Annotation]]]:
    calibrators = {
        (results.bundle, results.version, probe.name): probe.calibrator
        for results in sets
        for probe in results.probes
        if probe.calibration is not None
    }
    with connect(threads=usable_cores()) as database:
        database.register("classes", classes)
        for chunk in chunks(recordings, len(sets)):
            found = _select(database, store, sets, done, chunk, classes, choice)
            groups = itertools.groupby(found, key=lambda row: row[0])
            group = next(groups, None)
            for position, recording in enumerate(chunk):
                annotations: list[Annotation] = []
                if group is not None and group[0] == position:
                    annotations = [_annotation(row, sets) for row in group[1]]
                    group = next(groups, None)
                if choice.merge_gap is not None:
                    annotations = merge(annotations, choice.merge_gap, mean=choice.merge_mean)
                yield recording, _calibrated(annotations, calibrators)


def _calibrated(
    annotations: list[Annotation], calibrators: Mapping[tuple[str, str, str], Calibrator | None]
) -> list[Annotation]:
    """The annotations with the probability that each score stands for; joined windows have one score."""
    for origin, calibrator in calibrators.items():
        own = [i for i, one in enumerate(annotations) if (one.bundle, one.version, one.probe) == origin]
        if own and calibrator is not None:
            labels, scores = [annotations[i].label for i in own], [annotations[i].score for i in own]
            for i, probability in zip(own, calibrator.of_labels(labels, scores), strict=True):
                annotations[i] = annotations[i]._replace(probability=probability)
    return annotations


def chunks(recordings: Sequence[Timed], sets: int) -> Iterator[list[Timed]]:
    """Recordings in parts whose results are read at once, from this number of sets."""
    chunk: list[Timed] = []
    seconds = 0.0
    for recording in recordings:
        if chunk and ((len(chunk) + 1) * sets > CHUNK_FILES or seconds + recording.duration > CHUNK_SECONDS):
            yield chunk
            chunk, seconds = [], 0.0
        chunk.append(recording)
        seconds += recording.duration
    if chunk:
        yield chunk


def _select(
    database: duckdb.DuckDBPyConnection,
    store: Store,
    sets: Sequence[ResultSet],
    done: Sequence[set[str]],
    chunk: Sequence[Recording],
    classes: dict[str, np.ndarray],
    choice: Choice,
) -> Iterator[tuple[Any, ...]]:
    """Rows of position in the chunk, source, start, end, probe, label and score; in the order of the table."""
    digests = np.array([recording.digest for recording in chunk], dtype=object)
    database.register("chunk", {"position": np.arange(len(chunk), dtype=np.int32), "recording": digests})
    floor = float(classes["lowest"].min())
    enough = "" if math.isinf(floor) else f" WHERE score::DOUBLE >= {floor!r}"  # before the join, for speed
    sources = []
    for index, (results, names) in enumerate(zip(sets, done, strict=True)):
        kept = [digest for digest in dict.fromkeys(digests) if digest in names]
        files = [quoted(path) for path in store.paths(results, kept)]
        if files:
            sources.append(f"SELECT *, {index} AS source FROM read_parquet([{', '.join(files)}]){enough}")
    best = (
        ""
        if choice.top_k is None
        else "QUALIFY row_number() OVER (PARTITION BY position, source, probe, start ORDER BY score DESC, class) "
        f"<= {choice.top_k}"
    )
    result = database.execute(
        f"""SELECT position, source, start, "end", probe, label, score
        FROM ({" UNION ALL ".join(sources)}) JOIN classes USING (source, probe, label) JOIN chunk USING (recording)
        WHERE score::DOUBLE >= lowest {best}
        ORDER BY position, start, source, probe, score DESC, class"""
    )
    while rows := result.fetchmany(10_000):
        yield from rows


def _annotation(row: tuple[Any, ...], sets: Sequence[ResultSet]) -> Annotation:
    _, source, start, end, probe, label, score = row
    results = sets[source]
    return Annotation(start, end, label, score, results.cut.bandwidth, results.bundle, results.version, probe)


def merge(annotations: Sequence[Annotation], gap: float, *, mean: bool) -> list[Annotation]:
    """Join annotations of one label and probe whose distance is at most `gap` seconds.

    Args:
        annotations: of one recording, in order of their start.
        gap: seconds between the end of one and the start of the next.
        mean: the score is the mean of the joined ones; else the highest.
    """
    merger = Merger[Annotation](
        gap,
        "mean" if mean else "max",
        lambda one: (one.bundle, one.version, one.probe, one.label),
        lambda one, end, score: one._replace(end=end, score=score),
    )
    for one in annotations:
        merger.add(one)
    return merger.take()
