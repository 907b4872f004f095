"""Two reports on the same recordings, side by side. Needs no torch.

The differences have intervals from a paired bootstrap: groups of recordings are resampled, and both heads are
evaluated on the same resample. What makes a recording easy or hard is in both, so differences are known better than
the figures.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from avex_serve.errors import InputError, NotFoundError
from avex_serve.training.metrics import interval
from avex_serve.training.report import (
    EVALUATION,
    FIGURES,
    Predictions,
    figures_of,
    leaks,
    mean,
    read_evaluation,
    resampled,
    resamples_of,
)
from avex_serve.training.scores import SCORES, Scores, read_scores


class Difference(Struct, frozen=True, kw_only=True):
    """A figure of both reports; null where one has no value."""

    a: float | None
    b: float | None
    difference: float | None  # b - a
    low: float | None  # the interval of 95 % of the difference
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Comparison(Struct, frozen=True, kw_only=True):
    """Two reports side by side."""

    schema_version: int = 1
    a: str
    b: str
    recordings: int
    groups: int
    windows: tuple[int, int]  # differ where the models take windows of different lengths
    macro: dict[str, Difference]  # by name of a figure
    labels: dict[str, dict[str, Difference]]
    notes: tuple[str, ...]


class _Side(NamedTuple):
    """One of the reports, with the labels that both have."""

    name: str
    scores: Scores
    targets: np.ndarray  # (N, C)
    predictions: Predictions


def compare_reports(first: Path, second: Path, seed: int = 0, *, shared: bool = False) -> Comparison:
    """Compare two reports.

    Args:
        first: folder of a report, or its `evaluation.json`.
        second: another one, on the same recordings.
        seed: of the resampling.
        shared: compare only the recordings that both are about, in place of an error.

    Raises:
        NotFoundError: not a report, or one of which nothing was evaluated.
        InputError: reports of different recordings, labels or groups.
    """
    names, scores, seen = zip(*(_read(path) for path in (first, second)), strict=True)
    if shared:
        both = np.intersect1d(*(each.recordings for each in scores))
        scores = tuple(_of_recordings(each, both) for each in scores)
    labels = [label for label in scores[0].labels if label in scores[1].labels]
    if not labels:
        raise InputError(f"the reports have no label in common: {names[0]} has {', '.join(scores[0].labels[:5])} …")
    groups = _check_same(names, scores)
    sides = [_side(name, each, labels) for name, each in zip(names, scores, strict=True)]
    notes = _notes(sides, labels)
    values = [figures_of(side.predictions, side.targets, np.ones((1, len(side.targets))))[..., 0] for side in sides]
    count = resamples_of(max(len(side.targets) for side in sides))
    # The groups are the same, so each side meets the same resamples of them.
    drawn = [resampled(side.predictions, side.targets, side.scores.groups, seed, count) for side in sides]
    return Comparison(
        a=names[0],
        b=names[1],
        recordings=np.unique(scores[0].recordings).size,
        groups=groups.size,
        windows=(len(sides[0].targets), len(sides[1].targets)),
        macro=_differences([_mean_of(each) for each in values], [_mean_of(each) for each in drawn]),
        labels={
            label: _differences([each[:, i] for each in values], [each[:, i] for each in drawn])
            for i, label in enumerate(labels)
        },
        notes=(*itertools.chain(*seen), *notes),
    )


def table(comparison: Comparison) -> str:
    """The figures for a terminal; `*` where the interval of the difference leaves out 0."""
    lines = [
        f"A: {comparison.a}",
        f"B: {comparison.b}",
        f"{comparison.recordings} recordings in {comparison.groups} groups; differences B - A with 95 % intervals, "
        "paired over groups; * where these leave out 0",
        "",
        f"{'mean of labels':28} {'A':>7} {'B':>7}  B - A",
    ]
    lines += [f"{name.replace('_', ' ')[:28]:28} {_row(each)}" for name, each in comparison.macro.items()]
    lines += ["", f"{'average precision':28} {'A':>7} {'B':>7}  B - A"]
    lines += [f"{label[:28]:28} {_row(found['average_precision'])}" for label, found in comparison.labels.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in comparison.notes)])


# -- parts --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[str, Scores, list[str]]:
    folder = path.parent if path.name == EVALUATION else path
    evaluation = read_evaluation(folder)
    if evaluation is None:
        raise NotFoundError(f"{folder} holds no {EVALUATION}; expected the folder of a report")
    name = f"{path} ({evaluation.probe} on {evaluation.model})"
    return name, read_scores(folder / SCORES), [f"{name}: {leak}" for leak in leaks(evaluation)]


def _of_recordings(scores: Scores, recordings: np.ndarray) -> Scores:
    kept = np.isin(scores.recordings, recordings)
    predictions = Predictions(np.arange(kept.sum()), *(each[kept] for each in scores.predictions[1:]))
    return scores._replace(
        recordings=scores.recordings[kept],
        groups=scores.groups[kept],
        spans=scores.spans[kept],
        targets=scores.targets[kept],
        predictions=predictions,
    )


def _check_same(names: Sequence[str], scores: Sequence[Scores]) -> np.ndarray:
    """The groups of both reports; InputError if they are not about the same recordings."""
    recordings = [set(each.recordings.tolist()) for each in scores]
    if recordings[0] != recordings[1]:
        raise InputError(
            f"the reports are about different recordings: {len(recordings[0] - recordings[1])} are only in "
            f"{names[0]}, {len(recordings[1] - recordings[0])} only in {names[1]}; evaluate both on the same data, "
            "with the same split"
        )
    pairs = [set(zip(each.recordings.tolist(), each.groups.tolist(), strict=True)) for each in scores]
    if pairs[0] != pairs[1]:
        raise InputError("the reports group their recordings differently; evaluate both with the same --group-by")
    return np.unique(scores[0].groups)


def _side(name: str, scores: Scores, labels: Sequence[str]) -> _Side:
    columns = [scores.labels.index(label) for label in labels]
    joined = scores.predictions
    chosen = Predictions(joined.rows, *(each[:, columns] for each in joined[1:]))
    return _Side(name, scores, scores.targets[:, columns], chosen)


def _notes(sides: Sequence[_Side], labels: Sequence[str]) -> tuple[str, ...]:
    """What the figures don't show; InputError if the same windows have other labels."""
    notes = []
    for one, other in (sides, sides[::-1]):
        left_out = [label for label in one.scores.labels if label not in labels]
        if left_out:
            notes.append(f"left out, since {other.name} lacks them: {', '.join(left_out)}")
    windows = [_by_window(side) for side in sides]
    shared = windows[0].keys() & windows[1].keys()
    differing = sum(not np.array_equal(windows[0][key], windows[1][key]) for key in shared)
    if differing:
        raise InputError(
            f"{differing} of {len(shared)} windows have other labels in the two reports; evaluate both on the same "
            "labels"
        )
    if len(shared) < max(map(len, windows)):
        notes.append(
            "the reports have windows of different places or lengths; recordings are paired, windows are not"
        )
    return tuple(notes)


def _by_window(side: _Side) -> dict[tuple[str, float, float], np.ndarray]:
    starts, ends = np.round(side.scores.spans, 6).T.tolist()
    return dict(zip(zip(side.scores.recordings.tolist(), starts, ends, strict=True), side.targets, strict=True))


def _mean_of(figures: np.ndarray) -> np.ndarray:
    """Means over labels (metrics, ...) of figures (metrics, C, ...)."""
    return np.stack([mean(each) for each in figures])


def _differences(values: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> dict[str, Difference]:
    found = {}
    for i, name in enumerate(FIGURES):
        low, high = interval(drawn[1][i] - drawn[0][i])
        numbers = (values[0][i], values[1][i], values[1][i] - values[0][i], low, high)
        a, b, difference, low_, high_ = (float(each) if np.isfinite(each) else None for each in numbers)
        known = difference is not None
        found[name] = Difference(
            a=a, b=b, difference=difference, low=low_ if known else None, high=high_ if known else None
        )
    return found


def _row(each: Difference) -> str:
    numbers = " ".join(f"{'–' if value is None else f'{value:.3f}':>7}" for value in (each.a, each.b))
    if each.difference is None or each.low is None or each.high is None:
        return f"{numbers}  –"
    return f"{numbers}  {each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f}){' *' if each.sure else ''}"
