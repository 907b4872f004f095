"""The answers, as documents that turn into JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec
import numpy as np

from avex_serve.calibration.scales import Calibrator
from avex_serve.inference.scores import ScoreScale, Selection

NUMBER_BYTES: Final = 80  # memory for each number of JSON, until the answer's text is made; measured, rounded up


def _described(description: str) -> dict[str, str]:
    """The description of a field in the OpenAPI document."""
    return {"description": description}


def _warnings() -> Any:
    """The field of an answer with the reasons to doubt it."""
    return field(default=(), metadata=_described("reasons to doubt the answer, a sentence each; usually none"))


def _probability() -> Any:
    """The field of a score with its probability."""
    described = "that the label is right, of a calibrated label; others have none, and JSON leaves it out"
    return field(default=None, metadata=_described(described))


@dataclass(kw_only=True, slots=True)
class _Document:
    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for the OpenAPI document: there are no other fields


@dataclass(kw_only=True, slots=True)
class LabelScore(_Document):
    """A label and its score."""

    label: str
    score: float
    probability: float | None = _probability()


@dataclass(kw_only=True, slots=True)
class Detection(_Document):
    """A scored label over a span of time."""

    start: float = field(metadata=_described("seconds from the beginning of the recording"))
    end: float = field(metadata=_described("seconds; never after the recording's end"))
    label: str
    score: float
    probability: float | None = _probability()


@dataclass(kw_only=True, slots=True)
class _Origin(_Document):
    bundle: str = field(metadata=_described("name of the bundle that answered"))
    version: str


@dataclass(kw_only=True, slots=True)
class _Answer(_Origin):
    probe: str
    trained: bool = field(metadata=_described("False: the head has random weights"))


@dataclass(kw_only=True, slots=True)
class Prediction(_Answer):
    """The sounds that a head finds in a recording."""

    duration: float = field(metadata=_described("of the recording, in seconds"))
    window: float = field(metadata=_described("length of a window in seconds"))
    overlap: float = field(metadata=_described("seconds that neighbouring windows share"))
    score_scale: ScoreScale = field(metadata=_described("what the scores are: sigmoid, softmax or raw logits"))
    warnings: tuple[str, ...] = _warnings()
    detections: list[Detection]


@dataclass(kw_only=True, slots=True)
class Predictions(_Document):
    """The sounds that all heads of a bundle find in a recording."""

    predictions: list[Prediction]


@dataclass(kw_only=True, slots=True)
class Classification(_Answer):
    """The scores of a head for embeddings, one list an embedding."""

    score_scale: ScoreScale
    warnings: tuple[str, ...] = _warnings()
    results: list[list[LabelScore]]


@dataclass(kw_only=True, slots=True)
class Embedding(_Origin):
    """Embeddings of a recording, one a window."""

    output: str = field(metadata=_described("name of the embedding among the outputs of the bundle"))
    duration: float
    window: float
    overlap: float
    warnings: tuple[str, ...] = _warnings()
    spans: list[tuple[float, float]] = field(metadata=_described("start and end of each window in seconds"))
    embeddings: list[list[float]] | list[list[list[float]]] = field(
        metadata=_described(
            "a vector for each window, or a sequence of vectors from a bundle for heads that read sequences"
        )
    )


def detect(
    spans: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    selection: Selection,
    calibrator: Calibrator | None = None,
) -> list[Detection]:
    """The scores that pass, window by window, the highest of each window first.

    Args:
        spans: (N, 2) start and end of each window in seconds.
        scores: (N, C).
        labels: C of them.
        selection: which scores pass; it raises the errors.
        calibrator: of the head; None: it is not calibrated.
    """
    return [
        Detection(start=start, end=end, label=labels[i], score=score, probability=probability)
        for (start, end), best in zip(spans.tolist(), selection.passing(scores), strict=True)
        for i, score, probability in _calibrated(best, calibrator)
    ]


def rank(
    scores: np.ndarray, labels: Sequence[str], selection: Selection, calibrator: Calibrator | None = None
) -> list[list[LabelScore]]:
    """The scores (N, C) that pass, the highest of each row first; arguments and errors as of `detect`."""
    return [
        [LabelScore(label=labels[i], score=s, probability=p) for i, s, p in _calibrated(best, calibrator)]
        for best in selection.passing(scores)
    ]


def known(answer: Any) -> Any:
    """The answer for JSON, which leaves out the probabilities of labels that are not calibrated."""
    for each in _scored(answer):
        if each.probability is None:
            each.probability = msgspec.UNSET  # which msgspec doesn't write
    return answer


def _calibrated(
    best: list[tuple[int, float]], calibrator: Calibrator | None
) -> Iterator[tuple[int, float, float | None]]:
    """Index and score of labels of a window, and the probability of each."""
    if calibrator is None or not best:
        return ((i, score, None) for i, score in best)
    places, scores = zip(*best, strict=True)
    found = calibrator.probabilities(np.array(scores, np.float32), np.array(places)).tolist()
    return ((i, score, None if math.isnan(p) else p) for (i, score), p in zip(best, found, strict=True))


def _scored(answer: Any) -> Iterator[Any]:
    if isinstance(answer, Predictions):
        for prediction in answer.predictions:
            yield from prediction.detections
    elif isinstance(answer, Prediction):
        yield from answer.detections
    elif isinstance(answer, Classification):
        for row in answer.results:
            yield from row
