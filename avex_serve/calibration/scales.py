"""What a calibration says of each label, and its application; the content of ``calibration.json``.

A calibration is a function of the score that answers report, so that a probability can be derived wherever there are
scores: from a graph, or stored ones. It takes the log-odds of a score between 0 and 1 (of a sigmoid: the logit), and
raw logits as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from avex_serve.errors import BundleError

CALIBRATION: Final = "calibration.json"

Interval = tuple[float, float]  # the central 95 %
Activation = Literal["sigmoid", "softmax", "none"]  # turns logits into scores
EDGE: Final = 2.0**-25  # float32 can't tell apart scores that are closer to 1; so log-odds are at most 17.3


class Missing(Struct, frozen=True, forbid_unknown_fields=True):
    """How many more labelled windows and recordings a calibration needs."""

    with_sound: int = 0  # windows
    without_sound: int = 0  # windows
    recordings: int = 0  # with the sound


class Scale(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From a logit to a probability: sigmoid(slope x logit + offset)."""

    slope: Annotated[float, Meta(gt=0)]
    offset: float
    slope_interval: Interval
    offset_interval: Interval


class Threshold(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a label is detected so that a share `precision` of its detections is right."""

    logit: float  # detected from there on
    logit_interval: Interval
    precision: float  # expected of all windows from there on
    precision_interval: Interval


class LabelCalibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The calibration of one label, or the reason why there is none."""

    label: str
    with_sound: int  # labelled windows
    without_sound: int
    recordings: int  # with the sound
    scale: Scale | None = None
    threshold: Threshold | None = None
    missing: Missing | None = None  # with fewer labels than needed
    reason: str | None = None  # why scale or threshold are absent
    # Where they differ from those of the other labels.
    source: str | None = None
    target_precision: float | None = None


class Calibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The calibrations of a head's labels, in the order of its logits."""

    schema_version: Literal[1] = 1
    target_precision: float
    source: str  # the labels that it was fitted to
    labels: tuple[LabelCalibration, ...]

    def thresholds(self, default: float = 0.0) -> np.ndarray:
        """The lowest logit (C,) float64 that is a detection of each label; `default` where there is no threshold."""
        found = [label.threshold for label in self.labels]
        return np.array([default if threshold is None else threshold.logit for threshold in found])

    def describe(self) -> str:
        """A sentence for a model card."""
        scaled = sum(each.scale is not None for each in self.labels)
        limited = sum(each.threshold is not None for each in self.labels)
        return (
            f"Of {len(self.labels)} labels, {scaled} have a probability, and {limited} a threshold from which on "
            f"{self.target_precision:.0%} of the detections are expected to be right, by {self.source}."
        )

    def write(self, folder: Path) -> None:
        """Write ``calibration.json`` into a folder."""
        (folder / CALIBRATION).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


@dataclass(frozen=True)
class Calibrator:
    """A calibration for the scores of an activation, as arrays."""

    activation: Activation
    slopes: np.ndarray  # (C,) float64; NaN where the label is not calibrated
    offsets: np.ndarray  # (C,), likewise
    lowest: np.ndarray  # (C,) float64, the lowest score of a detection; NaN where the label has no threshold
    places: Mapping[str, int]  # of the labels

    @classmethod
    def of(cls, calibration: Calibration, activation: Activation) -> "Calibrator":
        """The calibration of a head with that activation."""
        scales = [label.scale for label in calibration.labels]
        thresholds = calibration.thresholds(np.nan)
        return cls(
            activation,
            np.array([np.nan if scale is None else scale.slope for scale in scales]),
            np.array([np.nan if scale is None else scale.offset for scale in scales]),
            thresholds if activation == "none" else sigmoid(thresholds),
            {each.label: place for place, each in enumerate(calibration.labels)},
        )

    def thresholds(self) -> dict[str, float]:
        """The lowest score of a detection by label, of the labels that have a threshold."""
        lowest = self.lowest.tolist()
        return {label: lowest[place] for label, place in self.places.items() if not math.isnan(lowest[place])}

    def of_labels(self, labels: Sequence[str], scores: Sequence[float]) -> list[float | None]:
        """The probability of each label with its score; None where it is not calibrated."""
        places = np.array([self.places[label] for label in labels], int)
        found = self.probabilities(np.array(scores, np.float32), places).tolist()
        return [None if math.isnan(probability) else probability for probability in found]

    def probabilities(self, scores: np.ndarray, labels: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Probabilities that the labels are right, float32 of the shape of the scores; NaN where not calibrated.

        Args:
            scores: (..., C) as answers report them, in float32; or those of some labels.
            labels: the index of the label of each score; None: they are those of all labels.
        """
        slopes, offsets = (each if labels is None else each[labels] for each in (self.slopes, self.offsets))
        with np.errstate(over="ignore"):  # a slope of 1e308 is a step
            return sigmoid(slopes * log_odds(scores, self.activation) + offsets).astype(np.float32)


def log_odds(scores: np.ndarray, activation: Activation) -> np.ndarray:
    """What calibrations are fitted to and applied to, float64: log-odds of scores, and raw logits as they are."""
    exact = np.asarray(scores, np.float64)
    if activation == "none":
        return exact
    exact = np.clip(exact, EDGE, 1 - EDGE)
    return np.asarray(np.log(exact) - np.log1p(-exact))


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in a folder, or None if it has none; BundleError for a file that is no calibration."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError(f"{path} is not a calibration: {error}; fit the probe again") from None


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)) without overflow, in float64; NaN for NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(values, np.float64))))
