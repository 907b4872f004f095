"""What a head is worth: figures of each label with intervals, as ``evaluation.json`` and ``evaluation.csv``.

Needs no torch. The schema of ``evaluation.json`` is that of `Evaluation`.
"""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from avex_serve.bundles.trained import describe_seen
from avex_serve.calibration.scales import Activation, Calibration, Calibrator, sigmoid
from avex_serve.errors import InputError
from avex_serve.inference.scores import activate
from avex_serve.training import metrics
from avex_serve.training.dataset import NEGATIVES, Recording
from avex_serve.training.embed import Windows
from avex_serve.training.noise import MOST_PER_HOUR, per_hour

EVALUATION: Final = "evaluation.json"
TABLE: Final = "evaluation.csv"
FEW: Final = 5  # recordings with a sound, below which its figures say little
WORST: Final = 30  # mistakes to list
BACKGROUND: Final = "the background of the data"  # windows that hold none of the sounds
_NO_SOUND: Final = frozenset({*NEGATIVES, "silence"})  # labels that a head may have for it
NOTHING: Final = "(none)"  # in the confusion: no sound, and no detection
HOW: Final = {  # by `Evaluation.evaluated`
    "hold-out": "groups that were held out",
    "cross-validation": "cross-validation over groups",
    "split column": "the split of the data",
    "all": "all labelled windows",
}
_LARGE: Final = 20_000  # windows, above which there are fewer resamples
_POINTS: Final = 100  # of a curve


class Measure(Struct, frozen=True, kw_only=True):
    """A figure with its interval of 95 % over recordings; null where it has no value."""

    value: float | None
    low: float | None
    high: float | None
    windows: int  # with the sound
    recordings: int  # with the sound

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f}–{self.high:.3f})"
        return f"{self.value:.3f}{interval}"


class Figures(Struct, frozen=True, kw_only=True):
    """The figures of one label, or their means over labels."""

    average_precision: Measure
    auroc: Measure
    precision: Measure  # these three of detections from a score of 0.5 on
    recall: Measure
    f1: Measure
    precision_at_threshold: Measure  # these three of detections from the threshold on
    recall_at_threshold: Measure
    f1_at_threshold: Measure
    calibration_error: Measure  # of probabilities


class LabelFigures(Figures, frozen=True, kw_only=True):
    """The figures of one label, with what they are made of."""

    windows_without: int
    threshold_score: float | None  # of the saved head
    precision_recall: tuple[tuple[float, float, float], ...]  # score, precision and recall, along the curve
    reliability: tuple[dict[str, float], ...]
    warning: str | None


class Mistake(Struct, frozen=True, kw_only=True):
    """A window that the head judges most wrongly."""

    file: str
    start: float
    end: float
    label: str
    kind: Literal["missed", "false"]
    score: float


class Noise(Struct, frozen=True, kw_only=True):
    """Detections an hour in sounds that hold no animal, from the thresholds on; labels without any are left out."""

    seconds: float
    per_hour: dict[str, float]


class Evaluation(Struct, frozen=True, kw_only=True):
    """The content of ``evaluation.json``."""

    schema_version: Literal[1] = 1
    model: str
    probe: str
    chosen: dict[str, float]  # settings of the saved head, such as C
    evaluated: str  # "split column", "hold-out", "cross-validation", "all" or "none"
    windows: int  # evaluated
    recordings: int
    groups: int
    target_precision: float | None
    macro: Figures | None  # null if nothing could be evaluated
    labels: dict[str, LabelFigures]
    confusion: dict[str, dict[str, int]]  # by true label: the label with the highest score, where it is detected
    worst: tuple[Mistake, ...]
    noise: dict[str, Noise]
    problems: tuple[str, ...]  # of the data, and what the figures don't show
    trained_on: int | None = None  # recordings of these that trained the evaluated head; null: not known

    def write(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``evaluation.csv`` into a folder."""
        (folder / EVALUATION).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        (folder / TABLE).write_text(table(self), "utf-8")


def read_evaluation(folder: Path) -> Evaluation | None:
    """The ``evaluation.json`` of a folder, or None if it has none; InputError for another file of that name."""
    path = folder / EVALUATION
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise InputError(f"{path} can't be read: {error}; fit or evaluate again, or remove the file") from None


class Predictions(NamedTuple):
    """What a head, or several on parts of the data, says about windows that it was not trained on."""

    rows: np.ndarray  # (n,) int, the windows
    logits: np.ndarray  # (n, C)
    detected: np.ndarray  # (n, C) float: 1 from the threshold on, 0 below; NaN where the label has no threshold
    probabilities: np.ndarray  # (n, C); NaN where the label is not calibrated

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        logits: np.ndarray,
        calibration: Calibration | None,
        activation: Activation = "sigmoid",
    ) -> "Predictions":
        """Detections and probabilities as they are served, from logits whose sigmoid is the score."""
        if calibration is None:
            nothing = np.full(logits.shape, np.nan)
            return cls(rows, logits, nothing, nothing)
        scores = logits if activation == "none" else activate(logits, "sigmoid")
        calibrator = Calibrator.of(calibration, activation)
        detected = np.where(np.isnan(calibrator.lowest), np.nan, scores.astype(np.float64) >= calibrator.lowest)
        return cls(rows, logits, detected, calibrator.probabilities(scores).astype(np.float64))


def report(
    windows: Windows,
    labels: Sequence[str],
    predictions: Sequence[Predictions],
    *,
    model: str,
    probe: str,
    chosen: dict[str, float],
    evaluated: str,
    calibration: Calibration | None,
    noise: Mapping[str, np.ndarray],
    problems: Sequence[str],
    seed: int,
    trained_on: Collection[str] | None = None,
) -> Evaluation:
    """The report of a head.

    Args:
        windows: with their targets.
        labels: C names.
        predictions: of parts of the windows; none: nothing could be evaluated.
        model: see `Evaluation`.
        probe: see `Evaluation`.
        chosen: see `Evaluation`.
        evaluated: see `Evaluation`.
        calibration: of the saved head; None: it has none, and a detection is a score of 0.5.
        noise: logits (N, C) of the saved head for windows of each noise.
        problems: of the data.
        seed: of the resampling.
        trained_on: SHA-256 of each recording that trained the head; None: not known.
    """
    macro = None
    figures: dict[str, LabelFigures] = {}
    notes = (
        [] if calibration is None else [f"{each.label}: {each.reason}" for each in calibration.labels if each.reason]
    )
    rows = np.empty(0, int)
    if predictions:
        macro, figures = evaluate(windows, labels, predictions, seed)
        rows = join(predictions).rows
    if calibration is not None:
        scores = [_finite(sigmoid(threshold)) for threshold in calibration.thresholds(np.nan)]
        figures = {
            name: replace(figures[name], threshold_score=score)
            for name, score in zip(labels, scores, strict=True)
            if name in figures
        }
    recordings = np.unique(windows.recording[rows])
    return Evaluation(
        model=model,
        probe=probe,
        chosen=chosen,
        evaluated=evaluated,
        windows=rows.size,
        recordings=recordings.size,
        groups=np.unique(windows.groups[rows]).size,
        target_precision=None if calibration is None else calibration.target_precision,
        macro=macro,
        labels=figures,
        confusion=confusion(windows, labels, predictions) if predictions else {},
        worst=worst(windows, labels, predictions) if predictions else (),
        noise=_noise(windows, labels, predictions, calibration, noise),
        problems=(*problems, *(f"{name}: {each.warning}" for name, each in figures.items() if each.warning), *notes),
        trained_on=(
            None if trained_on is None else sum(windows.recordings[i].digest in trained_on for i in recordings)
        ),
    )


def evaluate(
    windows: Windows, labels: Sequence[str], predictions: Sequence[Predictions], seed: int
) -> tuple[Figures, dict[str, LabelFigures]]:
    """The figures of each label, and their means over the labels that have a value.

    Args:
        windows: with their targets.
        labels: C names.
        predictions: of parts of the windows that don't overlap.
        seed: of the resampling.
    """
    joined = join(predictions)
    groups, targets = windows.groups[joined.rows], windows.targets[joined.rows]
    values = _point(joined, targets)
    drawn = resampled(joined, targets, groups, seed, resamples_of(len(targets)))  # (metrics, C, B)
    counts = [
        ((targets[:, i] == 1).sum(), np.unique(groups[targets[:, i] == 1]).size, (targets[:, i] == 0).sum())
        for i in range(len(labels))
    ]
    found = {}
    for i, label in enumerate(labels):
        with_sound, recordings, without = map(int, counts[i])
        measures = [_measure(values[m, i], drawn[m, i], with_sound, recordings) for m in range(len(FIGURES))]
        known = targets[:, i] >= 0
        has, logits = targets[known, i], joined.logits[known, i]
        calibrated = np.isfinite(joined.probabilities[known, i])
        found[label] = LabelFigures(
            **dict(zip(FIGURES, measures, strict=True)),
            windows_without=without,
            threshold_score=None,
            precision_recall=_curve(has, logits),
            reliability=tuple(metrics.reliability(has[calibrated], joined.probabilities[known, i][calibrated])),
            warning=_warning(with_sound, recordings, without),
        )
    with_any = (targets == 1).any(axis=1)
    windows_with, recordings_with = int(with_any.sum()), np.unique(groups[with_any]).size
    macro = [_measure(mean(values[m]), mean(drawn[m]), windows_with, recordings_with) for m in range(len(FIGURES))]
    return Figures(**dict(zip(FIGURES, macro, strict=True))), found


def confusion(
    windows: Windows, labels: Sequence[str], predictions: Sequence[Predictions]
) -> dict[str, dict[str, int]]:
    """Counts by true and detected label, of windows that are known for every label and have one at most."""
    joined = join(predictions)
    targets = windows.targets[joined.rows]
    single = (targets >= 0).all(axis=1) & (targets.sum(axis=1) <= 1)
    counts: dict[str, dict[str, int]] = {}
    for row, logits in zip(targets[single], joined.logits[single], strict=True):
        true = labels[int(row.argmax())] if row.any() else NOTHING
        named = labels[int(logits.argmax())] if logits.max() >= 0 else NOTHING
        counts.setdefault(true, {})
        counts[true][named] = counts[true].get(named, 0) + 1
    return counts


def worst(windows: Windows, labels: Sequence[str], predictions: Sequence[Predictions]) -> tuple[Mistake, ...]:
    """The windows and labels with the highest loss among those that a score of 0.5 decides wrongly."""
    joined = join(predictions)
    targets = windows.targets[joined.rows]
    wrong = np.where(targets == 1, -joined.logits, joined.logits)  # logit of the opposite
    wrong[targets < 0] = -np.inf
    order = np.argsort(-wrong, axis=None, kind="stable")[:WORST]
    found = []
    for row, label in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, label] < 0:
            break
        window = joined.rows[row]
        recording: Recording = windows.recordings[windows.recording[window]]
        found.append(
            Mistake(
                file=recording.name,
                start=float(windows.spans[window, 0]),
                end=float(windows.spans[window, 1]),
                label=labels[label],
                kind="missed" if targets[row, label] == 1 else "false",
                score=float(sigmoid(joined.logits[row, label])),
            )
        )
    return tuple(found)


def table(evaluation: Evaluation) -> str:
    """``evaluation.csv``: a row for each label, and their means; the first columns are those of BirdNET-Analyzer."""
    named = {
        "Precision (0.5)": "precision",
        "Recall (0.5)": "recall",
        "F1 Score (0.5)": "f1",
        "Precision (opt)": "precision_at_threshold",
        "Recall (opt)": "recall_at_threshold",
        "F1 Score (opt)": "f1_at_threshold",
        "AUPRC": "average_precision",
        "AUROC": "auroc",
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    intervals = [f"{name} {end}" for name in ("AUPRC", "AUROC") for end in ("low", "high")]
    writer.writerow(["Class", *named, "Optimal Threshold", "Windows", "Windows without", "Recordings", *intervals])
    rows: list[tuple[str, Figures]] = list(evaluation.labels.items())
    if evaluation.macro is not None:
        rows.append(("OVERALL (macro-averaged)", evaluation.macro))
    for name, figures in rows:
        measures = [getattr(figures, field) for field in named.values()]
        writer.writerow(
            [
                name,
                *(_number(measure.value) for measure in measures),
                _number(figures.threshold_score) if isinstance(figures, LabelFigures) else "",
                measures[0].windows,
                figures.windows_without if isinstance(figures, LabelFigures) else "",
                measures[0].recordings,
                *(_number(end) for measure in measures[-2:] for end in (measure.low, measure.high)),
            ]
        )
    return text.getvalue()


def summary(evaluation: Evaluation) -> str:
    """The figures for a terminal: a line for each label, the means, noise, and the problems."""
    if evaluation.macro is None:
        lines = ["nothing could be evaluated: all windows belong to one recording or group"]
    else:
        lines = [
            f"evaluated on {evaluation.windows} windows of {evaluation.recordings} recordings "
            f"({HOW.get(evaluation.evaluated, evaluation.evaluated)}); 95 % intervals over recordings",
            f"{'':24} {'windows':>8} {'recordings':>10}  {'average precision':20}  {'AUROC':20}  threshold",
        ]
        rows: list[tuple[str, Figures]] = [*evaluation.labels.items(), ("mean", evaluation.macro)]
        for name, figures in rows:
            threshold = figures.threshold_score if isinstance(figures, LabelFigures) else None
            lines.append(
                f"{name[:24]:24} {figures.auroc.windows:8} {figures.auroc.recordings:10}  "
                f"{figures.average_precision!s:20}  {figures.auroc!s:20}  "
                f"{'–' if threshold is None else f'{threshold:.3f}'}"
            )
    lines += [f"WARNING: {alarm}" for alarm in (*leaks(evaluation), *alarms(evaluation))]
    return "\n".join([*lines, *(f"note: {problem}" for problem in evaluation.problems)])


def leaks(evaluation: Evaluation) -> list[str]:
    """A line if recordings were evaluated that trained the head."""
    if not evaluation.trained_on:
        return []
    return [f"{describe_seen(evaluation.trained_on, evaluation.recordings)}, so these figures are too good"]


def alarms(evaluation: Evaluation) -> list[str]:
    """A line for each label that is detected too often where there is no animal."""
    return [
        f"{label}: {rate:.0f} detections an hour in {kind}"
        for kind, noise in evaluation.noise.items()
        for label, rate in noise.per_hour.items()
        if rate > MOST_PER_HOUR
    ]


def _noise(
    windows: Windows,
    labels: Sequence[str],
    predictions: Sequence[Predictions],
    calibration: Calibration | None,
    noise: Mapping[str, np.ndarray],
) -> dict[str, Noise]:
    """Detections of the saved head in noise, and of the evaluated heads in the background of the data."""
    thresholds = np.zeros(len(labels)) if calibration is None else calibration.thresholds()
    # A label of noise is right there.
    sounds = np.array([label.casefold() not in _NO_SOUND for label in labels])
    thresholds = np.where(sounds, thresholds, np.inf)
    seconds = float((windows.spans[:, 1] - windows.spans[:, 0]).max())
    found = {
        name: Noise(seconds=len(logits) * seconds, per_hour=per_hour(logits, thresholds, labels, seconds))
        for name, logits in noise.items()
    }
    if predictions:
        joined = join(predictions)
        empty = (windows.targets[joined.rows][:, sounds] == 0).all(axis=1)
        if empty.any():
            detected = np.where(np.isnan(joined.detected), joined.logits >= 0, joined.detected)[empty]
            rates = per_hour(detected, np.where(sounds, 0.5, np.inf), labels, seconds)
            found[BACKGROUND] = Noise(seconds=len(detected) * seconds, per_hour=rates)
    return found


# -- figures ------------------------------------------------------------------------------------------------------

FIGURES: Final = tuple(field for field in Figures.__struct_fields__)


def _point(joined: Predictions, targets: np.ndarray) -> np.ndarray:
    return figures_of(joined, targets, np.ones((1, len(targets))))[..., 0]


def resamples_of(windows: int) -> int:
    """How often that number of windows is resampled."""
    return metrics.RESAMPLES if windows <= _LARGE else metrics.RESAMPLES // 5


def resampled(joined: Predictions, targets: np.ndarray, groups: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Figures (metrics, C, B) in resamples of the groups (N,); the same groups and seed give the same resamples."""
    blocks = metrics.resample(groups, seed, resamples)
    return np.concatenate([figures_of(joined, targets, weights) for weights in blocks], axis=-1)


def figures_of(joined: Predictions, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(metrics, C, B) of weights (B, N), in the order of `FIGURES`."""
    found = np.full((len(FIGURES), targets.shape[1], len(weights)), np.nan)
    for i in range(targets.shape[1]):
        known = targets[:, i] >= 0
        if not known.any():  # such as reviews of other labels
            continue
        has, logits, weight = targets[known, i], joined.logits[known, i], weights[:, known]
        found[0, i] = metrics.average_precision(has, logits, weight)
        found[1, i] = metrics.auroc(has, logits, weight)
        decided = (metrics.precision, metrics.recall, metrics.f1)
        found[2:5, i] = [metric(has, logits >= 0, weight) for metric in decided]
        where = np.isfinite(joined.detected[known, i])
        detected = joined.detected[known, i][where] == 1
        found[5:8, i] = [metric(has[where], detected, weight[:, where]) for metric in decided]
        where = np.isfinite(joined.probabilities[known, i])
        found[8, i] = metrics.calibration_error(has[where], joined.probabilities[known, i][where], weight[:, where])
    return found


def join(predictions: Sequence[Predictions]) -> Predictions:
    """The predictions of all parts, one after the other."""
    return Predictions(*(np.concatenate(parts) for parts in zip(*predictions, strict=True)))


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over labels (C, ...) of those that have a value; NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, values, 0).sum(axis=0) / known.sum(axis=0))


def _measure(value: np.ndarray, drawn: np.ndarray, windows: int, recordings: int) -> Measure:
    low, high = metrics.interval(drawn)
    return Measure(
        value=_finite(value), low=_finite(low), high=_finite(high), windows=windows, recordings=recordings
    )


def _finite(value: float | np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def _curve(targets: np.ndarray, logits: np.ndarray) -> tuple[tuple[float, float, float], ...]:
    if not (targets == 1).any():
        return ()
    order = np.argsort(-logits, kind="stable")
    last = np.append(np.diff(logits[order]) != 0, True)
    true = np.cumsum(targets[order] == 1)[last]
    ranks = np.flatnonzero(last) + 1
    chosen = np.unique(np.linspace(0, ranks.size - 1, min(_POINTS, ranks.size)).round().astype(int))
    scores = sigmoid(logits[order][last])
    return tuple((float(scores[i]), float(true[i] / ranks[i]), float(true[i] / true[-1])) for i in chosen)


def _warning(with_sound: int, recordings: int, without: int) -> str | None:
    if not with_sound or not without:
        return f"no windows {'with' if not with_sound else 'without'} the sound could be evaluated: no figures"
    if recordings < FEW:
        return f"{recordings} recordings with the sound: these figures say little about new ones"
    return None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
