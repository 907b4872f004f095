"""A bundle's calibration from reviewed detections, as a new version of the bundle with the same graphs."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from avex_serve.annotations.reviews import agreed, read_reviews
from avex_serve.archive.store import Store, connect, quoted
from avex_serve.audio.reader import open_audio
from avex_serve.bundles.reading import Bundle, read_bundle
from avex_serve.bundles.sealing import recalibrate
from avex_serve.calibration.fit import RECORDINGS, TARGET, WITH_SOUND, WITHOUT_SOUND, calibrate
from avex_serve.calibration.scales import Calibration, LabelCalibration, log_odds
from avex_serve.errors import AvexServeError, InputError, NotFoundError
from avex_serve.inference import pipeline
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.scores import activate

SAME: Final = 1e-3  # seconds: windows that share this much less with a stretch share the same with it


class Review(NamedTuple):
    """A decision about a label over a stretch of a recording."""

    root: Path  # the folder of its table
    file: str  # as the table says
    start: float  # seconds
    end: float
    label: str
    present: bool
    score: str  # as the table has it; empty: it has none


@dataclass(frozen=True)
class CalibrationRequest:
    """The options of ``avex-serve calibrate``; see its ``--help``."""

    bundle: Path
    labels: tuple[Path, ...]  # tables
    output: Path | None = None
    bundle_version: str | None = None
    probe: str | None = None
    recordings: Path | None = None  # folder
    store: Path | None = None  # of a run
    table_scores: bool = False
    overlap: float = 0.0  # seconds
    target_precision: float = TARGET
    seed: int = 0


def calibrate_bundle(request: CalibrationRequest, say: Callable[[str], None] = print) -> Bundle:
    """Fit probabilities and thresholds to reviewed detections, and write a new version of the bundle.

    Labels that have too few reviews keep the calibration that they have.

    Args:
        request: what to do.
        say: is called with what is left out.

    Raises:
        BundleError: not a bundle.
        InputError: tables or options that can't be used, or too few reviews of every label.
        NotFoundError: no such table, recording, store or probe, or labels that the probe doesn't have.
    """
    bundle = read_bundle(request.bundle)
    version = request.bundle_version or _next_version(bundle.manifest.version)
    if version == bundle.manifest.version:
        raise InputError(f"--bundle-version {version} is that of {request.bundle}; give another one")
    output = request.output or request.bundle.resolve().parent / f"{request.bundle.resolve().name}-{version}"
    if output.resolve() == request.bundle.resolve():
        raise InputError(f"--output {output} is the bundle itself; give another folder")
    with open_bundle(request.bundle, "cpu") as engine:
        head = engine.probe(request.probe)
        labels = engine.labels(head.name)
        reviews = _read(request.labels)
        if unknown := sorted({review.label for review in reviews} - set(labels)):
            raise NotFoundError(
                f"there are reviews of {', '.join(map(repr, unknown[:5]))}, which the probe doesn't have; one of "
                f"its {len(labels)} labels is {min(labels)!r}"
            )
        scored = _score(request, engine, head.name, reviews, say)
    names = sorted({review.label for review, _ in scored}, key=labels.index)
    if not names:
        raise InputError(f"no review can be used; expected rows of file, start, end, label and decision {_needed()}")
    found = _fit(request, scored, names, head.activation)
    for each in found.labels:
        if each.reason is not None:
            say(f"{each.label}: {each.reason}")
    if not any(each.scale is not None for each in found.labels):
        raise InputError(f"no label can be calibrated {_needed()}; the lines above say what is missing")
    merged = _merged(labels, head.calibration, found)
    try:
        return recalibrate(bundle, output, version, {head.name: merged})
    except FileExistsError as error:
        raise InputError(f"--output {error}") from None


def _needed() -> str:
    return (
        f"(a label needs {WITH_SOUND} windows with its sound in {RECORDINGS} recordings, and {WITHOUT_SOUND} "
        "without it)"
    )


def _next_version(version: str) -> str:
    return str(int(version) + 1) if version.isdecimal() else f"{version}-calibrated"


def _read(tables: Sequence[Path]) -> list[Review]:
    """The decisions on which all annotators agree, without those in doubt."""
    found: dict[tuple[str, float, float, str], Review] = {}
    for table in tables:
        reviews = read_reviews(table)
        decisions = agreed(reviews)
        root = table if table.is_dir() else table.parent
        for review in reviews:
            decision = decisions[review.subject]
            found.pop(review.subject, None)  # of several tables, the last one counts
            if decision != "unsure":
                score = review.fields.get("score", "")
                found[review.subject] = Review(root, *review.subject, decision == "present", score)
    return list(found.values())


def _rounded(review: Review) -> float:
    """The score in the table. A rounded one is not 0 or 1: it is at most half a unit of its last digit away.

    Raises:
        InputError: the row has no score, or none between 0 and 1.
    """
    try:
        score = float(review.score)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise InputError(
            f"a review of {review.file} has the score {review.score!r}; expected a number from 0 to 1 in the column "
            "score"
        )
    digits = len(review.score.partition(".")[2]) if set(review.score) <= set("0123456789.") else 9
    half = 0.5 * 10.0**-digits
    return min(max(score, half), 1 - half)


# -- scores of what was reviewed ----------------------------------------------------------------------------------

Windows = tuple[np.ndarray, Mapping[str, np.ndarray]]  # spans (N, 2) and the scores (N,) of each label


def _score(
    request: CalibrationRequest,
    engine: Engine,
    probe: str,
    reviews: Sequence[Review],
    say: Callable[[str], None],
) -> list[tuple[Review, float]]:
    """The reviews with the score of each; those of stretches without a window are left out."""
    if request.table_scores:
        if request.store is not None or request.recordings is not None:
            raise InputError("--table-scores takes the scores of the tables; leave out --run and --recordings")
        return [(review, _rounded(review)) for review in reviews]
    by_recording: dict[Path, list[Review]] = defaultdict(list)
    source: _Recordings | _Stored
    source = _Recordings(request, engine, probe) if request.store is None else _Stored(request.store, engine, probe)
    missing: dict[str, int] = defaultdict(int)
    for review in reviews:
        place = source.find(review)
        if place is None:
            missing[review.file] += 1
        else:
            by_recording[place].append(review)
    for name, count in missing.items():
        say(f"left out: {name} is not there ({count} reviews)")
    scored = []
    for path, group in by_recording.items():
        try:
            windows = source.windows(path, {review.label for review in group})
        except AvexServeError as error:
            say(f"left out: {error} ({len(group)} reviews)")
            continue
        scores = [(review, _score_of(review, windows)) for review in group]
        scored += [(review._replace(file=str(path)), score) for review, score in scores if score is not None]
        if beyond := sum(score is None for _, score in scores):
            say(f"left out: {beyond} reviews of {path.name} are after its end")
    return scored


def _score_of(review: Review, windows: Windows) -> float | None:
    """The highest score among the windows that share most with the stretch; None: none shares anything."""
    spans, scores = windows
    shared = np.minimum(spans[:, 1], review.end) - np.maximum(spans[:, 0], review.start)
    if review.start == review.end:  # a point in time
        shared = np.where((spans[:, 0] <= review.start) & (review.start < spans[:, 1]), 1.0, 0.0)
    if shared.max(initial=0.0) <= 0:
        return None
    return float(scores[review.label][shared >= shared.max() - SAME].max())


class _Recordings:
    """Scores of recordings, which are run."""

    def __init__(self, request: CalibrationRequest, engine: Engine, probe: str) -> None:
        self._root, self._engine, self._probe = request.recordings, engine, probe
        self._query = Query(overlap=request.overlap)
        if self._root is not None and not self._root.is_dir():
            raise NotFoundError(f"--recordings {self._root}: no such folder")
        self._names: dict[str, list[Path]] = defaultdict(list)
        for path in [] if self._root is None else sorted(self._root.rglob("*")):
            if path.is_file():
                self._names[path.name].append(path)
                self._names[path.stem].append(path)
        _ = engine.audio_spec

    def find(self, review: Review) -> Path | None:
        """The recording of a review: next to its table, in the folder of recordings, or there by its name alone."""
        for root in (review.root, *([] if self._root is None else [self._root])):
            if (path := root / review.file).is_file():
                return path.resolve()
        found = self._names[PureWindowsPath(review.file).name]
        if len(found) > 1:
            raise InputError(
                f"there are reviews of {review.file}, of which there are {len(found)}; give their paths"
            )
        return found[0].resolve() if found else None

    def windows(self, path: Path, labels: Collection[str]) -> Windows:
        """Run a recording."""
        head = self._engine.probe(self._probe)
        found = pipeline.run_recording(self._engine, partial(open_audio, path), self._query, [head.logits])
        scores = activate(found.outputs[head.logits], head.activation)
        place = self._engine.labels(self._probe).index
        return found.spans, {label: scores[:, place(label)] for label in labels}


class _Stored:
    """Scores of the store of a run."""

    def __init__(self, folder: Path, engine: Engine, probe: str) -> None:
        self._store, self._probe = Store(folder), probe
        digest = engine.bundle.scores_digest
        fitting = [
            results
            for results in self._store.sets().values()
            if results.kind == "scores" and results.identity["bundle"] == digest
        ]
        if not fitting:
            raise NotFoundError(
                f"{folder} has no scores of bundle {engine.manifest.name}; run it, or leave out --run to compute "
                "them"
            )
        current = {results.name for results in self._store.current()}
        self._results = max(fitting, key=lambda results: results.name in current)
        done = self._store.done(self._results)
        self._digests = {
            path: entry.recording for path, entry in self._store.journal().items() if entry.recording in done
        }
        self._names: dict[str, list[Path]] = defaultdict(list)
        for name in map(Path, self._digests):
            self._names[name.name].append(name)
            self._names[name.stem].append(name)

    def find(self, review: Review) -> Path | None:
        """The recording of a review: its path, also from the table's folder, or its name alone."""
        for path in (review.root.resolve() / review.file,):
            if str(path) in self._digests:
                return path
        found = self._names[PureWindowsPath(review.file).name]
        if len(found) > 1:
            raise InputError(
                f"there are reviews of {review.file}, of which the run has {len(found)}; give their paths"
            )
        return found[0] if found else None

    def windows(self, path: Path, labels: Collection[str]) -> Windows:
        """Read the scores of a recording."""
        digest = self._digests[str(path)]
        assert digest is not None
        file = quoted(self._store.path(self._results, digest))
        with connect() as database:
            columns = {
                label: database.execute(
                    f'SELECT start, "end", score FROM read_parquet({file}) WHERE probe = ? AND label = ? '
                    "ORDER BY start",
                    [self._probe, label],
                ).fetchnumpy()
                for label in labels
            }
        first = next(iter(columns.values()))
        spans = np.stack([first["start"], first["end"]], axis=1)
        return spans, {label: found["score"] for label, found in columns.items()}


# -- the fit ------------------------------------------------------------------------------------------------------


def _fit(
    request: CalibrationRequest, scored: Sequence[tuple[Review, float]], names: Sequence[str], activation: str
) -> Calibration:
    place = {name: i for i, name in enumerate(names)}
    rows, columns = np.arange(len(scored)), np.array([place[review.label] for review, _ in scored])
    logits, targets = np.zeros((rows.size, len(names))), np.full((rows.size, len(names)), -1, np.int8)
    scores = np.array([score for _, score in scored])
    logits[rows, columns] = log_odds(scores, "none" if activation == "none" else "sigmoid")
    targets[rows, columns] = [review.present for review, _ in scored]
    groups = np.unique([review.file for review, _ in scored], return_inverse=True)[1]
    source = f"{rows.size} reviewed detections of {np.unique(groups).size} recordings"
    target = request.target_precision
    return calibrate(logits, targets, groups, names, source=source, target_precision=target, seed=request.seed)


def _merged(labels: Sequence[str], before: Calibration | None, found: Calibration) -> Calibration:
    """The new calibrations in the order of the head's labels; a label without one keeps what it had."""
    new = {each.label: each for each in found.labels}
    old: dict[str, LabelCalibration] = {}
    for each in () if before is None else before.labels:
        assert before is not None
        target = before.target_precision if each.target_precision is None else each.target_precision
        old[each.label] = replace(each, source=each.source or before.source, target_precision=target)
    nothing = {
        label: LabelCalibration(
            label=label, with_sound=0, without_sound=0, recordings=0, reason="no detection was reviewed"
        )
        for label in labels
    }
    merged = []
    for label in labels:
        fitted = new.get(label)
        kept = old.get(label)
        if fitted is None or (fitted.scale is None and kept is not None and kept.scale is not None):
            merged.append(kept or nothing[label])
        else:
            merged.append(fitted)
    return replace(found, labels=tuple(merged))
