"""From logits to scores, and which scores are reported."""

import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Final, Literal

import numpy as np

from avex_serve.bundles.manifest import Activation
from avex_serve.calibration.scales import Calibrator
from avex_serve.errors import InputError, NotFoundError
from avex_serve.scheduling.request import current

STEP: Final = 1000  # labels that are reported in a few milliseconds
SCORE_BYTES: Final = 512  # memory for a score with its label until the answer's text is made; measured, rounded up

ScoreScale = Literal["sigmoid", "softmax", "logits"]
Threshold = float | Mapping[str, float] | None  # lowest score to report: of every label, or by label


def score_scale(activation: Activation) -> ScoreScale:
    """The name of the scale of an activation's scores."""
    return "logits" if activation == "none" else activation


def activate(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """Scores from logits (…, C), in float32."""
    scores: np.ndarray
    if activation == "sigmoid":
        # Two branches, since exp overflows for large arguments of the wrong sign.
        small = np.exp(-np.abs(logits))
        scores = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
        return scores.astype(np.float32)
    if activation == "softmax":
        with np.errstate(over="ignore"):  # a difference beyond float32 is a score of 0 all the same
            shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = shifted / shifted.sum(axis=-1, keepdims=True)
        return scores.astype(np.float32)
    return logits


@dataclass(frozen=True, slots=True)
class Selection:
    """Which scores are reported: those of at least `threshold`, the best `top_k` of each window, or both.

    Threshold and top-k are independent of each other. If neither is given, each label has the threshold of the
    head's calibration, and where it has none 0.5 (for raw logits 0, which is the same point). Labels that aren't
    shown take no place among the best.
    """

    threshold: float | np.ndarray  # of every label, or (C,) float64 of those that are shown
    top_k: int | None
    warnings: tuple[str, ...] = ()  # reasons to doubt that this is what the client wants
    shown: tuple[int, ...] | None = None  # indices of the labels that are reported; None: all

    @classmethod
    def of(
        cls,
        activation: Activation,
        threshold: Threshold,
        top_k: int | None,
        labels: Sequence[str] = (),
        calibrator: Calibrator | None = None,
    ) -> "Selection":
        """The selection that a client asks for.

        Args:
            activation: of the head.
            threshold: the lowest score to report; by label, the others have the default.
            top_k: most labels to report for a window.
            labels: C labels of the head, if thresholds are given by label.
            calibrator: of the head; None: it is not calibrated.

        Raises:
            InputError: values that can't be, or that no score can reach.
            NotFoundError: a threshold for a label that the head doesn't have.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}; expected at least 1")
        most = None if top_k is None else min(top_k, sys.maxsize)  # numpy knows no larger numbers
        if threshold is not None and not isinstance(threshold, Mapping):
            return cls(threshold, most, _check_threshold(threshold, activation))
        default = -math.inf if top_k is not None else 0.0 if activation == "none" else 0.5
        lowest: float | np.ndarray = default
        if calibrator is not None and top_k is None:
            lowest = np.where(np.isnan(calibrator.lowest), default, calibrator.lowest)
        warnings: tuple[str, ...] = ()
        if threshold is not None:
            check_labels(threshold, labels)
            lowest = np.full(len(labels), lowest)
            places = {label: place for place, label in enumerate(labels)}
            for label, value in threshold.items():
                warnings += _check_threshold(value, activation, f" of {label!r}")
                lowest[places[label]] = value
        return cls(lowest, most, warnings)

    def showing(self, wanted: Collection[str] | None, labels: Sequence[str]) -> "Selection":
        """The same for some of a head's labels; None: all."""
        if wanted is None:
            return self
        chosen = set(wanted)
        shown = tuple(index for index, label in enumerate(labels) if label in chosen)
        threshold = self.threshold[list(shown)] if isinstance(self.threshold, np.ndarray) else self.threshold
        return replace(self, threshold=threshold, shown=shown)

    def best(self, scores: np.ndarray) -> list[int]:
        """Indices into scores (C,) that pass, the highest first and equals in the order of the labels."""
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        # In float64, so that float32's rounding doesn't report a score below the threshold.
        passing = scores.astype(np.float64) >= self.threshold
        return list(map(int, order[passing[order]]))

    def count(self, scores: np.ndarray) -> int:
        """How many of the scores (N, C) pass."""
        scores = self._shown(scores)
        passing = np.count_nonzero(scores.astype(np.float64) >= self.threshold, axis=-1)
        return int((passing if self.top_k is None else np.minimum(passing, self.top_k)).sum())

    def passing(self, scores: np.ndarray) -> Iterator[list[tuple[int, float]]]:
        """Index and value of the scores (N, C) that pass, row by row, the highest of each row first.

        Raises:
            TooLargeError: there are more of them than the current request may ask for.
            ClientGoneError, DeadlineError: the answer is no longer wanted.
        """
        request = current()
        request.extend_answer(
            SCORE_BYTES * self.count(scores),
            "raise threshold or lower top_k to report fewer labels, or send the recording in pieces",
        )
        made = 0
        for row in self._shown(scores):
            if made >= STEP:  # a short answer needs no checkpoint
                request.checkpoint()
                made = 0
            best = [
                (index if self.shown is None else self.shown[index], float(row[index])) for index in self.best(row)
            ]
            made += len(best)
            yield best

    def _shown(self, scores: np.ndarray) -> np.ndarray:
        return scores if self.shown is None else scores[:, self.shown]


# Where a bundle's labels are.
LISTED: Final = "All are in GET /models/NAME, in ModelConfig over gRPC, and in `avex-serve info BUNDLE`"


def check_labels(wanted: Collection[str] | None, labels: Collection[str]) -> None:
    """Raise NotFoundError for a label that no head has."""
    known = set(labels if wanted else ())
    for label in wanted or ():
        if label not in known:
            nearest = get_close_matches(label, labels, 1)
            hint = f"one of the {len(labels)} labels is {min(labels)!r}."
            if nearest:
                hint = f"did you mean {nearest[0]!r}?"
            if "," in label and {part.strip() for part in label.split(",")} <= known:
                hint = "name each label by an option of its own."
            raise NotFoundError(f"no probe has the label {label[:80]!r}; {hint} {LISTED}")


def _check_threshold(threshold: float, activation: Activation, whose: str = "") -> tuple[str, ...]:
    """The warnings about a threshold; InputError if it can't be, or no score can reach it."""
    if not math.isfinite(threshold):
        raise InputError(f"threshold{whose} is {threshold}; expected a finite number")
    if activation == "none":
        return ()
    if threshold > 1:
        raise InputError(
            f"threshold{whose} is {threshold:g}, and no {activation} score is above 1; expected 0 to 1, such as 0.5"
        )
    if threshold < 0:
        reported = "every label is" if not whose else "it is always"
        return (f"threshold{whose} is {threshold:g}, and no {activation} score is below 0: {reported} reported",)
    return ()
