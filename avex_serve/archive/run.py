"""A run: recordings through the passes of a plan, side by side, into a store."""

import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from avex_serve.archive.cloud import Look, local_copy, look
from avex_serve.archive.files import shown
from avex_serve.archive.plan import Pass, ResultSet, read_stored
from avex_serve.archive.store import Entry, Part, ResultFile, Store
from avex_serve.audio.reader import describe, open_audio
from avex_serve.audio.recorder import find_origin, format_offset
from avex_serve.bundles.reading import sha256_of
from avex_serve.bundles.remote import is_remote
from avex_serve.errors import AudioError, AvexServeError, BundleError, NotFoundError, StorageError
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import stream_windows
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


# From recordings that are to be computed to entries for the journal with the results by set, in any order.
Elsewhere = Callable[[Iterable[Entry]], Generator[tuple[Entry, Mapping[str, bytes]], None, None]]
Note = Callable[[Entry], None]
Report = Callable[[Progress, Entry | None], None]  # None: the run begins


def run(
    store: Store,
    passes: Sequence[Pass],
    recordings: Mapping[str, str | None],
    report: Report,
    *,
    objects: Mapping[str, Look] | None = None,
    part: Part | None = None,
    engine: Elsewhere | None = None,
) -> Progress:
    """Compute what the store lacks, and note every recording in its journal.

    An interruption (KeyboardInterrupt) loses only the recordings that are being computed.

    Args:
        store: open for writing.
        passes: of the plan.
        recordings: by absolute path; with the reason where it is known that there is no recording.
        report: is called in this thread at the start, and after each recording.
        objects: size and time of those in object stores, where they are known from a listing.
        part: which part of a list the recordings are; None: all of it.
        engine: computes recordings in other processes; None: this process does.

    Raises:
        StorageError: the disk is full.
        BaseException: a fault of ours, or of a library; the recording that caused it is not in the store.
    """
    return Run(store, passes, engine).run(recordings, report, objects or {}, part)


def classify(store: Store, reader: Engine, report: Report) -> Progress:
    """Score the stored embeddings that a bundle reads, without the recordings; arguments and errors as of `run`.

    Raises:
        UnsupportedError: the bundle takes audio, or the store lacks what its heads read.
    """
    sets = store.sets()
    targets = read_stored(reader, list(sets.values()))
    store.use_sets([*store.current(), *(target.results for target in targets)], store.description.part)
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
    for target, sources, recording in todo:
        with ResultFile(store, target.results, recording) as file:
            for spans, rows in read_embeddings(store, sources, recording):
                file.add(spans, target.scores(rows))
            file.publish()
        progress.add(entries[recording])
        report(progress, entries[recording])
    return progress


class Run:
    """A run of passes into a store; see `run`."""

    def __init__(self, store: Store, passes: Sequence[Pass], engine: Elsewhere | None = None) -> None:
        self._store = store
        self._passes = passes
        self._engine = engine
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

    def run(
        self,
        recordings: Mapping[str, str | None],
        report: Report,
        objects: Mapping[str, Look],
        part: Part | None,
    ) -> Progress:
        """See `run`."""
        before = dict(self._journal)
        seen: set[str] = set()
        pending: list[Entry] = []
        failed: list[Entry] = []
        for path, reason in recordings.items():
            entry = _look(path, objects.get(path)) if reason is None else Entry(path, 0, 0, error=reason)
            seen.add(entry.path)
            known = self._journal.get(entry.path)
            if known is not None and known.computed and known.same_file(entry):
                entry = known
                if not any(self._lacking(each, known.recording) for each in self._passes):
                    continue
            self._journal[entry.path] = entry
            (pending if entry.error is None else failed).append(entry)
        size = sum(entry.size for entry in pending)
        progress = Progress(len(recordings), len(recordings) - len(pending) - len(failed), size)
        self._store.use_sets(self._sets, part)
        if pending:  # so that status knows what is missing, whatever happens to this process
            self._store.write_journal(self._journal.values())
        report(progress, None)
        for entry in failed:
            self._note(entry, progress, report)
        try:
            self._compute_all(pending, progress, report)
        finally:
            self._forget_moved(seen)
            if pending or not self._store.compact or self._journal != before:
                self._store.write_journal(self._journal.values())
        return progress

    def _compute_all(self, pending: Sequence[Entry], progress: Progress, report: Report) -> None:
        here = pending if self._engine is None else [entry for entry in pending if self._is_stored(entry)]
        there = [] if self._engine is None else [entry for entry in pending if not self._is_stored(entry)]
        with self._store.journaling() as note:
            if here:
                self._compute_here(here, progress, report, note)
            if there:
                self._compute_there(there, progress, report, note)

    def _compute_there(self, pending: Sequence[Entry], progress: Progress, report: Report, note: Note) -> None:
        assert self._engine is not None
        names = {results.name for results in self._sets}
        with closing(self._engine(pending)) as answers:
            for entry, files in answers:
                if entry.computed and files.keys() != names:
                    raise BundleError(f"{entry.path} was computed by other bundles; copy these to every machine")
                for results in self._sets if entry.computed else ():
                    self._store.add_content(results, str(entry.recording), files[results.name])
                note(entry)
                self._note(entry, progress, report)

    def _compute_here(self, pending: Sequence[Entry], progress: Progress, report: Report, note: Note) -> None:
        todo = iter(pending)
        outcomes: queue.SimpleQueue[Entry | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                while not self._stopped:
                    with self._lock:
                        entry = next(todo, None)
                    if entry is None:
                        break
                    entry = self.compute(entry)
                    note(entry)
                    outcomes.put(entry)
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

    def _is_stored(self, entry: Entry) -> bool:
        """Whether what a recording lacks can be computed from stored embeddings."""
        return (
            entry.recording is not None
            and entry.recording in self._sounds
            and all(
                self._stored_sources(each, self._lacking(each, entry.recording), entry.recording) is not None
                for each in self._passes
            )
        )

    def _note(self, entry: Entry, progress: Progress, report: Report) -> None:
        self._journal[entry.path] = entry
        progress.add(entry)
        report(progress, entry)

    def _forget_moved(self, seen: Collection[str]) -> None:
        """Forget recordings whose file is gone, if they failed or this run found their content elsewhere."""
        found = {self._journal[path].recording for path in seen} - {None}
        for path, entry in list(self._journal.items()):
            replaced = entry.recording in found or not entry.computed
            if path not in seen and replaced and _is_gone(path):
                del self._journal[path]

    # -- in the threads --------------------------------------------------------------------------------------------

    def compute(self, entry: Entry) -> Entry:
        """Compute a recording and store its results; its entry for the journal."""
        request = Request()
        with self._lock:
            self._requests.add(request)
            if self._stopped:
                request.abandon()
        now = _look(entry.path)  # it may have grown since the recordings were listed
        file = entry.path
        recording = entry.recording if now.same_file(entry) else None
        try:
            with answering(request):
                if now.error is not None:
                    raise AudioError(now.error)
                with local_copy(entry.path) as file:
                    recording = recording or _digest(file)
                    with self._alone(recording):
                        sound = self._fill(msgspec.structs.replace(now, recording=recording), file)
                    now = _with_origin(sound, now, file)
        except StorageError:
            raise
        except AvexServeError as error:
            if self._stopped:
                raise
            reason = str(error).replace(file, entry.path)
            reason = reason if entry.path in reason else f"{entry.path}: {reason}"
            now = msgspec.structs.replace(now, recording=recording, error=reason)
        finally:
            with self._lock:
                self._requests.discard(request)
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

    def _fill(self, entry: Entry, file: str) -> Entry:
        """Compute the sets that lack the recording, from its `file`; its entry, with duration and rate."""
        recording = entry.recording
        assert recording is not None
        sound = self._sounds.get(recording)
        for each in self._passes:
            # A run that was killed may have left results without a line in the journal: they are computed again.
            lacking = each.sets if sound is None else self._lacking(each, recording)
            if not lacking:
                continue
            computed = self._compute_sets(each, lacking, entry, file, known=sound is not None)
            sound = sound or computed
        assert sound is not None
        self._sounds[recording] = sound
        return sound

    def _compute_sets(
        self, each: Pass, lacking: Sequence[ResultSet], entry: Entry, file: str, *, known: bool
    ) -> Entry:
        """Compute these sets of a pass, from stored embeddings if the recording is known.

        Returns:
            The entry, with what was read of the recording.
        """
        recording = entry.recording
        assert recording is not None
        targets = [target for target in each.targets if target.results in lacking]
        kept = {output: results for output, results in each.embeddings.items() if results in lacking}
        with ExitStack() as stack:
            files = {one.name: stack.enter_context(ResultFile(self._store, one, recording)) for one in lacking}

            def add(rows: Rows) -> None:
                for spans, outputs in rows:
                    for target in targets:
                        files[target.results.name].add(spans, target.scores(outputs))
                    for output, results in kept.items():
                        files[results.name].add(spans, outputs[output])

            sources = {output for target in targets for output in target.sources.values()}
            stored = self._stored_sources(each, lacking, recording) if known else None
            if stored is not None:
                add(read_embeddings(self._store, stored, recording))
            else:
                with open_audio(file, each.query.channel) as stream:
                    add(stream_windows(each.source, stream, each.query, sorted(sources | kept.keys())))
                entry = msgspec.structs.replace(
                    entry,
                    duration=stream.samples / stream.sample_rate,
                    sample_rate=stream.sample_rate,
                    warnings=tuple(stream.warnings),
                )
            if not _look(entry.path).same_file(entry):
                raise AudioError(f"{entry.path} {CHANGED}")
            for results in lacking:
                files[results.name].publish()
                self._done[results.name].add(recording)
        return entry

    def _lacking(self, each: Pass, recording: str | None) -> list[ResultSet]:
        return [results for results in each.sets if recording not in self._done[results.name]]

    def _stored_sources(
        self, each: Pass, lacking: Sequence[ResultSet], recording: str
    ) -> dict[str, ResultSet] | None:
        """The stored embeddings that these sets can be computed from, by output; None: the audio is needed."""
        sources: dict[str, ResultSet] = {}
        for results in lacking:
            target = next((target for target in each.targets if target.results is results), None)
            for output in target.sources.values() if target is not None else ("",):
                embeddings = each.embeddings.get(output)
                if embeddings is None or recording not in self._done[embeddings.name]:
                    return None
                sources[output] = embeddings
        return sources


def read_embeddings(store: Store, sources: Mapping[str, ResultSet], recording: str) -> Rows:
    """Stored embeddings of a recording as the rows of a pass: one batch, with an output for each set."""
    outputs = {}
    for name, results in sources.items():
        spans, outputs[name] = store.read_embeddings(results, recording)
    yield spans, outputs


def _look(path: str, listed: Look | None = None) -> Entry:
    """The entry of a recording that may have to be computed; of an object, as it was listed."""
    if is_remote(path):
        try:
            return Entry(path, *(listed or look(path)))
        except AvexServeError as error:
            return Entry(path, 0, 0, error=str(error))
    try:
        path.encode()
    except UnicodeEncodeError:
        name = shown(path)
        return Entry(name, 0, 0, error=f"{name}: the name is not UTF-8; rename the file")
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each of 100,000 names is slow
    except OSError as error:
        return Entry(path, 0, 0, error=f"{path} can't be read: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Entry(path, 0, 0, error=f"{path} is not a file")
    return Entry(path, status.st_size, status.st_mtime_ns)


def _is_gone(path: str) -> bool:
    if not is_remote(path):
        return not os.path.lexists(path)
    try:
        look(path)
    except NotFoundError:
        return True
    return False


def _with_origin(sound: Entry, now: Entry, file: str) -> Entry:
    """The entry of a recording with what name and header say of time and place.

    Args:
        sound: of a recording with the same content, under this or another name.
        now: path, size and time.
        file: the content.
    """
    header = describe(file)
    found = {path: find_origin(_name(path), header.metadata, sound.duration) for path in (sound.path, now.path)}
    others = found[sound.path].warnings if sound.path != now.path else ()
    origin = found[now.path]
    warnings = [warning for warning in sound.warnings if warning not in others]
    return msgspec.structs.replace(
        sound,
        path=now.path,
        size=now.size,
        modified=now.modified,
        channels=header.channels,
        start=None if origin.start is None else origin.start.isoformat(),
        offset=format_offset(origin.offset),
        latitude=origin.latitude,
        longitude=origin.longitude,
        recorder=origin.recorder,
        warnings=tuple(dict.fromkeys((*warnings, *origin.warnings))),
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _digest(path: str) -> str:
    try:
        return sha256_of(Path(path))
    except OSError as error:
        raise AudioError(f"{path} can't be read: {error.strerror}") from None
