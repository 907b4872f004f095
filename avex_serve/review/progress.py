"""How far a review is, and what it says so far: counts, agreement, reliability of scores, thresholds."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from avex_serve.annotations.reviews import DECISIONS, Decision, Review, Subject, agreed
from avex_serve.archive.density import LabelDensity, band_notes
from avex_serve.calibration.density import call_density
from avex_serve.calibration.fit import calibrate
from avex_serve.calibration.scales import LabelCalibration, Scale, log_odds, sigmoid
from avex_serve.errors import InputError
from avex_serve.inference.scores import ScoreScale
from avex_serve.review.pool import Pool

BINS: Final = 10  # of scores
POINTS: Final = 41  # of the fitted curve
Z: Final = 1.96  # standard deviations of an interval of 95 %


class Kappa(NamedTuple):
    """Agreement of two annotators beyond chance (Cohen 1960), of windows that both called present or absent."""

    one: str
    other: str
    windows: int
    agreeing: int
    value: float | None  # None: both always gave the same answer, so that chance can't be told


class Bin(NamedTuple):
    """Reviewed windows with scores from `low` on and below `high`."""

    low: float
    high: float
    windows: int
    present: int
    share: float  # of windows with the sound
    share_low: float  # its interval of 95 % (Wilson)
    share_high: float


def count_labels(reviews: Sequence[Review]) -> dict[str, dict[str, Any]]:
    """By label: windows by decision, as annotators agree on it, and decisions of each annotator."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    annotators: dict[str, Counter[str]] = defaultdict(Counter)
    for subject, decision in agreed(reviews).items():
        counts[subject.label][decision] += 1
    for review in reviews:
        annotators[review.label][review.annotator] += 1
    return {
        label: {
            **{decision: counts[label][decision] for decision in DECISIONS},
            "annotators": dict(annotators[label]),
        }
        for label in counts
    }


def agreement(reviews: Sequence[Review]) -> list[Kappa]:
    """Cohen's kappa of each two annotators that have windows in common."""
    by_annotator: dict[str, dict[Subject, Decision]] = defaultdict(dict)
    for review in reviews:
        if review.decision != "unsure":
            by_annotator[review.annotator][review.subject] = review.decision
    found = []
    for one, other in itertools.combinations(sorted(by_annotator), 2):
        first, second = by_annotator[one], by_annotator[other]
        pairs = Counter((first[subject], second[subject]) for subject in first.keys() & second.keys())
        if pairs:
            found.append(Kappa(one, other, pairs.total(), *_kappa(pairs)))
    return found


def _kappa(pairs: Counter[tuple[Decision, Decision]]) -> tuple[int, float | None]:
    total = pairs.total()
    agreeing = sum(count for (one, other), count in pairs.items() if one == other)
    by_chance = sum(
        sum(count for pair, count in pairs.items() if pair[0] == decision)
        * sum(count for pair, count in pairs.items() if pair[1] == decision)
        for decision in DECISIONS
    ) / (total * total)
    return agreeing, None if by_chance == 1 else (agreeing / total - by_chance) / (1 - by_chance)


def reliability(scores: np.ndarray, present: np.ndarray) -> list[Bin]:
    """The share of reviewed windows with the sound in bins of scores of equal width; empty bins are left out.

    Args:
        scores: (N,).
        present: (N,) bool.
    """
    if not scores.size:
        return []
    low, high = min(0.0, float(scores.min())), max(1.0, float(scores.max()))
    edges = np.linspace(low, high, BINS + 1)
    member = np.clip(np.searchsorted(edges, scores, "right") - 1, 0, BINS - 1)
    found = []
    for i in np.unique(member).tolist():
        n, k = int((member == i).sum()), int(present[member == i].sum())
        found.append(Bin(float(edges[i]), float(edges[i + 1]), n, k, k / n, *_wilson(k, n)))
    return found


def _wilson(k: int, n: int) -> tuple[float, float]:
    """The interval of a share k / n by Wilson (1927)."""
    middle = (k + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def describe_label(
    pool: Pool, scale: ScoreScale, label: str, reviews: Sequence[Review], target_precision: float
) -> dict[str, Any]:
    """What the reviews say about the scores of a label; without scores, only counts.

    Args:
        pool: the windows.
        scale: of its scores.
        label: its name.
        reviews: the decisions that hold.
        target_precision: of the detections from the threshold on.
    """
    windows, targets, labels = _targets(pool, agreed(reviews))
    result: dict[str, Any] = {"label": label, "bins": [], "curve": [], "threshold": None, "reason": None}
    result["density"], result["density_reason"] = None, None
    if label not in labels:
        return result | dict.fromkeys(("reason", "density_reason"), "no decisions yet")
    scores = np.stack([pool.scores_of(pool.label_index(each), windows) for each in labels], axis=1)
    targets[~np.isfinite(scores)] = -1
    place = labels.index(label)
    known = targets[:, place] >= 0
    if not known.any():
        reason = "no decisions about windows with a score yet"
        return result | dict.fromkeys(("reason", "density_reason"), reason)
    result |= _shown_density(_density(pool, label, windows[known], targets[known, place]))
    result["bins"] = [each._asdict() for each in reliability(scores[known, place], targets[known, place] == 1)]
    found = calibrate(
        _logits(np.nan_to_num(scores, nan=0.5), scale),
        targets,
        pool.recording[windows],
        labels,
        source="reviews",
        target_precision=target_precision,
    ).labels[place]
    return result | _shown(found, scale, scores[known, place])


def label_densities(pool: Pool, reviews: Sequence[Review]) -> list[LabelDensity]:
    """The share of all windows with each reviewed label, in all and by site, if these were drawn by chance."""
    windows, targets, labels = _targets(pool, agreed(reviews))
    return [
        _density(pool, label, windows[targets[:, i] >= 0], targets[targets[:, i] >= 0, i])
        for i, label in sorted(enumerate(labels), key=lambda each: each[1])
    ]


def _density(pool: Pool, label: str, windows: np.ndarray, present: np.ndarray) -> LabelDensity:
    """From windows (M,) with a decision (M,)."""
    scores = pool.all_scores(pool.label_index(label))
    if scores is None:
        return LabelDensity(label, None, "these scores are not of all windows", ())
    decisions = np.full(scores.size, -1, np.int8)
    decisions[windows] = present
    try:
        found = call_density(scores.astype(np.float64), decisions, pool.site_of)
    except InputError as error:
        return LabelDensity(label, None, str(error), ())
    named = found._replace(sites={pool.sites[int(place)]: density for place, density in found.sites.items()})
    return LabelDensity(label, named, None, tuple(band_notes(found)))


def _shown_density(each: LabelDensity) -> dict[str, Any]:
    if each.found is None:
        return {"density_reason": each.reason}
    sites = each.found.sites if len(each.found.sites) > 1 else {}
    return {
        "density": {
            **each.found.all._asdict(),
            "sites": [{"site": site, **density._asdict()} for site, density in sites.items()],
            "notes": each.notes,
        }
    }


def _targets(pool: Pool, decisions: Mapping[Subject, Decision]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Reviewed windows of the pool (N,), what is known of them (N, C) int8, and the C labels."""
    labels = [label for label in pool.labels if label in {subject.label for subject in decisions}]
    columns = {label: i for i, label in enumerate(labels)}
    rows: dict[int, int] = {}
    cells: list[tuple[int, int, int]] = []
    for subject, decision in decisions.items():
        window = pool.find(subject.file, subject.start)
        if window is not None and subject.label in columns and decision != "unsure":
            row = rows.setdefault(window, len(rows))
            cells.append((row, columns[subject.label], int(decision == "present")))
    targets = np.full((len(rows), len(labels)), -1, np.int8)
    for row, column, value in cells:
        targets[row, column] = value
    return np.fromiter(rows, np.int64, len(rows)), targets, labels


def _logits(scores: np.ndarray, scale: ScoreScale) -> np.ndarray:
    return log_odds(scores, "none" if scale == "logits" else scale)


def _shown(found: LabelCalibration, scale: ScoreScale, scores: np.ndarray) -> dict[str, Any]:
    """The curve and the threshold of a calibration, on the scale of the scores."""
    if found.scale is None:
        return {"reason": found.reason}
    grid = np.linspace(min(0.0, scores.min()), max(1.0, scores.max()), POINTS)
    curve = [[float(score), chance] for score, chance in zip(grid, _chances(grid, scale, found.scale), strict=True)]
    if found.threshold is None:
        return {"curve": curve, "reason": found.reason}
    threshold = found.threshold
    logits = np.array([threshold.logit, *threshold.logit_interval])
    value, low, high = (logits if scale == "logits" else sigmoid(logits)).tolist()
    shown = {"score": value, "low": low, "high": high, "precision": threshold.precision}
    return {"curve": curve, "threshold": shown, "reason": None}


def _chances(scores: np.ndarray, scale: ScoreScale, fitted: Scale) -> list[float]:
    chances: list[float] = sigmoid(_logits(scores, scale) * fitted.slope + fitted.offset).tolist()
    return chances
