"""The answers, as documents that turn into JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np

from avex_serve.inference.scores import ScoreScale, Selection

NUMBER_BYTES: Final = 80  # memory for each number of JSON, until the answer's text is made; measured, rounded up


def _described(description: str) -> dict[str, str]:
    """The description of a field in the OpenAPI document."""
    return {"description": description}


def _warnings() -> Any:
    """The field of an answer with the reasons to doubt it."""
    return field(default=(), metadata=_described("reasons to doubt the answer, a sentence each; usually none"))


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

    start: float = field(metadata=_described("seconds from the beginning of the recording"))
    end: float = field(metadata=_described("seconds; never after the recording's end"))
    label: str
    score: float


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


def detect(spans: np.ndarray, scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[Detection]:
    """The scores that pass, window by window, the highest of each window first.

    Args:
        spans: (N, 2) start and end of each window in seconds.
        scores: (N, C).
        labels: C of them.
        selection: which scores pass; it raises the errors.
    """
    return [
        Detection(start=start, end=end, label=labels[i], score=score)
        for (start, end), best in zip(spans.tolist(), selection.passing(scores), strict=True)
        for i, score in best
    ]


def rank(scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[list[LabelScore]]:
    """The scores (N, C) that pass, the highest of each row first; arguments and errors as of `detect`."""
    return [[LabelScore(label=labels[i], score=score) for i, score in best] for best in selection.passing(scores)]
