"""What a calibration says of each label, and its application to logits; the content of ``calibration.json``."""

from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from msgspec import Struct

from avex_serve.errors import BundleError

CALIBRATION: Final = "calibration.json"

Interval = tuple[float, float]  # the central 95 %


class Missing(Struct, frozen=True, forbid_unknown_fields=True):
    """How many more labelled windows and recordings a calibration needs."""

    with_sound: int = 0  # windows
    without_sound: int = 0  # windows
    recordings: int = 0  # with the sound


class Scale(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From a logit to a probability: sigmoid(slope x logit + offset)."""

    slope: float
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


class Calibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The calibrations of a head's labels, in the order of its logits."""

    schema_version: Literal[1] = 1
    target_precision: float
    source: str  # the labels that it was fitted to
    labels: tuple[LabelCalibration, ...]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities (..., C) float32 of logits (..., C); NaN for labels without a calibration."""
        scales = [label.scale for label in self.labels]
        slopes = np.array([np.nan if scale is None else scale.slope for scale in scales])
        offsets = np.array([np.nan if scale is None else scale.offset for scale in scales])
        return sigmoid(logits * slopes + offsets).astype(np.float32)

    def thresholds(self, default: float = 0.0) -> np.ndarray:
        """The lowest logit (C,) float64 that is a detection of each label; `default` where there is no threshold."""
        found = [label.threshold for label in self.labels]
        return np.array([default if threshold is None else threshold.logit for threshold in found])

    def write(self, folder: Path) -> None:
        """Write ``calibration.json`` into a folder."""
        (folder / CALIBRATION).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


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
