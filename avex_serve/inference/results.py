"""What the engine answers, as documents that turn into JSON, and how scores become detections."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

import numpy as np

from avex_serve.bundles.manifest import Activation
from avex_serve.errors import InputError
from avex_serve.scheduling import allowance

STEP: Final = 1000  # labels that are reported in a few milliseconds
# Of memory for each score with its label, and for each number of JSON, until the answer's text is there: measured,
# and rounded up.
SCORE_BYTES: Final = 512
NUMBER_BYTES: Final = 80

ScoreScale = Literal["sigmoid", "softmax", "logits"]


def _told(description: str) -> dict[str, str]:
    """What the OpenAPI document says of a field."""
    return {"description": description}


@dataclass(kw_only=True, slots=True)
class _Document:
    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for the OpenAPI document: there are no other fields


@dataclass(kw_only=True, slots=True)
class LabelScore(_Document):
    """A label and its score."""

    label: str
    score: float


@dataclass(kw_only=True, slots=True)
class Detection(_Document):
    """A scored label over a span of time."""

    start: float = field(metadata=_told("seconds from the beginning of the recording"))
    end: float = field(metadata=_told("seconds; never after the recording's end"))
    label: str
    score: float


@dataclass(kw_only=True, slots=True)
class _Origin(_Document):
    bundle: str = field(metadata=_told("name of the bundle that answered"))
    version: str


@dataclass(kw_only=True, slots=True)
class _Answer(_Origin):
    probe: str
    trained: bool = field(metadata=_told("False: the head has random weights"))


@dataclass(kw_only=True, slots=True)
class Prediction(_Answer):
    """What was heard in a recording."""

    duration: float = field(metadata=_told("of the recording, in seconds"))
    window: float = field(metadata=_told("seconds heard at once"))
    overlap: float = field(metadata=_told("seconds that neighbouring windows share"))
    score_scale: ScoreScale = field(metadata=_told("what the scores are: sigmoid, softmax or raw logits"))
    detections: list[Detection]


@dataclass(kw_only=True, slots=True)
class Predictions(_Document):
    """What all probes of a bundle heard in a recording."""

    predictions: list[Prediction]


@dataclass(kw_only=True, slots=True)
class Classification(_Answer):
    """What the head says of embeddings, one list an embedding."""

    score_scale: ScoreScale
    results: list[list[LabelScore]]


@dataclass(kw_only=True, slots=True)
class Embedding(_Origin):
    """Embeddings of a recording, one a window."""

    output: str = field(metadata=_told("which of the bundle's outputs it is"))
    duration: float
    window: float
    overlap: float
    spans: list[tuple[float, float]] = field(metadata=_told("start and end of each window in seconds"))
    embeddings: list[list[float]] | list[list[list[float]]] = field(
        metadata=_told("a vector a window; sequences of vectors, of a bundle made for heads that read sequences")
    )


def score_scale(activation: Activation) -> ScoreScale:
    """The name of the scale that an activation yields."""
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
    """Which scores are worth reporting: those of at least `threshold`, the best `top_k` of each window, or both.

    Threshold and top-k are independent of each other. If neither is given, the threshold is 0.5 (for raw
    logits 0, which is the same point).
    """

    threshold: float
    top_k: int | None

    @classmethod
    def of(cls, scale: ScoreScale, threshold: float | None, top_k: int | None) -> "Selection":
        """The selection for what a user gave; InputError for values that make no sense."""
        if threshold is not None and not math.isfinite(threshold):
            raise InputError(f"threshold is {threshold}; expected a finite number")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}; expected at least 1")
        if threshold is None:
            default = 0.0 if scale == "logits" else 0.5
            threshold = default if top_k is None else -math.inf
        return cls(threshold, top_k)

    def best(self, scores: np.ndarray) -> list[int]:
        """Indices into scores (C,) that pass, the highest first and equals in the order of the labels."""
        order = np.argsort(-scores, kind="stable")[: self.top_k]
        # As float64, so that no reported score is below the threshold by a float32's rounding.
        return [int(index) for index in order if float(scores[index]) >= self.threshold]

    def count(self, scores: np.ndarray) -> int:
        """How many of the scores (N, C) pass."""
        passing = np.count_nonzero(scores >= np.float64(self.threshold), axis=-1)
        return int((passing if self.top_k is None else np.minimum(passing, self.top_k)).sum())


def detect(spans: np.ndarray, scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[Detection]:
    """The scores that pass, window by window, the highest of each first.

    Args:
        spans: (N, 2) start and end of each window in seconds.
        scores: (N, C).
        labels: C of them.
        selection: which scores pass.

    Raises:
        TooLargeError: more of them than the current allowance has it.
        ClientGoneError, DeadlineError: nobody waits for them any more.
    """
    return [
        Detection(start=start, end=end, label=labels[i], score=score)
        for (start, end), best in zip(spans.tolist(), _passing(scores, selection), strict=True)
        for i, score in best
    ]


def rank(scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[list[LabelScore]]:
    """The scores (N, C) that pass, the highest of each row first; arguments and errors as of `detect`."""
    return [[LabelScore(label=labels[i], score=score) for i, score in best] for best in _passing(scores, selection)]


def _passing(scores: np.ndarray, selection: Selection) -> Iterator[list[tuple[int, float]]]:
    """Index and value of the scores that pass, row by row."""
    granted = allowance.current()
    granted.extend_answer(
        SCORE_BYTES * selection.count(scores),
        "raise threshold or lower top_k to report fewer labels, or send the recording in pieces",
    )
    made = 0
    for row in scores:
        if made >= STEP:  # not before: an answer of a few lines isn't worth another turn
            granted.checkpoint()
            made = 0
        best = [(index, float(row[index])) for index in selection.best(row)]
        made += len(best)
        yield best
