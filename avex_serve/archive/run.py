"""A run: recordings through the passes of a plan, side by side, into a store."""

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from avex_serve.archive.plan import Pass, ResultSet, Target, read_stored
from avex_serve.archive.store import PIECE_VALUES, Entry, Piece, Store, Writer
from avex_serve.audio.reader import AudioStream, Wave, open_audio
from avex_serve.bundles.reading import sha256_of
from avex_serve.errors import AudioError, AvexServeError, StorageError
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import stream_recording
from avex_serve.scheduling.request import Request, answering

Rows = Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]  # spans (B, 2) and outputs (B, …) of windows
CHANGED: Final = "changed while it was read; it is read again in the next run"


@dataclass
class Progress:
    """How far a run is."""

    total: int  # recordings that the run was asked for
    known: int  # of these, computed by earlier runs
    size: int  # bytes of the others
    done: int = 0  # computed in this run
    failed: int = 0
    seconds: float = 0.0  # of audio, computed in this run
    processed: int = 0  # bytes of what is done or has failed
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Seconds of audio that are computed in a second."""
        return self.seconds / max(self.elapsed, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds until the end, by the bytes that are left; None: not known yet."""
        return self.elapsed / self.processed * (self.size - self.processed) if self.processed else None

    def add(self, entry: Entry) -> None:
        """Count a recording that is done or has failed."""
        self.processed += entry.size
        if entry.error is None:
            self.done += 1
            self.seconds += entry.duration
        else:
            self.failed += 1


Report = Callable[[Progress, Entry | None], None]  # None: the run begins


def run(store: Store, passes: Sequence[Pass], paths: Sequence[str], report: Report) -> Progress:
    """Compute what the store lacks, and note every recording in its journal.

    An interruption (KeyboardInterrupt) loses only the recordings that are being computed.

    Args:
        store: open for writing.
        passes: of the plan.
        paths: absolute paths of the recordings.
        report: is called in this thread at the start, and after each recording.

    Raises:
        StorageError: the disk is full.
        BaseException: a fault of ours, or of a library; the recording that caused it is not in the store.
    """
    return _Run(store, passes).run(paths, report)


def classify(store: Store, reader: Engine, report: Report) -> Progress:
    """Score the stored embeddings that a bundle reads, without the recordings; arguments and errors as of `run`.

    Raises:
        UnsupportedError: the bundle takes audio, or the store lacks what its heads read.
    """
    sets = store.sets()
    targets = read_stored(reader, list(sets.values()))
    store.use_sets([*store.current(), *(target.results for target in targets)])
    writer = Writer(store)
    entries = {entry.recording: entry for entry in store.journal().values() if entry.computed}
    progress = Progress(0, 0, 0)
    todo = []
    for target in targets:
        sources = {name: sets[name] for name in target.sources.values()}
        kept = set.intersection(*(store.done(results) for results in sources.values())) & entries.keys()
        todo += [(target, sources, recording) for recording in sorted(kept - store.done(target.results))]
        progress.total += len(kept)
    progress.known = progress.total - len(todo)
    progress.size = sum(entries[recording].size for _, _, recording in todo)
    report(progress, None)
    try:
        for target, sources, recording in todo:
            pieces = _Pieces(target.results, recording, writer)
            for spans, rows in read_embeddings(store, sources, recording):
                pieces.add(spans, target.scores(rows))
            pieces.close()
            progress.add(entries[recording])
            report(progress, entries[recording])
    finally:
        writer.close()
    return progress


class _Run:
    def __init__(self, store: Store, passes: Sequence[Pass]) -> None:
        self._store = store
        self._passes = passes
        self._sets = [results for each in passes for results in each.sets]
        self._done = {results.name: store.done(results) for results in self._all_sets()}
        self._journal = store.journal()
        # By digest: duration and rate are known without reading the recording again, wherever it is.
        self._sounds = {entry.recording: entry for entry in self._journal.values() if entry.computed}
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}  # recordings by digest, so that copies are computed once
        self._requests: set[Request] = set()
        self._stopped = False

    def _all_sets(self) -> Iterator[ResultSet]:
        for each in self._passes:
            yield from (target.results for target in each.targets)
            yield from each.embeddings.values()

    def run(self, paths: Sequence[str], report: Report) -> Progress:
        """See `run`."""
        seen = [_look(path) for path in paths]
        pending = []
        for entry in seen:
            known = self._journal.get(entry.path)
            if known is not None and known.computed and known.same_file(entry):
                if not self._missing(known.recording):
                    continue
                entry = known
            else:
                self._journal[entry.path] = entry
            if entry.error is None:
                pending.append(entry)
        failed = [entry for entry in seen if entry.error is not None]
        size = sum(entry.size for entry in pending)
        progress = Progress(len(seen), len(seen) - len(pending) - len(failed), size)
        self._store.use_sets(self._sets)
        self._store.write_journal(self._journal.values())
        report(progress, None)
        for entry in failed:
            self._note(entry, progress, report)
        try:
            self._compute_all(pending, progress, report)
        finally:
            self._forget_moved(seen)
            self._store.write_journal(self._journal.values())
        return progress

    def _missing(self, recording: str | None) -> list[ResultSet]:
        return [results for results in self._sets if recording not in self._done[results.name]]

    def _compute_all(self, pending: Sequence[Entry], progress: Progress, report: Report) -> None:
        if not pending:
            return
        todo = iter(pending)
        outcomes: queue.SimpleQueue[Entry | BaseException | None] = queue.SimpleQueue()
        writer = Writer(self._store)

        def work() -> None:
            try:
                while not self._stopped:
                    with self._lock:
                        entry = next(todo, None)
                    if entry is None:
                        break
                    outcomes.put(self._compute(entry, writer))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
                outcomes.put(error)
            else:
                outcomes.put(None)

        # One more than infer: while a recording is decoded, the others keep the cores busy.
        count = min(len(pending), 1 + max(each.source.threads for each in self._passes))
        workers = [threading.Thread(target=work, name=f"avex-run-{index}", daemon=True) for index in range(count)]
        for worker in workers:
            worker.start()
        try:
            ended = 0
            while ended < count:
                outcome = outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome is None:
                    ended += 1
                else:
                    self._note(outcome, progress, report)
        finally:
            self._stopped = True
            with self._lock:
                for request in self._requests:
                    request.abandon()
            for worker in workers:
                worker.join()
            writer.close()

    def _note(self, entry: Entry, progress: Progress, report: Report) -> None:
        self._journal[entry.path] = entry
        progress.add(entry)
        report(progress, entry)

    def _forget_moved(self, seen: Sequence[Entry]) -> None:
        """Forget recordings whose file is gone and whose content this run found elsewhere."""
        now = {entry.path for entry in seen}
        found = {self._journal[path].recording for path in now} - {None}
        for path, entry in list(self._journal.items()):
            if path not in now and entry.recording in found and not os.path.lexists(path):
                del self._journal[path]

    # -- in the threads --------------------------------------------------------------------------------------------

    def _compute(self, entry: Entry, writer: Writer) -> Entry:
        """Compute a recording, and put its rows and its line into the store."""
        request = Request()
        with self._lock:
            self._requests.add(request)
            if self._stopped:
                request.abandon()
        now = _look(entry.path)  # it may have grown since the recordings were listed
        recording = entry.recording if now.same_file(entry) else None
        try:
            with answering(request):
                if now.error is not None:
                    raise AudioError(now.error)
                recording = recording or _digest(entry.path)
                with self._alone(recording):
                    sound = self._fill(msgspec.structs.replace(now, recording=recording), writer)
            now = msgspec.structs.replace(sound, path=now.path, size=now.size, modified=now.modified)
        except StorageError:
            raise
        except AvexServeError as error:
            if self._stopped:
                raise
            now = msgspec.structs.replace(now, recording=recording, error=str(error))
        finally:
            with self._lock:
                self._requests.discard(request)
        writer.put(now)
        return now

    @contextmanager
    def _alone(self, recording: str) -> Iterator[None]:
        """Let one thread compute the recording; those with a copy of it wait, and find it done."""
        mine = threading.Event()
        while True:
            with self._lock:
                other = self._running.setdefault(recording, mine)
            if other is mine:
                break
            other.wait()
        try:
            yield
        finally:
            with self._lock:
                del self._running[recording]
            mine.set()

    def _fill(self, entry: Entry, writer: Writer) -> Entry:
        """Compute the sets that lack the recording; its entry, with duration and rate."""
        recording = entry.recording
        assert recording is not None
        sound = self._sounds.get(recording)
        for each in self._passes:
            # A run that was killed may have left results without a line in the journal: they are computed again.
            lacking = (
                each.sets if sound is None else [one for one in each.sets if recording not in self._done[one.name]]
            )
            if not lacking:
                continue
            targets = [target for target in each.targets if target.results in lacking]
            rows = self._stored_rows(each, lacking, targets, recording) if sound is not None else None
            listener = _Listener(Path(entry.path))
            if rows is None:
                kept = {output: results for output, results in each.embeddings.items() if results in lacking}
                names = [output for target in targets for output in target.sources.values()]
                rows = stream_recording(
                    each.source, listener.open, each.query.overlap, list(dict.fromkeys([*names, *kept]))
                )
            else:
                kept = {}
            pieces = {one.name: _Pieces(one, recording, writer) for one in lacking}
            for spans, outputs in rows:
                for target in targets:
                    pieces[target.results.name].add(spans, target.scores(outputs))
                for output, results in kept.items():
                    pieces[results.name].add(spans, outputs[output].reshape(len(spans), -1))
            if not _look(entry.path).same_file(entry):
                raise AudioError(f"{entry.path} {CHANGED}")
            for one in lacking:
                pieces[one.name].close()
                self._done[one.name].add(recording)
            if sound is None:
                sound = msgspec.structs.replace(
                    entry, duration=listener.frames / listener.sample_rate, sample_rate=listener.sample_rate
                )
        assert sound is not None
        self._sounds[recording] = sound
        return sound

    def _stored_rows(
        self, each: Pass, lacking: Sequence[ResultSet], targets: Sequence[Target], recording: str
    ) -> Rows | None:
        """The stored embeddings that the targets read; None: some are not stored, or the recording is needed."""
        if len(targets) < len(lacking) or any(target.engine is each.source for target in targets):
            return None
        sources = {output: each.embeddings[output] for target in targets for output in target.sources.values()}
        if any(recording not in self._done[results.name] for results in sources.values()):
            return None
        return read_embeddings(self._store, sources, recording)


class _Listener:
    """Counts the samples of a recording while it is read."""

    def __init__(self, path: Path) -> None:
        self.frames = 0
        self.sample_rate = 1
        self._path = path

    @contextmanager
    def open(self) -> Iterator[AudioStream]:
        """The recording as a stream."""
        with open_audio(self._path) as stream:
            self.sample_rate = stream.sample_rate
            yield stream._replace(blocks=self._count(stream.blocks))

    def _count(self, blocks: Iterable[Wave]) -> Iterator[Wave]:
        for block in blocks:
            self.frames += block.size
            yield block


class _Pieces:
    """Rows of one recording in one set, put into the store in pieces of a fixed number of rows."""

    def __init__(self, results: ResultSet, recording: str, writer: Writer) -> None:
        self._results = results
        self._recording = recording
        self._writer = writer
        self._spans: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._count = 0

    def add(self, spans: np.ndarray, values: np.ndarray) -> None:
        """Add rows: (B, 2) seconds and (B, C) values."""
        self._spans.append(spans)
        self._values.append(values)
        self._count += len(spans)
        most = max(1, PIECE_VALUES // values.shape[1])
        while self._count > most:  # never the last row, which `close` puts
            spans, values = np.concatenate(self._spans), np.concatenate(self._values)
            self._put(spans[:most], values[:most], last=False)
            self._spans, self._values = [spans[most:]], [values[most:]]
            self._count -= most

    def close(self) -> None:
        """Put the last rows."""
        self._put(np.concatenate(self._spans), np.concatenate(self._values), last=True)

    def _put(self, spans: np.ndarray, values: np.ndarray, *, last: bool) -> None:
        self._writer.put(Piece(self._results, self._recording, spans, values, last))


def read_embeddings(store: Store, sources: Mapping[str, ResultSet], recording: str) -> Rows:
    """Stored embeddings of a recording as the rows of a pass: one batch, with an output for each set."""
    outputs = {}
    for name, results in sources.items():
        spans, outputs[name] = store.read_embeddings(results, recording)
    yield spans, outputs


def _look(path: str) -> Entry:
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return Entry(shown, 0, 0, error=f"{shown}: the name is not UTF-8; rename the file")
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each of 100,000 names is slow
    except OSError as error:
        return Entry(path, 0, 0, error=f"{path} can't be read: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Entry(path, 0, 0, error=f"{path} is not a file")
    return Entry(path, status.st_size, status.st_mtime_ns)


def _digest(path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise AudioError(f"{path} can't be read: {error.strerror}") from None
