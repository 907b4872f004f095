"""The answers, as documents that turn into JSON."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Final, Generic, Literal, Protocol, TypeVar

import msgspec
import numpy as np

from avex_serve.calibration.scales import Calibrator
from avex_serve.errors import InputError
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


def detect(spans: np.ndarray, scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[Detection]:
    """The scores that pass, window by window; arguments and errors as of `detect_windows`."""
    return list(chain.from_iterable(detect_windows(spans, scores, labels, selection)))


def detect_windows(
    spans: np.ndarray, scores: np.ndarray, labels: Sequence[str], selection: Selection
) -> Iterator[list[Detection]]:
    """The scores of each window that pass, the highest first.

    Args:
        spans: (N, 2) start and end of each window in seconds.
        scores: (N, C).
        labels: C of them.
        selection: which scores pass; it raises the errors.
    """
    for (start, end), best in zip(spans.tolist(), selection.passing(scores), strict=True):
        yield [Detection(start=start, end=end, label=labels[i], score=score) for i, score in best]


def rank(scores: np.ndarray, labels: Sequence[str], selection: Selection) -> list[list[LabelScore]]:
    """The scores (N, C) that pass, the highest of each row first; arguments and errors as of `detect_windows`."""
    return [[LabelScore(label=labels[i], score=score) for i, score in best] for best in selection.passing(scores)]


# -- probabilities --------------------------------------------------------------------------------------------------

Known = TypeVar("Known", Detection, LabelScore)


def calibrated(found: list[Known], calibrator: Calibrator | None) -> list[Known]:
    """The same with the probability of each; None: the head is not calibrated."""
    if calibrator is not None and found:
        known = calibrator.of_labels([one.label for one in found], [one.score for one in found])
        for one, probability in zip(found, known, strict=True):
            one.probability = probability
    return found


def known(found: Any) -> Any:
    """An answer, or detections, for JSON, which leaves out the probabilities of labels that are not calibrated."""
    for each in _scored(found):
        if each.probability is None:
            each.probability = msgspec.UNSET  # which msgspec doesn't write
    return found


def _scored(found: Any) -> Iterator[Any]:
    if isinstance(found, Detection | LabelScore):
        yield found
    elif isinstance(found, list):
        yield from chain.from_iterable(map(_scored, found))
    elif isinstance(found, Prediction):
        yield from found.detections
    elif isinstance(found, Predictions):
        yield from _scored(found.predictions)
    elif isinstance(found, Classification):
        yield from _scored(found.results)


# -- consecutive windows --------------------------------------------------------------------------------------------

SAME_TIME: Final = 1e-6  # seconds, far less than a sample: two windows touch despite rounding
MergeScore = Literal["max", "mean"]


class Scored(Protocol):
    """A detection, or a row of a table."""

    @property
    def start(self) -> float:
        """Seconds."""
        ...

    @property
    def end(self) -> float:
        """Seconds."""
        ...

    @property
    def score(self) -> float:
        """The higher the surer."""
        ...


One = TypeVar("One", bound=Scored)


@dataclass(slots=True)
class _Joined(Generic[One]):
    """Those of one label that follow one another."""

    first: One
    end: float
    highest: float
    total: float
    count: int = 1


class Merger(Generic[One]):
    """Joins those of one label that are at most a gap apart. They are added in order of their start."""

    def __init__(
        self,
        gap: float,
        score: MergeScore,
        key: Callable[[One], Hashable],
        joined: Callable[[One, float, float], One],
    ) -> None:
        """Join by these rules.

        Args:
            gap: seconds between the end of one and the start of the next.
            score: of those that are joined: the highest or the mean.
            key: what those that may be joined have in common.
            joined: from the first one, the end and the score to the result.

        Raises:
            InputError: a gap that can't be.
        """
        check_gap(gap)
        self._gap = gap
        self._mean = score == "mean"
        self._key = key
        self._result = joined
        self._open: dict[Hashable, _Joined[One]] = {}
        self._all: list[_Joined[One]] = []

    @classmethod
    def of_detections(cls, gap: float, score: MergeScore) -> "Merger[Detection]":
        """One for detections; arguments and errors as of `Merger`."""
        return Merger(gap, score, lambda one: one.label, lambda one, end, best: replace(one, end=end, score=best))

    def add(self, one: One) -> None:
        """Add one that starts no earlier than those before."""
        key = self._key(one)
        into = self._open.get(key)
        if into is None or self._is_over(into, one.start):
            self._open[key] = new = _Joined(one, one.end, one.score, one.score)
            self._all.append(new)
            return
        into.end = max(into.end, one.end)
        into.highest = max(into.highest, one.score)
        into.total += one.score
        into.count += 1

    def take(self, start: float | None = None) -> list[One]:
        """Remove those that nothing from this start on can join, or all, and return them in order of their start."""
        over = [each for each in self._all if start is None or self._is_over(each, start)]
        self._all = [] if start is None else [each for each in self._all if not self._is_over(each, start)]
        return [
            self._result(each.first, each.end, each.total / each.count if self._mean else each.highest)
            for each in over
        ]

    def _is_over(self, joined: _Joined[One], start: float) -> bool:
        return start > joined.end + self._gap + SAME_TIME


def check_gap(gap: float) -> None:
    """Raise InputError for a gap that can't be."""
    if not gap >= 0:
        raise InputError(f"the gap to merge is {gap} s; expected at least 0")
