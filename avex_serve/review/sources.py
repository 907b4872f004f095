"""Where pools of windows come from: a results store, or tables of other programs."""

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from avex_serve.annotations.reading import SCORES, TableRow, read_annotations, recording_of
from avex_serve.archive.files import sites_of
from avex_serve.archive.plan import Probe, ResultSet
from avex_serve.archive.store import Entry, Store
from avex_serve.archive.tables import chunks
from avex_serve.audio.reader import describe
from avex_serve.audio.recorder import find_origin
from avex_serve.database import connect, quoted
from avex_serve.errors import AvexServeError, InputError, NotFoundError
from avex_serve.inference.scores import Selection
from avex_serve.review.pool import Pool, Sound
from avex_serve.scheduling.cores import usable_cores


def read_pool(store: Store, probe: str | None = None) -> tuple[Pool, ResultSet]:
    """The windows of a store's last run, with the scores of one probe.

    Args:
        store: open for reading.
        probe: its name; None: the first.

    Returns:
        The pool, and the set that it was read from.

    Raises:
        NotFoundError: the store has no scores, or no such probe.
    """
    sets = store.current_scores()
    found = next(
        ((results, each) for results in sets for each in results.probes if probe in (None, each.name)), None
    )
    if found is None:
        known = ", ".join(each.name for results in sets for each in results.probes)
        raise NotFoundError(f"{store.folder} has no scores of a probe {probe!r}; expected one of {known}")
    results, head = found
    entries = _entries(store, results)
    sites = sites_of([entry.path for entry in entries])
    sounds = [
        Sound(entry.path, _moment(entry.start), entry.duration, site, entry)
        for entry, site in zip(entries, sites, strict=True)
    ]
    recording, spans, scores = _read_scores(store, results, head.name, len(head.labels), sounds)
    candidates = [(None, scores[:, i]) for i in range(len(head.labels))]
    return Pool(sounds, head.labels, recording, spans, candidates, _middle(head)), results


def list_probes(store: Store, results: ResultSet) -> list[tuple[ResultSet, Probe]]:
    """The heads with current scores of the windows of a set, those of `results` first."""
    sets = [each for each in store.current() if each.kind == "scores" and each.cut == results.cut]
    sets.sort(key=lambda each: each.name != results.name)
    return [(each, probe) for each in sets for probe in each.probes]


def read_scores(store: Store, pool: Pool, results: ResultSet, probe: Probe) -> Pool:
    """The windows of a pool with the scores of another head, where it has them."""
    done = store.done(results)
    places = [i for i, sound in enumerate(pool.sounds) if _digest(sound) in done]
    sounds = [pool.sounds[i] for i in places]
    recording, spans, scores = _read_scores(store, results, probe.name, len(probe.labels), sounds)
    windows = np.flatnonzero(np.isin(pool.recording, places))
    if windows.size != recording.size or not np.array_equal(spans, pool.spans[windows]):
        raise InputError(f"the scores of {probe.name} are about other windows; open them by --probe {probe.name}")
    own = None if windows.size == pool.recording.size else windows
    candidates = [(own, scores[:, i]) for i in range(len(probe.labels))]
    return pool.with_scores(probe.labels, candidates, _middle(probe))


def _middle(probe: Probe) -> float:
    """The score at which a label is as likely as not."""
    return float(Selection.of(probe.activation, None, None).threshold)


def _entries(store: Store, results: ResultSet) -> list[Entry]:
    """A recording for each content that has results, by path."""
    done = store.done(results)
    entries: dict[str, Entry] = {}
    for entry in sorted(store.journal().values(), key=lambda entry: entry.path):
        if entry.computed and entry.recording in done:
            assert entry.recording is not None
            entries.setdefault(entry.recording, entry)
    return list(entries.values())


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _read_scores(
    store: Store, results: ResultSet, probe: str, classes: int, sounds: Sequence[Sound]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recording (N,), span (N, 2) and scores (N, C) of all windows."""
    counts: list[int] = []
    spans, scores = [np.empty((0, 2))], [np.empty((0, classes), np.float32)]
    every = sum(len(each.labels) for each in results.probes)  # rows of a window
    with connect(threads=usable_cores()) as database:
        for chunk in chunks(sounds, 1):
            files = [str(store.path(results, _digest(sound))) for sound in chunk]
            listed = ", ".join(quoted(file) for file in files)
            rows = dict(
                database.execute(f"SELECT file_name, num_rows FROM parquet_file_metadata([{listed}])").fetchall()
            )
            counts += [rows[file] // every for file in files]
            columns = database.execute(
                f'SELECT start, "end", score FROM read_parquet([{listed}]) WHERE probe = ?', [probe]
            ).fetchnumpy()
            spans.append(np.stack([columns["start"][::classes], columns["end"][::classes]], axis=1))
            scores.append(np.asarray(columns["score"], np.float32).reshape(-1, classes))
    recording = np.repeat(np.arange(len(sounds), dtype=np.int32), counts)
    return recording, np.concatenate(spans), np.concatenate(scores)


def _digest(sound: Sound) -> str:
    assert sound.entry is not None
    assert sound.entry.recording is not None
    return sound.entry.recording


def similarity_to(store: Store, pool: Pool, results: ResultSet, window: int) -> np.ndarray:
    """The cosine (N,) of the embedding of each window and that of one; NaN where none is stored.

    Raises:
        NotFoundError: the store has no embeddings of these windows.
    """
    kept = embeddings_of(store, results)
    done = {each.name: store.done(each) for each in kept}
    example = _digest(pool.sounds[pool.recording[window]])
    embeddings = next((each for each in kept if example in done[each.name]), None)
    if embeddings is None:
        raise NotFoundError(
            f"{store.folder} has no embeddings of the example; run the same command again with --embeddings"
        )
    first = np.searchsorted(pool.recording, np.arange(len(pool.sounds) + 1))
    _, rows = store.read_embeddings(embeddings, example)
    target = _directions(rows[window - first[pool.recording[window]]][None])[0]
    similarity = np.full(pool.recording.size, np.nan)
    for i, sound in enumerate(pool.sounds):
        if _digest(sound) in done[embeddings.name]:
            _, rows = store.read_embeddings(embeddings, _digest(sound))
            if len(rows) == first[i + 1] - first[i]:
                similarity[first[i] : first[i + 1]] = _directions(rows) @ target
    return similarity


def embeddings_of(store: Store, results: ResultSet) -> list[ResultSet]:
    """The stored embeddings of a set's windows."""
    return [each for each in store.sets().values() if each.kind == "embeddings" and each.cut == results.cut]


def _directions(rows: np.ndarray) -> np.ndarray:
    """Embeddings (N, …) as unit vectors (N, D), the mean over time where they have one; zero for zero."""
    flat = rows if rows.ndim == 2 else rows.mean(axis=tuple(range(1, rows.ndim - 1)))
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0))


# -- from tables ----------------------------------------------------------------------------------------------------


def read_tables(tables: Sequence[Path]) -> tuple[Pool, int]:
    """The rows of tables, such as BirdNET's CSV or Raven's selections; each row is a window with one label.

    Returns:
        The pool, and how many rows are left out: without a label, or about a recording that is not there or ends
        before them.

    Raises:
        NotFoundError: no such table, or all of its rows are left out.
        InputError: not a table of annotations.
    """
    rows: dict[str, list[TableRow]] = {}
    total = 0
    for table in tables:
        places: dict[str | None, str | None] = {}
        for row in read_annotations(table):
            total += 1
            if row.file not in places:
                places[row.file] = _recording_path(table, row.file)
            path = places[row.file]
            if row.label and path is not None:
                rows.setdefault(path, []).append(row)
    sites = sites_of(sorted(rows))
    sounds = [_described(path, site) for path, site in zip(sorted(rows), sites, strict=True)]
    for sound in sounds:
        rows[sound.path] = [row for row in rows[sound.path] if not sound.duration or row.start < sound.duration]
    kept = sum(len(found) for found in rows.values())
    if not kept:
        named = ", ".join(str(table) for table in tables)
        raise NotFoundError(f"{named}: no row names a label and a recording that is there")
    labels = sorted({row.label for found in rows.values() for row in found})
    place = {label: i for i, label in enumerate(labels)}
    recording: list[int] = []
    spans: list[tuple[float, float]] = []
    candidates: list[dict[int, float]] = [{} for _ in labels]  # by label, scores by window
    for i, sound in enumerate(sounds):
        known: dict[tuple[float, float], int] = {}
        for row in sorted(rows[sound.path], key=lambda row: (row.start, row.end)):
            span = (row.start, min(row.end, sound.duration or row.end))
            if span not in known:
                known[span] = len(spans)
                spans.append(span)
                recording.append(i)
            candidates[place[row.label]][known[span]] = _score(row.fields)
    columns = [
        (np.fromiter(found, np.int64, len(found)), np.fromiter(found.values(), np.float64, len(found)))
        for found in candidates
    ]
    return Pool(sounds, labels, np.array(recording, np.int32), np.array(spans), columns), total - kept


def _recording_path(table: Path, file: str | None) -> str | None:
    """The recording of a row, looked for at its path, at the end of its path, and next to the table."""
    if file is None:
        return _named(table.parent / recording_of(table), table)
    given = Path(file.replace("\\", "/") if "/" not in file else file)
    ends = (Path(*given.parts[i:]) for i in range(1, len(given.parts)))
    for path in (table.parent / given, Path.cwd() / given, *(table.parent / end for end in ends)):
        if path.is_file():
            return os.path.abspath(path)  # noqa: PTH100 - as `run` writes it
    return _named(table.parent / given.name, table)


def _named(place: Path, table: Path) -> str | None:
    """The recording of that name, with any suffix or with its own."""
    found = sorted(path for path in place.parent.glob("*") if place.name in (path.stem, path.name) and path != table)
    return next((str(path.absolute()) for path in found if _is_sound(path)), None)


def _is_sound(path: Path) -> bool:
    try:
        describe(path)
    except AvexServeError:
        return False
    return True


def _described(path: str, site: str) -> Sound:
    try:
        header = describe(path)
    except AvexServeError:
        return Sound(path, None, 0.0, site)
    origin = find_origin(os.path.basename(path), header.metadata, header.duration)  # noqa: PTH119
    return Sound(path, origin.start, header.duration or 0.0, site)


def _score(fields: Mapping[str, str]) -> float:
    for name in SCORES:
        try:
            return float(fields[name])
        except (KeyError, ValueError):
            continue
    return np.nan
