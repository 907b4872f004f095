"""What the engine answers, as documents that turn into JSON, and how scores become detections."""

import math
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from avex_serve.errors import InputError
from avex_serve.manifest import Activation
from avex_serve.runtime import allowance

STEP: Final = 1000  # labels that are reported in a few milliseconds
# Of memory for each score with its label, and for each number of JSON, until the answer's text is there: measured,
# and rounded up.
SCORE_BYTES: Final = 1024
NUMBER_BYTES: Final = 64

ScoreScale = Literal["sigmoid", "softmax", "logits"]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LabelScore(_Document):
    """A label and its score."""

    label: str
    score: float


class Detection(_Document):
    """A scored label over a span of time."""

    start: float = Field(description="seconds from the beginning of the recording")
    end: float = Field(description="seconds; never after the recording's end")
    label: str
    score: float


class _Origin(_Document):
    bundle: str = Field(description="name of the bundle that answered")
    version: str


class _Answer(_Origin):
    probe: str
    trained: bool = Field(description="False: the head has random weights")


class Prediction(_Answer):
    """What was heard in a recording."""

    duration: float = Field(description="of the recording, in seconds")
    window: float = Field(description="seconds heard at once")
    overlap: float = Field(description="seconds that neighbouring windows share")
    score_scale: ScoreScale = Field(description="what the scores are: sigmoid, softmax or raw logits")
    detections: list[Detection]


class Predictions(_Document):
    """What all probes of a bundle heard in a recording."""

    predictions: list[Prediction]


class Classification(_Answer):
    """What the head says of embeddings, one list an embedding."""

    score_scale: ScoreScale
    results: list[list[LabelScore]]


class Embedding(_Origin):
    """Embeddings of a recording, one a window."""

    output: str = Field(description="which of the bundle's outputs it is")
    duration: float
    window: float
    overlap: float
    spans: list[tuple[float, float]] = Field(description="start and end of each window in seconds")
    embeddings: list[list[float]] | list[list[list[float]]] = Field(
        description="a vector a window; sequences of vectors, of a bundle made for heads that read sequences"
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


class Selection(BaseModel):
    """Which scores are worth reporting: those of at least `threshold`, the best `top_k` of each window, or both.

    Threshold and top-k are independent of each other. If neither is given, the threshold is 0.5 (for raw
    logits 0, which is the same point).
    """

    model_config = ConfigDict(frozen=True)

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
        return cls(threshold=threshold, top_k=top_k)

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
