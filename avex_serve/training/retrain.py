"""Another head from the decisions about a run: trained, compared with the head that was reviewed, and run."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from avex_serve.archive.plan import Probe, ResultSet
from avex_serve.archive.run import Progress, classify
from avex_serve.archive.store import Entry, Store
from avex_serve.bundles.manifest import TRAINED_ON
from avex_serve.bundles.trained import read_trained_on
from avex_serve.calibration.fit import TARGET
from avex_serve.calibration.scales import Calibration, log_odds
from avex_serve.errors import InputError, NotFoundError
from avex_serve.evidence.first import open_checked
from avex_serve.review.book import REVIEWS
from avex_serve.review.pool import Pool
from avex_serve.review.retraining import BEFORE, COMPARISON, folder_of
from avex_serve.review.sources import embeddings_of, read_pool
from avex_serve.training.compare import Comparison, compare_reports
from avex_serve.training.dataset import LabelOptions, Recording
from avex_serve.training.embed import Windows
from avex_serve.training.files import can_make_page, write_report
from avex_serve.training.fit import FitRequest, fit_probe, run_exporter
from avex_serve.training.report import EVALUATION, Predictions, report
from avex_serve.training.scores import SCORES, Scores, read_scores
from avex_serve.writing import atomic_directory, new_file

BUNDLE: Final = "bundle"
EVERY: Final = 0.1  # of the recordings, after which the progress is said


@dataclass(frozen=True)
class RetrainRequest(LabelOptions):
    """The options of ``avex-serve retrain``; see its ``--help``."""

    store: Path  # of a run
    model: str
    variant: str = "linear_last"
    labels: tuple[Path, ...] = ()  # that train too
    reviews: Path | None = None
    probe: str | None = None  # that was reviewed
    seed: int = 0
    target_precision: float = TARGET
    cache: Path = Path("~/.cache/avex-serve")


class Retrained(NamedTuple):
    """What there is afterwards."""

    folder: Path  # a saved probe with its report; in it the bundle, and the report of the head before
    comparison: Comparison | None  # of the head before (a) and the new one (b); None: nothing could be evaluated


def retrain(request: RetrainRequest, say: Callable[[str], None] = print) -> Retrained:
    """Train a head on the reviews of a run, compare it with the reviewed one, and score the run with it.

    Windows and embeddings are those of the run. The head before is evaluated by its stored scores, on the windows of
    the run that evaluate the new one. If it fails before the head is whole, nothing of the head is left.

    Raises:
        NotFoundError: no scores, reviews, model or variant.
        InputError: reviews that can't be used, or another process writes to the store.
        UnsupportedError: the run has no embeddings that the variant reads.
        DependencyError: the exporter is missing.
    """
    pool, results = read_pool(Store(request.store), request.probe)
    before = next(each for each in results.probes if request.probe in (None, each.name))
    with Store.writing(request.store) as store:
        shape = _shape(store, results)
        target = next(folder for i in itertools.count(1) if not (folder := folder_of(store.folder, i)).exists())
        try:
            fit_probe(
                FitRequest(
                    (request.reviews or store.folder / REVIEWS, *request.labels),
                    target,
                    model=request.model,
                    probe=request.variant,
                    seed=request.seed,
                    overlap=results.cut.overlap,
                    target_precision=request.target_precision,
                    cache=request.cache,
                    store=request.store,
                    **{each.name: getattr(request, each.name) for each in fields(LabelOptions)},
                ),
                say,
            )
            say("export the head")
            export = ["--probe", str(target), "--offline", "--input-dim", ",".join(map(str, shape))]
            run_exporter([*export, "--format", "onnx", "--output", str(target / BUNDLE)])
            comparison = _compare(pool, results, before, target, request.seed, say)
        except BaseException:  # of a cancelled command, too
            shutil.rmtree(target, ignore_errors=True)
            raise
        with open_checked(target / BUNDLE, "cpu") as reader:
            classify(store, reader, _saying(say))
    return Retrained(target, comparison)


def _shape(store: Store, results: ResultSet) -> tuple[int, ...]:
    """The shape of the stored embeddings of a set's windows; errors as of `retrain`."""
    shapes = {each.shape for each in embeddings_of(store, results)}
    if not shapes:
        raise NotFoundError(f"{store.folder} has no embeddings; run the same command again with --embeddings")
    if len(shapes) > 1:
        raise InputError(
            f"{store.folder} has embeddings of several shapes; use fit --run, avex-export --offline --input-dim and "
            "classify in place of retrain"
        )
    return shapes.pop()


def _compare(
    pool: Pool, results: ResultSet, before: Probe, target: Path, seed: int, say: Callable[[str], None]
) -> Comparison | None:
    """Write the report of the head before into the folder, and the comparison with the new one."""
    say(f"evaluate {before.name} on the same windows")
    try:
        scores = read_scores(target / SCORES)
    except NotFoundError:
        say("nothing is compared: the decisions are about too few recordings to evaluate a head")
        return None
    windows, labels, predictions = _stored_predictions(pool, before, scores)
    if not labels or not len(windows.targets):
        say(f"nothing is compared: {before.name} has no scores of the evaluated windows and labels")
        return None
    evaluation = report(
        windows,
        labels,
        [predictions],
        model=results.bundle,
        probe=before.name,
        chosen={},
        evaluated="all",
        calibration=_of_labels(before, labels),
        noise={},
        problems=[],
        seed=seed,
        trained_on=read_trained_on(target.parent / before.name / TRAINED_ON),  # of a head that this command made
    )
    with atomic_directory(target / BEFORE, marker=EVALUATION) as folder:
        write_report(folder, evaluation, windows, [predictions], page=can_make_page(say))
    comparison = compare_reports(target / BEFORE, target, seed, shared=True)
    with new_file(target / COMPARISON) as file:
        file.write(msgspec.json.format(msgspec.json.encode(comparison).decode(), indent=1) + "\n")
    return comparison


def _stored_predictions(pool: Pool, before: Probe, scores: Scores) -> tuple[Windows, list[str], Predictions]:
    """The evaluated windows that the run has, the labels of both heads, and what the one before says of them."""
    sounds = {str(each.entry.recording): each for each in pool.sounds if each.entry is not None}
    recordings = [
        Recording(Path(sounds[digest].path), sounds[digest].path, digest=digest, group=group)
        for digest, group in dict(zip(scores.recordings.tolist(), scores.groups.tolist(), strict=True)).items()
        if digest in sounds
    ]
    place = {recording.digest: i for i, recording in enumerate(recordings)}
    found = {
        row: pool.find(recordings[place[digest]].name, start)
        for row, (digest, start) in enumerate(zip(scores.recordings, scores.spans[:, 0].tolist(), strict=True))
        if digest in place
    }
    rows = [row for row, window in found.items() if window is not None]
    here = np.array([found[row] for row in rows], int)
    labels = [label for label in scores.labels if label in pool.labels]
    windows = Windows(
        outputs=[],
        targets=scores.targets[np.ix_(rows, [scores.labels.index(label) for label in labels])],
        spans=scores.spans[rows],
        recording=np.array([place[digest] for digest in scores.recordings[rows]], int),
        recordings=tuple(recordings),
    )
    stored = [pool.scores_of(pool.label_index(label), here) for label in labels]
    logits = log_odds(np.array(stored).T.reshape(len(rows), len(labels)), before.activation)
    calibration = _of_labels(before, labels)
    return windows, labels, Predictions.of(np.arange(len(rows)), logits, calibration, before.activation)


def _of_labels(probe: Probe, labels: Sequence[str]) -> Calibration | None:
    """The calibration of some of a head's labels."""
    if probe.calibration is None:
        return None
    known = {each.label: each for each in probe.calibration.labels}
    return replace(probe.calibration, labels=tuple(known[label] for label in labels))


def _saying(say: Callable[[str], None]) -> Callable[[Progress, Entry | None], None]:
    """Say how many recordings are scored, now and then."""
    said = 0.0

    def report_progress(progress: Progress, _: Entry | None) -> None:
        nonlocal said
        share = progress.done / max(1, progress.total - progress.known)
        if share - said >= EVERY or share == 1:
            said = share
            say(f"scored {progress.known + progress.done} of {progress.total} recordings")

    return report_progress
