"""Metrics of one label over windows, with intervals from resampled recordings; numpy alone.

Targets are 1 or 0: leave out unknown windows first. Every metric takes weights, which is how resampling works: a
recording that is drawn twice counts twice. A metric is NaN where it has no value, such as the recall of a label
without windows. The definitions are scikit-learn's.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

RESAMPLES: Final = 1000
LEVEL: Final = 0.95  # of the intervals
_BLOCK: Final = 2**22  # weights of resamples in memory at once
BINS: Final = 10  # of the reliability diagram and of the calibration error

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A metric with its interval; NaN where it has no value."""

    value: float
    low: float
    high: float


def average_precision(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the precision at each true window, ties taken together, as `sklearn.metrics.average_precision_score`.

    Args:
        targets: (N,) 1 or 0.
        scores: (N,).
        weights: (..., N), at least 0.

    Returns:
        (...,) float64.
    """
    true, false = _ranked(targets, scores, weights)
    total = true[..., -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(true / (true + false))
        gained = np.diff(true, axis=-1, prepend=0) / total
    return np.asarray(np.where(total[..., 0] > 0, (gained * precision).sum(axis=-1), np.nan))


def auroc(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, as `sklearn.metrics.roc_auc_score`; arguments as of `average_precision`."""
    true, false = _ranked(targets, scores, weights)
    before = true - np.diff(true, axis=-1, prepend=0) / 2  # ties count half
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (np.diff(false, axis=-1, prepend=0) * before).sum(axis=-1) / (true[..., -1] * false[..., -1])
    return np.asarray(np.where(np.isfinite(area), area, np.nan))


def precision(targets: np.ndarray, detected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the detected windows that have the label; `detected` (N,) bool, else as of `average_precision`."""
    return _ratio(weights @ (detected & (targets == 1)), weights @ detected)


def recall(targets: np.ndarray, detected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the windows with the label that are detected; arguments as of `precision`."""
    return _ratio(weights @ (detected & (targets == 1)), weights @ (targets == 1))


def f1(targets: np.ndarray, detected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall; arguments as of `precision`."""
    return _ratio(2 * weights @ (detected & (targets == 1)), weights @ detected + weights @ (targets == 1))


def calibration_error(targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: mean over windows of |share with the label - mean probability| of their bin.

    The ten bins have equal widths (Naeini et al. 2015). Arguments as of `average_precision`.
    """
    member = np.eye(BINS)[_bins(probabilities)]  # (N, bins)
    gaps = np.abs(weights @ (member * (targets - probabilities)[:, None]))
    return _ratio(gaps.sum(axis=-1), weights.sum(axis=-1))


def reliability(targets: np.ndarray, probabilities: np.ndarray) -> list[dict[str, float]]:
    """Each bin of probabilities that holds windows: their number, mean probability and share with the label."""
    bins = _bins(probabilities)
    return [
        {
            "windows": int((bins == i).sum()),
            "probability": float(probabilities[bins == i].mean()),
            "share": float(targets[bins == i].mean()),
        }
        for i in np.unique(bins)
    ]


def estimate(
    metric: Metric,
    targets: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    seed: int,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A metric with its interval: the central 95 % of its values over resampled groups.

    Args:
        metric: such as `average_precision`.
        targets: (N,) 1 or 0.
        scores: (N,), or what the metric takes in their place.
        groups: (N,) int, the recording of each window.
        seed: of the resampling.
        resamples: how often groups are drawn.
    """
    if not targets.size:
        return Estimate(np.nan, np.nan, np.nan)
    value = float(metric(targets, scores, np.ones(targets.size)))
    drawn = [metric(targets, scores, weights) for weights in resample(groups, seed, resamples)]
    return Estimate(value, *interval(np.concatenate(drawn)))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of the values that are not NaN; NaN if there are none."""
    values = values[np.isfinite(values)]
    if not values.size:
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resample(groups: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Weights (B, N) of windows in resamples of their groups with replacement, in blocks."""
    known, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    left = resamples
    while left > 0:
        rows = min(left, max(1, _BLOCK // groups.size))
        counts = rng.multinomial(known.size, np.full(known.size, 1 / known.size), size=rows)
        yield counts[:, member].astype(np.float64)
        left -= rows


def _ranked(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the weights of windows with and without the label, (..., T) each, down to each distinct score."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of those with the same score
    ordered = weights[..., order]
    has = targets[order] == 1
    return np.cumsum(ordered * has, axis=-1)[..., last], np.cumsum(ordered * ~has, axis=-1)[..., last]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.divide(part, whole))


def _bins(probabilities: np.ndarray) -> np.ndarray:
    bins: np.ndarray = np.minimum(probabilities * BINS, BINS - 1).astype(int)
    return bins
