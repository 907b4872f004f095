"""Calibration of each label from labelled logits of windows that the head was not trained on.

Method: logistic regression of the label on the logit (Platt 1999; for bioacoustics Wood & Kahl 2024,
doi 10.1007/s10336-024-02144-5). The fit of a label is drawn to the pooled fit of all labels by a normal prior: with
few labels it is the pooled one, with many it is its own. Intervals come from resampled recordings, since windows of
a recording are alike.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from avex_serve.calibration.scales import (
    Calibration,
    Interval,
    LabelCalibration,
    Missing,
    Scale,
    Threshold,
    sigmoid,
)
from avex_serve.errors import InputError

TARGET: Final = 0.9  # precision
# Fewer labels make no calibration. Below these numbers simulated intervals missed the truth too often.
WITH_SOUND: Final = 10  # windows
WITHOUT_SOUND: Final = 10
RECORDINGS: Final = 3  # with the sound
RESAMPLES: Final = 500
# Priors, as standard deviations. The logits of a head that fits have slope 1 and offset 0 as they are. The odds of a
# label may differ from the pooled ones by a factor of e ** 1.5, its slope by half of the pooled slope.
_POOLED: Final = (2.0, 1.0)  # of offset and slope
_OFFSET, _SLOPE_SHARE = 1.5, 0.5


class Fit(NamedTuple):
    """The maximum of a penalised likelihood of sigmoid(offset + slope x)."""

    parameters: np.ndarray  # (2,) offset, slope
    hessian: np.ndarray  # (2, 2) of the negative log posterior


def calibrate(
    logits: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    labels: Sequence[str],
    *,
    source: str,
    target_precision: float = TARGET,
    seed: int = 0,
) -> Calibration:
    """Calibrate every label that has enough labelled windows.

    Args:
        logits: (N, C), of windows that the head was not trained on.
        targets: (N, C) 1, 0, or -1 where unknown.
        groups: (N,) int, the recording of each window.
        labels: C names.
        source: what the labels are, for the reader of the result.
        target_precision: of the detections from the threshold on.
        seed: of the resampling.

    Raises:
        InputError: a target precision that is not between 0 and 1.
    """
    if not 0 < target_precision < 1:
        raise InputError(f"the target precision is {target_precision}; expected more than 0 and less than 1")
    known = targets >= 0
    pooled = fit_logistic(logits[known], targets[known], (0.0, 1.0), _POOLED).parameters
    return Calibration(
        target_precision=target_precision,
        source=source,
        labels=tuple(
            _calibrate_label(
                label,
                logits[known[:, i], i].astype(np.float64),
                targets[known[:, i], i],
                groups[known[:, i]],
                pooled,
                target_precision,
                np.random.default_rng([seed, i]),
            )
            for i, label in enumerate(labels)
        ),
    )


def fit_logistic(x: np.ndarray, y: np.ndarray, mean: tuple[float, float], deviation: tuple[float, float]) -> Fit:
    """Fit P(y = 1) = sigmoid(offset + slope x) by Newton's method.

    Args:
        x: (N,).
        y: (N,) 1 or 0.
        mean: of the normal prior of offset and slope.
        deviation: its standard deviations; infinite: no prior.
    """
    design = np.stack([np.ones_like(x, dtype=np.float64), x], axis=1)  # (N, 2)
    centre, precision = np.array(mean), 1 / np.square(deviation)
    theta = centre.copy()

    def loss(theta: np.ndarray) -> float:
        z = design @ theta
        return float((np.logaddexp(0, z) - y * z).sum() + precision @ np.square(theta - centre) / 2)

    value = loss(theta)
    for _ in range(100):
        p = sigmoid(design @ theta)
        gradient = design.T @ (p - y) + precision * (theta - centre)
        hessian = (design.T * (p * (1 - p))) @ design + np.diag(precision)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        while (reached := loss(theta - step)) > value + 1e-12 * abs(value) and np.abs(step).max() > 1e-12:
            step = step / 2
        theta, value = theta - step, reached
        if np.abs(step).max() < 1e-10:
            break
    return Fit(theta, hessian)


def _calibrate_label(
    label: str,
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    pooled: np.ndarray,
    target: float,
    rng: np.random.Generator,
) -> LabelCalibration:
    with_sound, recordings = int((y == 1).sum()), np.unique(groups[y == 1]).size
    result = LabelCalibration(
        label=label, with_sound=with_sound, without_sound=int(y.size) - with_sound, recordings=recordings
    )
    missing = Missing(
        with_sound=max(0, WITH_SOUND - result.with_sound),
        without_sound=max(0, WITHOUT_SOUND - result.without_sound),
        recordings=max(0, RECORDINGS - recordings),
    )
    if missing != Missing():
        return replace(result, missing=missing, reason=_missing_text(missing))
    if pooled[1] <= 0:
        return replace(result, reason="the scores of all labels together don't rise with their sounds")
    # Around the logit where the pooled probability is 0.5, offset and slope are nearly independent.
    origin = -pooled[0] / pooled[1]
    fit = fit_logistic(x - origin, y, (0.0, pooled[1]), (_OFFSET, _SLOPE_SHARE * pooled[1]))
    if fit.parameters[1] <= 0:
        return replace(result, reason="its scores don't rise with its sound")
    drawn, counts = _resampled(fit, x - origin, y, groups, pooled[1], rng)
    slope = float(fit.parameters[1])
    offset = float(fit.parameters[0] - slope * origin)
    scale = Scale(
        slope=slope,
        offset=offset,
        slope_interval=_interval(drawn[:, 1]),
        offset_interval=_interval(drawn[:, 0] - drawn[:, 1] * origin),
    )
    drawn[:, 0] -= drawn[:, 1] * origin
    threshold = _threshold(x, groups, scale, drawn, counts, target)
    reason = None
    if threshold is None:
        best = float(sigmoid(np.array(slope * x.max() + offset)))
        reason = f"no threshold reaches a precision of {target:g}: at the highest score it is {best:.2f}"
    return replace(result, scale=scale, threshold=threshold, reason=reason)


def _resampled(
    fit: Fit, x: np.ndarray, y: np.ndarray, groups: np.ndarray, pooled_slope: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (B, 2) in resamples of the groups, and how often each group (B, G) is in these.

    Each resample takes one step of Newton's method from the fit, with the prior's mean drawn too.
    """
    known, member = np.unique(groups, return_inverse=True)
    residuals = y - sigmoid(fit.parameters[0] + fit.parameters[1] * x)
    scores = np.stack([np.bincount(member, residuals), np.bincount(member, residuals * x)], axis=1)  # (groups, 2)
    counts = rng.multinomial(known.size, np.full(known.size, 1 / known.size), size=RESAMPLES)
    deviation = np.array([_OFFSET, _SLOPE_SHARE * pooled_slope])
    prior = rng.normal(size=(RESAMPLES, 2)) / deviation  # the gradient that the drawn mean adds
    steps = np.linalg.solve(fit.hessian, ((counts - 1) @ scores + prior).T).T
    drawn = fit.parameters + steps
    drawn[:, 1] = np.maximum(drawn[:, 1], 0.0)
    return drawn, counts


def _threshold(
    x: np.ndarray, groups: np.ndarray, scale: Scale, drawn: np.ndarray, counts: np.ndarray, target: float
) -> Threshold | None:
    """The lowest logit from which on the mean probability reaches the target; None if none does.

    Sure detections would make up for others that are likely wrong, so each must be more likely right than wrong too.
    `drawn` (B, 2) and `counts` (B, G) are those of `_resampled`.
    """
    order = np.argsort(-x, kind="stable")
    probable = sigmoid(scale.slope * x[order] + scale.offset)
    expected = np.cumsum(probable) / np.arange(1, x.size + 1)
    # It falls with the logit. Far below the target, no resample reaches it either: leaving those windows out keeps
    # the arrays below as small as the number of sounds.
    order = order[: max(1, int((expected >= target / 2).sum()))]
    top, expected = x[order], expected[: order.size]
    last = np.append(np.diff(top) != 0, True)  # windows with the same logit pass together
    reaching = np.flatnonzero((expected >= target) & (probable[: order.size] >= 0.5) & last)
    if not reaching.size:
        return None
    place = int(reaching[-1])
    weights = counts[:, np.unique(groups, return_inverse=True)[1][order]]  # (B, windows)
    likely = sigmoid(drawn[:, :1] + drawn[:, 1:] * top)  # (B, windows)
    with np.errstate(invalid="ignore", divide="ignore"):
        precisions = np.cumsum(weights * likely, axis=1) / np.cumsum(weights, axis=1)
    # Where a resample never reaches the target, the highest logit stands for a threshold beyond it.
    lowest = (precisions >= target) & (likely >= 0.5)
    places = [int(found[-1]) if (found := np.flatnonzero(row)).size else 0 for row in lowest]
    # Between the window at a place and the next one below, every threshold detects the same windows.
    below = np.append(top[1:], x[x < top[-1]].max(initial=-np.inf))
    middle = np.where(np.isfinite(below), (top + below) / 2, top)
    with np.errstate(invalid="ignore", divide="ignore"):
        half = np.fmin(-drawn[:, 0] / drawn[:, 1], top[places])
    return Threshold(
        logit=float(max(middle[place], min(-scale.offset / scale.slope, top[place]))),
        logit_interval=_interval(np.fmax(middle[places], half)),
        precision=float(expected[place]),
        precision_interval=_interval(precisions[:, place]),
    )


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values[np.isfinite(values)], (0.025, 0.975))
    return float(low), float(high)


def _missing_text(missing: Missing) -> str:
    parts = {
        "windows with the sound": missing.with_sound,
        "windows without it": missing.without_sound,
        "recordings with it": missing.recordings,
    }
    return "too few labels to calibrate; missing: " + ", ".join(f"{n} {what}" for what, n in parts.items() if n)
