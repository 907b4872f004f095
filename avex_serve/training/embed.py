"""Windows of recordings through the serving engine, stored by content. Needs no torch.

A recording's outputs are a file that is named after the digest of the recording, in a folder that is named after
everything else that determines them. It appears by renaming: a run that was interrupted continues where it was, and
the next run on the same recordings computes nothing.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from avex_serve.archive.plan import plan_passes
from avex_serve.archive.store import Store
from avex_serve.audio.reader import open_audio, open_wave
from avex_serve.errors import InputError, UnsupportedError
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Audio, Query, run_recording
from avex_serve.training.dataset import MIN_OVERLAP, Dataset, Recording

_FORMAT: Final = 1  # of the stored files

# The spans (N, 2) of a recording's windows and their outputs (N, ...), where they are known already.
Known = Callable[[Recording], tuple[np.ndarray, list[np.ndarray]] | None]


@dataclass(frozen=True)
class Windows:
    """The labelled windows of a data set with their outputs."""

    outputs: list[np.ndarray]  # (N, ...) float32 each, on disk
    targets: np.ndarray  # (N, C) int8: 1, 0, or -1 where unknown
    spans: np.ndarray  # (N, 2) float64, seconds
    recording: np.ndarray  # (N,) int, index into `recordings`
    recordings: tuple[Recording, ...]

    @property
    def groups(self) -> np.ndarray:
        """(N,) int, the same for windows that stay together."""
        names = [recording.group for recording in self.recordings]
        return np.asarray(np.unique(names, return_inverse=True)[1][self.recording])

    @property
    def splits(self) -> np.ndarray:
        """(N,) str, the split that the data says, or "" where it doesn't."""
        return np.asarray(np.array([recording.split or "" for recording in self.recordings])[self.recording])


def run_windows(
    engine: Engine,
    outputs: Sequence[str],
    dataset: Dataset,
    store: Path,
    scratch: Path,
    *,
    overlap: float = 0.0,
    min_overlap: float = MIN_OVERLAP,
    known: Known | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Windows, list[str]]:
    """Run the labelled windows of a data set.

    Args:
        engine: of a bundle that takes audio.
        outputs: names of its outputs.
        dataset: the recordings.
        store: folder where the outputs of recordings are kept.
        scratch: folder for the arrays of the result.
        overlap: of neighbouring windows, in seconds.
        min_overlap: see `Dataset.targets`.
        known: outputs that need not be computed, see `known_outputs`.
        say: is called with the progress.

    Returns:
        The windows with at least one known label, and a sentence for each recording that can't be used.

    Raises:
        InputError: no labelled window is left, or an overlap that the bundle can't have.
    """
    folder = store / _key(engine, outputs, overlap)
    folder.mkdir(parents=True, exist_ok=True)
    problems = _run_missing(engine, outputs, dataset.recordings, folder, overlap, known, say)
    found: list[tuple[Recording, np.ndarray, np.ndarray, np.ndarray]] = []
    for recording in dataset.recordings:
        if recording.name in problems:
            continue
        with np.load(_file(folder, recording)) as stored:
            spans = stored["spans"]
        whole = replace(recording, seconds=float(spans[-1, 1]))  # as decoded, whatever the header says
        targets = dataset.targets(whole, spans, min_overlap)
        kept = np.asarray((targets >= 0).any(axis=1))
        if kept.any():
            found.append((whole, kept, targets[kept], spans[kept]))
    if not found:
        raise InputError("no window of these recordings has a known label; see the problems of --check")
    arrays: list[np.ndarray] = []
    total, start = sum(len(targets) for _, _, targets, _ in found), 0
    for recording, kept, targets, _ in found:
        with np.load(_file(folder, recording)) as stored:
            rows = [stored[str(i)][kept] for i in range(len(outputs))]
        arrays = arrays or [_array(scratch / f"{i}.npy", (total, *row.shape[1:])) for i, row in enumerate(rows)]
        for array, row in zip(arrays, rows, strict=True):
            array[start : start + len(targets)] = row
        start += len(targets)
    windows = Windows(
        outputs=arrays,
        targets=np.concatenate([targets for _, _, targets, _ in found]),
        spans=np.concatenate([spans for *_, spans in found]),
        recording=np.repeat(np.arange(len(found)), [len(targets) for _, _, targets, _ in found]),
        recordings=tuple(recording for recording, *_ in found),
    )
    return windows, list(problems.values())


def known_outputs(store: Store, engine: Engine, outputs: Sequence[str], overlap: float) -> Known:
    """The embeddings that a run has stored, if they are those that an engine makes.

    Args:
        store: open for reading.
        engine: of an embeddings bundle.
        outputs: names of its outputs.
        overlap: of neighbouring windows, in seconds.

    Raises:
        UnsupportedError: the store has no embeddings of this backbone and layer, whatever the windows.
    """
    (planned,) = plan_passes([engine], Query(overlap=overlap), keep_embeddings=True)
    sets = [planned.embeddings[output] for output in outputs]
    stored = {each.identity["embedding"] for each in store.sets().values() if each.kind == "embeddings"}
    if lacking := [each.identity["embedding"] for each in sets if each.identity["embedding"] not in stored]:
        raise UnsupportedError(
            f"{store.folder} has no embeddings {lacking[0]}, which this probe reads of {engine.manifest.model}; it "
            f"has {', '.join(sorted(stored)) or 'none'}. Name the model and the variant that the run's bundle was "
            "made from, or run it again with --embeddings"
        )
    done = set.intersection(*(store.done(each) for each in sets))

    def read(recording: Recording) -> tuple[np.ndarray, list[np.ndarray]] | None:
        if recording.digest not in done:
            return None
        found = [store.read_embeddings(each, recording.digest) for each in sets]
        return found[0][0], [rows for _, rows in found]

    return read


def stored_outputs(
    engine: Engine, outputs: Sequence[str], name: str, wave: np.ndarray, store: Path
) -> list[np.ndarray]:
    """The outputs (N, ...) of a wave (S,) at the engine's rate, stored under a name that determines the wave."""
    path = store / _key(engine, outputs, 0.0) / f"{name}.npz"
    if not _is_stored(path):
        store_outputs(engine, outputs, partial(open_wave, wave, engine.audio_spec.sample_rate), 0.0, path)
    with np.load(path) as stored:
        return [stored[str(i)] for i in range(len(outputs))]


def store_outputs(engine: Engine, outputs: Sequence[str], audio: Audio, overlap: float, path: Path) -> None:
    """Run a recording, and write the spans of its windows and their outputs to a file, whole or not at all."""
    spans, rows = run_recording(engine, audio, Query(overlap=overlap), outputs)
    _save(spans, [rows[name] for name in outputs], path)


def _save(spans: np.ndarray, outputs: Sequence[np.ndarray], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        arrays = {str(i): rows for i, rows in enumerate(outputs)}
        part = Path(unfinished) / path.name
        np.savez(part, spans=spans, **arrays)  # type: ignore[arg-type]
        part.replace(path)


def _array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _key(engine: Engine, outputs: Sequence[str], overlap: float) -> str:
    """Digest of what determines the outputs of a recording, besides the recording."""
    fingerprints = {info.output: info.fingerprint for info in engine.manifest.embeddings}
    made_by = [fingerprints.get(output) or [engine.bundle.scores_digest, output] for output in outputs]
    audio = engine.audio_spec
    parts = [_FORMAT, made_by, audio.sample_rate, audio.window_samples, audio.resampler, overlap]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _file(folder: Path, recording: Recording) -> Path:
    return folder / recording.digest[:2] / f"{recording.digest}.npz"


def _is_stored(path: Path) -> bool:
    """Whether the outputs are there; after a power cut, a file may have lost its content."""
    return path.is_file() and path.stat().st_size > 0


def _run_missing(
    engine: Engine,
    outputs: Sequence[str],
    recordings: Sequence[Recording],
    folder: Path,
    overlap: float,
    known: Known | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run the recordings that are not stored yet; a sentence for each that can't be used, by its name."""
    missing = {r.digest: r for r in recordings if not _is_stored(_file(folder, r))}
    for recording in list(missing.values()):
        found = None if known is None else known(recording)
        if found is not None:
            spans, rows = found
            _save(spans, rows, _file(folder, recording))
            del missing[recording.digest]

    def run(recording: Recording) -> None:
        store_outputs(engine, outputs, partial(open_audio, recording.path), overlap, _file(folder, recording))

    failed: dict[str, str] = {}  # by digest
    # The engine spreads the windows of one recording over its threads; short recordings have one window each.
    with ThreadPoolExecutor(engine.threads) as pool:
        running = {pool.submit(run, recording): recording for recording in missing.values()}
        try:
            for done, future in enumerate(as_completed(running), 1):
                recording = running[future]
                try:
                    future.result()
                except InputError as error:
                    failed[recording.digest] = f"left out: {error}"
                if done == len(running) or done % max(1, len(running) // 10) == 0:
                    say(
                        f"embedded {done} of {len(running)} recordings; {len(recordings) - len(running)} were stored"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {r.name: failed[r.digest] for r in recordings if r.digest in failed}
