"""The results of a run: a folder that grows, whose files are whole or absent.

docs/archives.md describes the layout.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Self

import msgspec
import numpy as np

from avex_serve.archive.cloud import Remote, find_folders
from avex_serve.archive.parquet import ParquetWriter, cycles, lists, plain, runs
from avex_serve.archive.plan import ResultSet
from avex_serve.bundles.remote import is_remote
from avex_serve.database import connect, quoted
from avex_serve.errors import InputError, NotFoundError
from avex_serve.writing import report_full_disk

logger = logging.getLogger(__name__)

LAYOUT: Final = 1  # version of the layout
DESCRIPTION: Final = "store.json"
SET: Final = "set.json"
JOURNAL: Final = "journal.ndjson"
RECORDINGS: Final = "recordings.parquet"
TABLES: Final = "tables"
SCRATCH: Final = ".unfinished"
LOCK: Final = "lock"
RESULTS: Final = ".parquet"
GROUP_VALUES: Final = 2**20  # values in a group of rows: as many are in memory for each recording that is computed


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A recording in the journal. Without `recording` and `error` it is still to be computed."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds since 1970, as the file system says
    recording: str | None = None  # SHA-256 of the file; None: it wasn't read
    duration: float = 0.0  # seconds
    sample_rate: int = 0  # Hz
    channels: int = 0
    start: str | None = None  # local time in ISO 8601; None: unknown, like those that follow
    offset: str | None = None  # of that time from UTC, such as +10:00
    latitude: float | None = None  # degrees, north positive
    longitude: float | None = None  # degrees, east positive
    recorder: str | None = None
    warnings: tuple[str, ...] = ()  # reasons to doubt its results, a sentence each
    error: str | None = None  # why it couldn't be computed

    @property
    def computed(self) -> bool:
        """Whether its results were computed, by bundles that may be others than the current ones."""
        return self.recording is not None and self.error is None

    def same_file(self, other: "Entry") -> bool:
        """Whether both were seen at the same path with the same size and time."""
        return (self.path, self.size, self.modified) == (other.path, other.size, other.modified)


class Part(msgspec.Struct, frozen=True):
    """The part of a list of recordings that a store is about; see `avex_serve.archive.shards`."""

    shard: int  # from 1
    shards: int
    own: int  # recordings in this part
    recordings: int  # in the list
    digest: str  # SHA-256 of the list


class Description(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the store is; the content of ``store.json``."""

    layout: int
    current: tuple[str, ...]  # names of the sets that the last run computed
    part: Part | None = None  # None: of all recordings


class Store:
    """A store on disk, open for reading; `writing` opens it for one process that adds to it.

    A store in an object store is a folder on this machine that holds what was needed of it until now.
    """

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        """Open a store.

        Args:
            folder: of the store; see `opened` and `adding`.
            remote: the object store that the folder is a copy of.

        Raises:
            NotFoundError: there is none.
            InputError: of another layout, or damaged.
        """
        self.folder = folder
        self.remote = remote
        self.compact = False
        try:
            text = (folder / DESCRIPTION).read_bytes()
        except OSError:
            if any(folder.glob(f"*/{DESCRIPTION}")):
                reason = f"no {DESCRIPTION}, but folders that do, such as shards; name one of them, or merge them"
            else:
                reason = f"no {DESCRIPTION}; make a store with avex-serve run"
            raise NotFoundError(f"{self.place} holds {reason}") from None
        try:
            layout = msgspec.json.decode(text)["layout"]
            if layout != LAYOUT:
                raise InputError(
                    f"{self.place} has layout {layout!r}; this avex-serve reads {LAYOUT}: use the one that wrote it"
                )
            self.description = msgspec.json.decode(text, type=Description)
        except (msgspec.MsgspecError, TypeError, KeyError) as error:
            raise InputError(f"{self.place}/{DESCRIPTION} is damaged: {error}; run into another folder") from None

    @property
    def place(self) -> str:
        """Where it is, as the user calls it."""
        return str(self.folder) if self.remote is None else self.remote.url

    @classmethod
    @contextlib.contextmanager
    def writing(cls, folder: Path, remote: Remote | None = None) -> Iterator[Self]:
        """Open a store, or make one in an empty folder, and let nobody else write to the folder during the block.

        Raises:
            InputError: the folder holds something else, or another process writes to it.
        """
        others = folder.is_dir() and any(path.name != SCRATCH for path in folder.iterdir())
        if not (folder / DESCRIPTION).exists() and (others or folder.is_file()):
            raise InputError(f"{folder} holds no results of avex-serve; choose an empty or new folder")
        scratch = folder / SCRATCH
        with report_full_disk():
            scratch.mkdir(parents=True, exist_ok=True)
            lock = (scratch / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process writes to {folder}; wait for it, or use another folder") from None
            except OSError as error:  # some file systems of clusters have no locks
                logger.warning("%s can't be locked (%s): let no other process write to it", folder, error.strerror)
            _empty(scratch)
            if not (folder / DESCRIPTION).exists():
                (folder / DESCRIPTION).write_bytes(_document(Description(LAYOUT, ())))
            try:
                yield cls(folder, remote)
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

    def current_scores(self) -> list[ResultSet]:
        """Those of them that are scores; NotFoundError if there are none."""
        if found := [results for results in self.current() if results.kind == "scores"]:
            return found
        raise NotFoundError(f"{self.place} has no scores; run a bundle with a probe, or classify its embeddings")

    def add_set(self, results: ResultSet) -> None:
        """Make the folder of a set; one that is there gets the version and the calibration of this."""
        path, document = self._folder(results) / SET, _document(results)
        if not path.exists() or path.read_bytes() != document:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(str(path.relative_to(self.folder)), document)

    def use_sets(self, sets: Sequence[ResultSet], part: Part | None = None) -> None:
        """Make these the current sets, of all recordings or of a part of them."""
        for results in sets:
            self.add_set(results)
        self.description = Description(LAYOUT, tuple(dict.fromkeys(each.name for each in sets)), part)
        self._write(DESCRIPTION, _document(self.description))

    def done(self, results: ResultSet) -> set[str]:
        """The digests of the recordings that have results in the set."""
        found: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            for part in os.scandir(self._folder(results)):
                if part.is_dir():
                    with os.scandir(part) as files:
                        # After a power cut, a file may have lost its content.
                        found.update(file.name.partition(".")[0] for file in files if file.stat().st_size)
        if self.remote is not None:
            names = self.remote.below(f"{results.kind}/{results.name}")
            found.update(Path(name).stem for name in names if name.endswith(RESULTS))
        return found

    def add_results(self, results: ResultSet, recording: str, source: str) -> None:
        """Add the results of a recording from a file of another store, as a link where that can be."""
        target, unfinished = self.path(results, recording), self.folder / SCRATCH / f"{results.name}-{recording}"
        with report_full_disk():
            try:
                unfinished.hardlink_to(source)
            except OSError:  # on another disk, or of a file system without links
                shutil.copyfile(source, unfinished)
            self.publish(unfinished, target)

    def add_content(self, results: ResultSet, recording: str, content: bytes) -> None:
        """Add the results of a recording that another process has computed."""
        unfinished = self.folder / SCRATCH / f"{results.name}-{recording}"
        with report_full_disk():
            unfinished.write_bytes(content)
            self.publish(unfinished, self.path(results, recording))

    def paths(self, results: ResultSet, recordings: Iterable[str]) -> list[str]:
        """Files with the results of these recordings, which are `done`."""
        place = f"{results.kind}/{results.name}"  # a Path for each of 100,000 names is slow
        names = [f"{place}/{recording[:2]}/{recording}{RESULTS}" for recording in recordings]
        if self.remote is not None:
            with report_full_disk():
                self.remote.fetch([name for name in names if not (self.folder / name).exists()], self.folder)
        return [f"{self.folder}/{name}" for name in names]

    def path(self, results: ResultSet, recording: str) -> Path:
        """Where the results of a recording are, or will be."""
        return self._folder(results) / recording[:2] / f"{recording}{RESULTS}"

    def publish(self, unfinished: Path, target: Path) -> None:
        """Give the results of a recording their name."""
        target.parent.mkdir(exist_ok=True)
        if self.remote is not None:
            self.remote.create(unfinished, str(target.relative_to(self.folder)))
        unfinished.replace(target)

    def keep_table(self, target: Path) -> str:
        """Keep a table that was written into the store; returns where it is."""
        if self.remote is None or not target.is_relative_to(self.folder):
            return str(target)
        for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
            if path.is_file():
                self.remote.replace(path, str(path.relative_to(self.folder)))
        return f"{self.place}/{target.relative_to(self.folder)}"

    def _folder(self, results: ResultSet) -> Path:
        return self.folder / results.kind / results.name

    # -- recordings ------------------------------------------------------------------------------------------------

    def journal(self) -> dict[str, Entry]:
        """The recordings by path. Sets `compact`, whether `write_journal` was the last to write the journal."""
        decode = msgspec.json.Decoder(Entry).decode
        entries: dict[str, Entry] = {}
        last = ""
        self.compact = (self.folder / RECORDINGS).exists()
        with contextlib.suppress(FileNotFoundError), (self.folder / JOURNAL).open("rb") as file:
            for line in file:
                try:
                    entry = decode(line)
                except msgspec.MsgspecError:  # a process was killed while it wrote the line
                    self.compact = False
                    continue
                self.compact = self.compact and last < entry.path
                last = entry.path
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
                        sample_rate: INTEGER, channels: INTEGER, start: VARCHAR, "offset": VARCHAR,
                        latitude: DOUBLE, longitude: DOUBLE, recorder: VARCHAR, warnings: 'VARCHAR[]',
                        error: VARCHAR}}))
                    TO {quoted(self.folder / SCRATCH / RECORDINGS)} (FORMAT parquet, COMPRESSION zstd)"""
                )
            for name in (RECORDINGS, JOURNAL):  # a compact journal promises the table
                self._replace(name, name)

    @contextlib.contextmanager
    def journaling(self) -> Iterator[Callable[[Entry], None]]:
        """A function that adds a line to the journal, from any thread; StorageError if the disk is full."""
        lock = threading.Lock()
        with (self.folder / JOURNAL).open("ab", buffering=0) as file:

            def note(entry: Entry) -> None:
                with report_full_disk(), lock:
                    file.write(msgspec.json.encode(entry) + b"\n")
                    if self.remote is not None:
                        self.remote.follow(self.folder / JOURNAL, JOURNAL)

            yield note

    def read_embeddings(self, results: ResultSet, recording: str) -> tuple[np.ndarray, np.ndarray]:
        """Spans (N, 2) and embeddings (N, …) of a recording."""
        [path] = self.paths(results, [recording])
        with connect() as database:
            query = f'SELECT start, "end", embedding FROM read_parquet({quoted(path)})'
            columns = database.execute(query).fetchnumpy()
        rows = np.stack([np.asarray(row, np.float32) for row in columns["embedding"]])
        return np.stack([columns["start"], columns["end"]], axis=1), rows.reshape(len(rows), *results.shape)

    # -- files -----------------------------------------------------------------------------------------------------

    def _write(self, name: str, content: bytes) -> None:
        (self.folder / SCRATCH / "file").write_bytes(content)
        self._replace("file", name)

    def _replace(self, unfinished: str, name: str) -> None:
        if self.remote is not None:
            self.remote.replace(self.folder / SCRATCH / unfinished, name)
        (self.folder / SCRATCH / unfinished).replace(self.folder / name)


class ResultFile:
    """The results of one recording in one set, written in groups of rows. They appear when it is `published`."""

    def __init__(self, store: Store, results: ResultSet, recording: str) -> None:
        self._store = store
        self._results = results
        self._recording = recording
        self._target = store.path(results, recording)
        self._unfinished = store.folder / SCRATCH / f"{results.name}-{recording}.parquet"
        self._file: BinaryIO | None = None
        self._spans: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._unfinished.unlink(missing_ok=True)

    def add(self, spans: np.ndarray, values: np.ndarray) -> None:
        """Add rows: (B, 2) seconds, and (B, C) scores or (B, …) embeddings in float32.

        Raises:
            StorageError: the disk is full.
        """
        values = values.reshape(len(values), -1)
        self._spans.append(spans)
        self._values.append(values)
        self._count += len(values)
        most = max(1, GROUP_VALUES // values.shape[1])
        while self._count >= most:  # groups of one size, however the rows arrive
            spans, values = np.concatenate(self._spans), np.concatenate(self._values)
            self._write(spans[:most], values[:most])
            self._spans, self._values, self._count = [spans[most:]], [values[most:]], len(values) - most

    def publish(self) -> None:
        """Write the last rows, and give the file its name; StorageError if the disk is full."""
        if self._count:
            self._write(np.concatenate(self._spans), np.concatenate(self._values))
        assert self._file is not None
        with report_full_disk():
            self._writer.close()
            self._file.close()
            self._store.publish(self._unfinished, self._target)
        self._file = None

    def _write(self, spans: np.ndarray, values: np.ndarray) -> None:
        rows, width = values.shape
        scored = self._results.kind == "scores"
        every = width if scored else 1  # rows of the file for a window
        columns = {
            "recording": runs([self._recording], rows * every),
            "start": runs(spans[:, 0], every),
            "end": runs(spans[:, 1], every),
        }
        if scored:
            probes = tuple(probe.name for probe in self._results.probes for _ in probe.labels)
            labels = tuple(label for probe in self._results.probes for label in probe.labels)
            columns |= {"probe": cycles(probes, rows), "label": cycles(labels, rows), "score": plain(values.ravel())}
        else:
            columns["embedding"] = lists(values)
        with report_full_disk():
            if self._file is None:
                self._file = self._unfinished.open("wb")
                self._writer = ParquetWriter(self._file)
            self._writer.write(columns)


@contextlib.contextmanager
def opened(place: str | Path) -> Iterator[Store]:
    """Open a store for reading: a folder, or one of an object store; errors as of `Store`."""
    if not is_remote(str(place)):
        yield Store(Path(place))
        return
    with _copied(str(place)) as (folder, remote):
        yield Store(folder, remote)


@contextlib.contextmanager
def adding(place: str | Path) -> Iterator[Store]:
    """Open a store for one process that adds to it; errors as of `Store.writing`.

    An object store has no locks: two processes there don't harm the results, and the last one's journal stays.
    """
    if not is_remote(str(place)):
        with Store.writing(Path(place)) as store:
            yield store
        return
    with _copied(str(place)) as (folder, remote):
        if remote.files and DESCRIPTION not in remote.files:
            raise InputError(f"{place} holds no results of avex-serve; choose an empty or new folder")
        with Store.writing(folder, remote) as store:
            yield store


def list_stores(place: str) -> set[str]:
    """The names of the folders in a folder that are stores; "" if it is one itself."""
    if is_remote(place):
        return find_folders(place, DESCRIPTION)
    inside = {path.parent.name for path in Path(place).glob(f"*/{DESCRIPTION}")}
    return inside | {""} if (Path(place) / DESCRIPTION).exists() else inside


@contextlib.contextmanager
def _copied(url: str) -> Iterator[tuple[Path, Remote]]:
    """A folder with a copy of what describes a store."""
    remote = Remote(url)
    with tempfile.TemporaryDirectory(prefix="avex-") as scratch:
        folder = Path(scratch) / "store"
        folder.mkdir()
        whole = (DESCRIPTION, JOURNAL, RECORDINGS)
        with report_full_disk():
            remote.fetch([name for name in remote.files if name in whole or name.endswith(f"/{SET}")], folder)
        yield folder, remote


# -- files --------------------------------------------------------------------------------------------------------


def _document(struct: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(struct), indent=1) + b"\n"


def _empty(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.name != LOCK:
            path.unlink()
