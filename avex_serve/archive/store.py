"""The results of a run: a folder that grows, whose files are whole or absent.

docs/archives.md describes the layout.
"""

import contextlib
import fcntl
import os
import queue
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import duckdb
import msgspec
import numpy as np

from avex_serve.archive.plan import ResultSet
from avex_serve.errors import InputError, NotFoundError, StorageError

LAYOUT: Final = 1  # version of the layout
DESCRIPTION: Final = "store.json"
SET: Final = "set.json"
JOURNAL: Final = "journal.ndjson"
RECORDINGS: Final = "recordings.parquet"
TABLES: Final = "tables"
SCRATCH: Final = ".unfinished"
PIECE_VALUES: Final = 2**20  # values that are kept in memory for each recording that is being computed
BATCH_VALUES: Final = 100_000  # values that are written together: less than a row group, so that none is cut in two
BATCH_SECONDS: Final = 1.0  # what a kill may lose


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A recording in the journal. Without `recording` and `error` it is still to be computed."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds since 1970, as the file system says
    recording: str | None = None  # SHA-256 of the file; None: it wasn't read
    duration: float = 0.0  # seconds
    sample_rate: int = 0  # Hz
    error: str | None = None  # why it couldn't be computed

    @property
    def computed(self) -> bool:
        """Whether its results were computed, by bundles that may be others than the current ones."""
        return self.recording is not None and self.error is None

    def same_file(self, other: "Entry") -> bool:
        """Whether both were seen at the same path with the same size and time."""
        return (self.path, self.size, self.modified) == (other.path, other.size, other.modified)


class Description(msgspec.Struct, frozen=True):
    """What the store is; the content of ``store.json``."""

    layout: int
    current: tuple[str, ...]  # names of the sets that the last run computed


class Piece(NamedTuple):
    """Consecutive rows of one recording in one set."""

    results: ResultSet
    recording: str
    spans: np.ndarray  # (N, 2) float64, seconds
    values: np.ndarray  # (N, C) float32: scores, or flat embeddings
    last: bool


class Store:
    """A store on disk, open for reading; `writing` opens it for one process that adds to it."""

    def __init__(self, folder: Path) -> None:
        """Open a store.

        Raises:
            NotFoundError: there is none.
            InputError: of another layout, or damaged.
        """
        self.folder = folder
        try:
            text = (folder / DESCRIPTION).read_bytes()
        except OSError:
            raise NotFoundError(f"{folder} holds no {DESCRIPTION}; make a store with avex-serve run") from None
        try:
            layout = msgspec.json.decode(text)["layout"]
            if layout != LAYOUT:
                raise InputError(
                    f"{folder} has layout {layout!r}; this avex-serve reads {LAYOUT}: use the one that wrote it"
                )
            self.description = msgspec.json.decode(text, type=Description)
        except (msgspec.MsgspecError, TypeError, KeyError) as error:
            raise InputError(f"{folder / DESCRIPTION} is damaged: {error}; run into another folder") from None

    @classmethod
    @contextlib.contextmanager
    def writing(cls, folder: Path) -> Iterator[Self]:
        """Open a store, or make one in an empty folder, and let nobody else write to it during the block.

        Raises:
            InputError: the folder holds something else, or another process writes to it.
        """
        others = folder.is_dir() and any(path.name != SCRATCH for path in folder.iterdir())
        if not (folder / DESCRIPTION).exists() and (others or folder.is_file()):
            raise InputError(f"{folder} holds no results of avex-serve; choose an empty or new folder")
        scratch = folder / SCRATCH
        with report_full_disk():
            scratch.mkdir(parents=True, exist_ok=True)
            lock = (scratch / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another process writes to {folder}; wait for it, or use another folder") from None
            _empty(scratch)
            if not (folder / DESCRIPTION).exists():
                _write(folder, DESCRIPTION, _document(Description(LAYOUT, ())))
            try:
                yield cls(folder)
            finally:
                _empty(scratch)

    # -- sets ------------------------------------------------------------------------------------------------------

    def sets(self) -> dict[str, ResultSet]:
        """All sets by name."""
        found = {}
        for path in sorted(self.folder.glob(f"*/*/{SET}")):
            try:
                results = msgspec.json.decode(path.read_bytes(), type=ResultSet)
            except msgspec.MsgspecError as error:
                raise InputError(f"{path} is damaged or of another version: {error}") from None
            found[path.parent.name] = results
        return found

    def current(self) -> list[ResultSet]:
        """The sets that the last run computed."""
        sets = self.sets()
        return [sets[name] for name in self.description.current if name in sets]

    def use_sets(self, sets: Sequence[ResultSet]) -> None:
        """Make these the current sets; new ones get a folder."""
        for results in sets:
            folder = self._folder(results)
            if not (folder / SET).exists():
                folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder, str((folder / SET).relative_to(self.folder)), _document(results))
        self.description = Description(LAYOUT, tuple(each.name for each in sets))
        _write(self.folder, DESCRIPTION, _document(self.description))

    def done(self, results: ResultSet) -> set[str]:
        """The digests of the recordings that have results in the set."""
        found: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            for part in os.scandir(self._folder(results)):
                if part.is_dir():
                    with os.scandir(part) as files:
                        # After a power cut, a file may have lost its content.
                        found.update(file.name.partition(".")[0] for file in files if file.stat().st_size)
        return found

    def path(self, results: ResultSet, recording: str) -> Path:
        """Where the results of a recording are."""
        return self._folder(results) / recording[:2] / f"{recording}.parquet"

    def _folder(self, results: ResultSet) -> Path:
        return self.folder / results.kind / results.name

    # -- recordings ------------------------------------------------------------------------------------------------

    def journal(self) -> dict[str, Entry]:
        """The recordings by path, as far as they are known."""
        decode = msgspec.json.Decoder(Entry).decode
        entries = {}
        with contextlib.suppress(FileNotFoundError), (self.folder / JOURNAL).open("rb") as file:
            for line in file:
                with contextlib.suppress(msgspec.MsgspecError):  # a process was killed while it wrote the line
                    entry = decode(line)
                    entries[entry.path] = entry
        return entries

    def write_journal(self, entries: Iterable[Entry]) -> None:
        """Replace the journal, sorted by path, and the table of recordings that is made from it."""
        encode = msgspec.json.Encoder().encode
        unfinished = self.folder / SCRATCH / JOURNAL
        with report_full_disk():
            with unfinished.open("wb") as file:
                for entry in sorted(entries, key=lambda entry: entry.path):
                    file.write(encode(entry) + b"\n")
            with connect() as database:
                database.execute(
                    f"""COPY (SELECT * FROM read_ndjson({quoted(unfinished)}, columns = {{
                        path: VARCHAR, size: BIGINT, modified: BIGINT, recording: VARCHAR, duration: DOUBLE,
                        sample_rate: INTEGER, error: VARCHAR}}))
                    TO {quoted(self.folder / SCRATCH / RECORDINGS)} (FORMAT parquet, COMPRESSION zstd)"""
                )
            for name in (JOURNAL, RECORDINGS):
                (self.folder / SCRATCH / name).replace(self.folder / name)

    def read_embeddings(self, results: ResultSet, recording: str) -> tuple[np.ndarray, np.ndarray]:
        """Spans (N, 2) and embeddings (N, …) of a recording."""
        with connect() as database:
            query = f'SELECT start, "end", embedding FROM read_parquet({quoted(self.path(results, recording))})'
            columns = database.execute(query).fetchnumpy()
        rows = np.stack([np.asarray(row, np.float32) for row in columns["embedding"]])
        return np.stack([columns["start"], columns["end"]], axis=1), rows.reshape(len(rows), *results.shape)


class Writer:
    """Writes results in a thread of its own, so that threads that infer don't wait for the disk.

    Small recordings are written together, each to its own file, since the statement that writes takes longer than
    their content. A line in the journal is written after the results that it promises.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._scratch = store.folder / SCRATCH
        self._queue: queue.Queue[Piece | Entry | None] = queue.Queue(maxsize=16)
        self._error: BaseException | None = None
        self._parts: dict[tuple[str, str], list[Path]] = defaultdict(
            list
        )  # of long recordings, by set and recording
        self._thread = threading.Thread(target=self._run, name="avex-write", daemon=True)
        self._thread.start()

    def put(self, item: Piece | Entry) -> None:
        """Write rows, or the line of a recording whose rows have all been put.

        Raises:
            StorageError: the disk is full, for this or an earlier item.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def close(self) -> None:
        """Write everything that was put; errors as of `put`."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with report_full_disk(), connect() as database, (self._store.folder / JOURNAL).open("ab") as journal:
                self._write_all(database, journal)
        except BaseException as error:  # noqa: BLE001 - raised where something is put
            self._error = error
            while self._queue.get() is not None:
                pass

    def _write_all(self, database: duckdb.DuckDBPyConnection, journal: Any) -> None:
        pieces: list[Piece] = []
        entries: list[Entry] = []
        due = time.monotonic() + BATCH_SECONDS
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                item = None
                ended = False
            else:
                ended = item is None
            if isinstance(item, Piece):
                if (
                    item.last
                    and item.values.size <= BATCH_VALUES
                    and (item.results.name, item.recording) not in self._parts
                ):
                    pieces.append(item)
                else:
                    self._write_part(database, item)
            elif item is not None:
                entries.append(item)
            if item is None or sum(piece.values.size for piece in pieces) > BATCH_VALUES:
                self._write_batch(database, pieces)
                journal.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
                journal.flush()
                pieces, entries = [], []
                due = time.monotonic() + BATCH_SECONDS
            if ended:
                return

    def _write_batch(self, database: duckdb.DuckDBPyConnection, pieces: Sequence[Piece]) -> None:
        batches: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            batches[piece.results.name].append(piece)
        for batch in batches.values():
            folder = self._scratch / "batch"
            rows = _rows(database, batch)
            options = "FORMAT parquet, COMPRESSION zstd, PARTITION_BY (recording), WRITE_PARTITION_COLUMNS true"
            database.execute(f"COPY ({rows}) TO {quoted(folder)} ({options})")
            for piece in batch:
                self._publish(folder / f"recording={piece.recording}" / "data_0.parquet", piece)
            shutil.rmtree(folder)

    def _write_part(self, database: duckdb.DuckDBPyConnection, piece: Piece) -> None:
        key = (piece.results.name, piece.recording)
        part = self._scratch / f"{'-'.join(key)}-{len(self._parts[key])}.parquet"
        options = "FORMAT parquet, COMPRESSION zstd"
        database.execute(f"COPY ({_rows(database, [piece])}) TO {quoted(part)} ({options})")
        self._parts[key].append(part)
        if piece.last:
            parts = self._parts.pop(key)
            if len(parts) > 1:
                part = self._scratch / f"{'-'.join(key)}.parquet"
                names = ", ".join(map(quoted, parts))
                database.execute(f"COPY (SELECT * FROM read_parquet([{names}])) TO {quoted(part)} ({options})")
            self._publish(part, piece)
            for each in parts:
                each.unlink(missing_ok=True)

    def _drop_parts(self, entry: Entry) -> None:
        """Forget the rows of a recording that failed before its last one."""
        for key in [key for key in self._parts if key[1] == entry.recording]:
            for part in self._parts.pop(key):
                part.unlink()

    def _publish(self, file: Path, piece: Piece) -> None:
        target = self._store.path(piece.results, piece.recording)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)


def _rows(database: duckdb.DuckDBPyConnection, pieces: Sequence[Piece]) -> str:
    """Make the rows of these pieces of one set known to the database; the statement that selects them."""
    results = pieces[0].results
    width = pieces[0].values.shape[1]
    spans = np.concatenate([piece.spans for piece in pieces])
    index = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece.spans) for piece in pieces])
    columns = {
        "piece": np.repeat(index, width),
        "start": np.repeat(spans[:, 0], width),
        "stop": np.repeat(spans[:, 1], width),
        "value": np.concatenate([piece.values.ravel() for piece in pieces]),
    }
    names = np.array([piece.recording for piece in pieces], dtype=object)
    database.register("pieces", {"piece": np.arange(len(pieces), dtype=np.int32), "recording": names})
    if results.kind == "embeddings":
        database.register("rows", columns)
        return (
            'SELECT recording, start, stop AS "end", list(value) AS embedding FROM rows JOIN pieces USING (piece) '
            "GROUP BY piece, recording, start, stop ORDER BY piece, start"
        )
    database.register("rows", {**columns, "class": np.tile(np.arange(width, dtype=np.int32), len(spans))})
    probes = np.array([probe.name for probe in results.probes for _ in probe.labels], dtype=object)
    labels = np.array([label for probe in results.probes for label in probe.labels], dtype=object)
    database.register("classes", {"class": np.arange(width, dtype=np.int32), "probe": probes, "label": labels})
    return (
        'SELECT recording, start, stop AS "end", probe, label, value AS score '
        "FROM rows JOIN pieces USING (piece) JOIN classes USING (class)"
    )


# -- files and the database -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def connect(threads: int = 1) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory. With one thread, rows keep their order and files their bytes."""
    config: dict[str, Any] = {"threads": threads, "memory_limit": "1GB", "partitioned_write_max_open_files": 100_000}
    database = duckdb.connect(config=config)
    try:
        yield database
    finally:
        database.close()


def quoted(text: str | os.PathLike[str]) -> str:
    """A string of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


@contextlib.contextmanager
def report_full_disk() -> Iterator[None]:
    """Turn errors of a disk that is full or can't be written into StorageError."""
    try:
        yield
    except (OSError, duckdb.IOException) as error:
        raise StorageError(
            f"the results can't be written: {error}; make room, and start the same command again: it computes only "
            "what is missing"
        ) from error


def _document(struct: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(struct), indent=1) + b"\n"


def _write(folder: Path, name: str, content: bytes) -> None:
    unfinished = folder / SCRATCH / "file"
    unfinished.write_bytes(content)
    unfinished.replace(folder / name)


def _empty(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
