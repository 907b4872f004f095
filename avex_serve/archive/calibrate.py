"""A bundle's calibration from reviewed detections, as a new version of the bundle with the same graphs."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
from msgspec.structs import replace

from avex_serve.annotations.reading import Recordings
from avex_serve.annotations.reviews import Review, agreed, read_reviews
from avex_serve.archive.store import Store
from avex_serve.audio.reader import open_audio
from avex_serve.bundles.reading import Bundle, read_bundle, sha256_of
from avex_serve.bundles.remote import is_remote, local_bundle
from avex_serve.bundles.sealing import recalibrate
from avex_serve.bundles.trained import describe_seen, trained_on
from avex_serve.calibration.fit import RECORDINGS, TARGET, WITH_SOUND, WITHOUT_SOUND, calibrate
from avex_serve.calibration.scales import Calibration, LabelCalibration, log_odds
from avex_serve.database import connect, quoted
from avex_serve.errors import AudioError, InputError, NotFoundError, TensorError
from avex_serve.inference import pipeline
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.scores import activate
from avex_serve.writing import report_full_disk

SAME: Final = 1e-3  # seconds: windows that share this much less with a stretch share the same with it


class ScoredReview(NamedTuple):
    """A decision about a label over a stretch of a recording, and the score there."""

    recording: Path
    label: str
    present: bool
    score: float


@dataclass(frozen=True)
class CalibrationRequest:
    """The options of ``avex-serve calibrate``; see its ``--help``."""

    bundle: Path | str  # a folder or a URL
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
        NotFoundError: no such table, recording, store or probe, or no label that the probe has.
    """
    folder = local_bundle(request.bundle)
    bundle = read_bundle(folder)
    version = request.bundle_version or _next_version(bundle.manifest.version)
    if version == bundle.manifest.version:
        raise InputError(f"--bundle-version {version} is that of {request.bundle}; give another one")
    if request.output is None and is_remote(str(request.bundle)):
        raise InputError(f"{request.bundle} is a URL; say by --output where to write the new bundle")
    output = request.output or folder.resolve().parent / f"{folder.resolve().name}-{version}"
    if output.resolve() == folder.resolve():
        raise InputError(f"--output {output} is the bundle itself; give another folder")
    with open_bundle(folder, "cpu") as engine:
        head = engine.probe(request.probe)
        labels = engine.labels(head.name)
        reviews = _read(request.labels)
        sure = Counter(review.label for _, review in reviews if review.decision != "unsure")
        unknown = sorted(sure.keys() - set(labels))  # such as other labels that somebody typed on the review page
        named = (
            f"{', '.join(map(repr, unknown[:5]))}{' …' if len(unknown) > 5 else ''}, which the probe doesn't have"
        )
        if unknown and len(unknown) == len(sure):
            raise NotFoundError(f"there are reviews of {named}; one of its {len(labels)} labels is {min(labels)!r}")
        if unknown:
            say(f"left out: {sum(sure[label] for label in unknown)} reviews of {named}")
            reviews = [each for each in reviews if each[1].label not in unknown]
        source = _source(request, engine, head.name, (review for _, review in reviews))
        scored = _score(source, reviews, say)
        known = trained_on(bundle, head)
    names = sorted({each.label for each in scored}, key=labels.index)
    if not names:
        raise InputError(f"no review can be used; expected rows of file, start, end, label and decision {_needed()}")
    recordings = {each.recording for each in scored}
    seen = 0 if known is None else sum(source.digest(recording) in known for recording in recordings)
    if seen:
        say(
            f"WARNING: {describe_seen(seen, len(recordings))}, so fewer detections will be right there than the "
            "probabilities and thresholds say"
        )
    found = _fit(request, scored, names, head.activation, seen)
    for each in found.labels:
        if each.reason is not None:
            say(f"{each.label}: {each.reason}")
    if not any(each.scale is not None for each in found.labels):
        raise InputError(f"no label can be calibrated {_needed()}; the lines above say what is missing")
    merged = _merged(labels, head.calibration, found)
    with report_full_disk():
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


def _read(tables: Sequence[Path]) -> list[tuple[Path, Review]]:
    """The folder of each table with its reviews, each with the decision of all annotators of the table."""
    found = []
    for table in tables:
        reviews = read_reviews(table)
        decisions = agreed(reviews)
        folder = table if table.is_dir() else table.parent
        found += [(folder, review._replace(decision=decisions[review.subject])) for review in reviews]
    return found


def _score_text(review: Review) -> str:
    """The score in the table, which BirdNET-Analyzer's CSV calls confidence."""
    return review.fields.get("score") or review.fields.get("confidence", "")


def _digits(review: Review) -> int:
    """The decimal places of the score in the table."""
    text = _score_text(review)
    return len(text.partition(".")[2]) if set(text) <= set("0123456789.") else 9


def _rounded(review: Review, finest: int) -> float:
    """The score in the table. A rounded one is not 0 or 1: it is at most half a unit of its last digit away.

    Args:
        review: with the score.
        finest: most decimal places of any score; many programs write 1.0000 as 1 or 1.0.

    Raises:
        InputError: the row has no score, or none between 0 and 1.
    """
    text = _score_text(review)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise InputError(
            f"a review of {review.file} has the score {text!r}; expected a number from 0 to 1 in the column score "
            "or confidence"
        )
    digits = _digits(review)
    half = 0.5 * 10.0 ** -(digits if digits > 1 else finest)
    return min(max(score, half), 1 - half)


# -- scores of what was reviewed ----------------------------------------------------------------------------------


class _Source(Protocol):
    """Where scores come from."""

    def find(self, file: str, folder: Path) -> Path | None:
        """The recording that a table in a folder calls `file`; InputError if it may mean several."""
        ...

    def scores(self, recording: Path, reviews: Sequence[Review]) -> list[float | None]:
        """The score of each review of a recording; None: it is not about the recording."""
        ...

    def digest(self, recording: Path) -> str | None:
        """The SHA-256 of a recording; None: it isn't there."""
        ...


def _score(
    source: _Source, reviews: Sequence[tuple[Path, Review]], say: Callable[[str], None]
) -> list[ScoredReview]:
    """The reviews that are sure, with their scores; those of stretches without a window are left out."""
    by_recording: dict[Path, dict[tuple[float, float, str], Review]] = defaultdict(dict)
    missing: Counter[str] = Counter()
    for folder, review in reviews:
        recording = source.find(review.file, folder)
        if recording is None:
            missing[review.file] += 1
        else:  # of several tables, the last one counts
            by_recording[recording][review.start, review.end, review.label] = review
    for name, count in missing.items():
        say(f"left out: {name} is not there ({count} reviews)")
    scored = []
    for recording, group in by_recording.items():
        sure = [review for review in group.values() if review.decision != "unsure"]
        try:
            scores = source.scores(recording, sure) if sure else []
        except (AudioError, NotFoundError, TensorError) as error:
            say(f"left out: {error} ({len(sure)} reviews)")
            continue
        scored += [
            ScoredReview(recording, review.label, review.decision == "present", score)
            for review, score in zip(sure, scores, strict=True)
            if score is not None
        ]
        if beyond := scores.count(None):
            say(f"left out: {beyond} reviews of {recording.name} are after its end")
    return scored


def _source(request: CalibrationRequest, engine: Engine, probe: str, reviews: Iterable[Review]) -> _Source:
    if request.table_scores:
        if request.store is not None or request.recordings is not None:
            raise InputError("--table-scores takes the scores of the tables; leave out --run and --recordings")
        return _Tables(reviews)
    if request.store is not None:
        return _Stored(request.store, engine, probe)
    return _Recordings(request, engine, probe)


class _Tables:
    """Scores in the tables themselves."""

    def __init__(self, reviews: Iterable[Review]) -> None:
        self._finest = max(map(_digits, reviews), default=0)

    def find(self, file: str, folder: Path) -> Path | None:
        return folder.resolve() / file

    def scores(self, recording: Path, reviews: Sequence[Review]) -> list[float | None]:
        return [_rounded(review, self._finest) for review in reviews]

    def digest(self, recording: Path) -> str | None:
        return sha256_of(recording) if recording.is_file() else None


class _Recordings:
    """Scores of recordings, which are run."""

    def __init__(self, request: CalibrationRequest, engine: Engine, probe: str) -> None:
        self._root, self._engine, self._probe = request.recordings, engine, probe
        self._query = Query(overlap=request.overlap)
        if self._root is not None and not self._root.is_dir():
            raise NotFoundError(f"--recordings {self._root}: no such folder")
        paths = [] if self._root is None else sorted(self._root.rglob("*"))
        self._names = Recordings(path for path in paths if path.is_file())
        _ = engine.audio_spec

    def find(self, file: str, folder: Path) -> Path | None:
        """Next to the table, in the folder of recordings, or there by its name alone."""
        for root in (folder, *([] if self._root is None else [self._root])):
            if (path := root / file).is_file():
                return path.resolve()
        found = self._names.find(file, folder)
        return None if found is None else found.resolve()

    def scores(self, recording: Path, reviews: Sequence[Review]) -> list[float | None]:
        head = self._engine.probe(self._probe)
        audio = partial(open_audio, recording)
        spans, outputs = pipeline.run_recording(self._engine, audio, self._query, [head.logits])
        scores, place = activate(outputs[head.logits], head.activation), self._engine.labels(head.name).index
        return [_score_of(review, spans, scores[:, place(review.label)]) for review in reviews]

    def digest(self, recording: Path) -> str | None:
        return sha256_of(recording)


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
            Path(path): entry.recording for path, entry in self._store.journal().items() if entry.recording in done
        }
        self._names = Recordings(self._digests)

    def find(self, file: str, folder: Path) -> Path | None:
        """The path in the run, also from the table's folder, or the name alone."""
        path = folder.resolve() / file
        return path if path in self._digests else self._names.find(file, folder.resolve())

    def scores(self, recording: Path, reviews: Sequence[Review]) -> list[float | None]:
        [file] = self._store.paths(self._results, [str(self._digests[recording])])
        with connect() as database:
            columns = {
                label: database.execute(
                    f'SELECT start, "end", score FROM read_parquet({quoted(file)}) WHERE probe = ? AND label = ? '
                    "ORDER BY start",
                    [self._probe, label],
                ).fetchnumpy()
                for label in {review.label for review in reviews}
            }
        spans = {label: np.stack([found["start"], found["end"]], axis=1) for label, found in columns.items()}
        return [_score_of(review, spans[review.label], columns[review.label]["score"]) for review in reviews]

    def digest(self, recording: Path) -> str | None:
        return self._digests[recording]


def _score_of(review: Review, spans: np.ndarray, scores: np.ndarray) -> float | None:
    """The highest score (N,) of the windows (N, 2) that share most with the stretch; None: none shares anything."""
    shared = np.minimum(spans[:, 1], review.end) - np.maximum(spans[:, 0], review.start)
    if review.start == review.end:  # a point in time
        shared = np.where((spans[:, 0] <= review.start) & (review.start < spans[:, 1]), 1.0, 0.0)
    if shared.max(initial=0.0) <= 0:
        return None
    return float(scores[shared >= shared.max() - SAME].max())


# -- the fit ------------------------------------------------------------------------------------------------------


def _fit(
    request: CalibrationRequest, scored: Sequence[ScoredReview], names: Sequence[str], activation: str, seen: int
) -> Calibration:
    rows, columns = np.arange(len(scored)), np.array([names.index(each.label) for each in scored])
    logits, targets = np.zeros((rows.size, len(names))), np.full((rows.size, len(names)), -1, np.int8)
    scores = np.array([each.score for each in scored])
    logits[rows, columns] = log_odds(scores, "none" if activation == "none" else "sigmoid")
    targets[rows, columns] = [each.present for each in scored]
    groups = np.unique([str(each.recording) for each in scored], return_inverse=True)[1]
    source = f"{rows.size} reviewed detections of {np.unique(groups).size} recordings"
    source += f", {seen} of which trained the head" if seen else ""
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
