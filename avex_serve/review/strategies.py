"""In which order candidates are reviewed: a function of numpy arrays for each strategy.

A candidate is a window that a label may be in. A strategy orders the candidates of one label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from avex_serve.calibration.density import score_bands
from avex_serve.errors import InputError

BANDS: Final = 10  # of scores
SECONDS_OF_DAY: Final = 86400


@dataclass(frozen=True)
class Candidates:
    """Candidates of one label, as columns of the same length."""

    score: np.ndarray  # (N,) float; NaN: unknown
    recording: np.ndarray  # (N,) int
    site: np.ndarray  # (N,) int
    time: np.ndarray  # (N,) float64, seconds of the recorder's clock since 1970; NaN: unknown
    start: np.ndarray  # (N,) float64, seconds from the start of the recording
    middle: float = 0.5  # the score at which the label is as likely as not
    similarity: np.ndarray | None = None  # (N,) cosine of the embedding and the example's

    @property
    def size(self) -> int:
        """How many they are."""
        return int(self.score.size)

    @property
    def date(self) -> np.ndarray:
        """(N,) days since 1970; -1: unknown."""
        return np.where(np.isfinite(self.time), _whole(self.time) // SECONDS_OF_DAY, -1)

    @property
    def hour(self) -> np.ndarray:
        """(N,) hour of the day; -1: unknown."""
        return np.where(np.isfinite(self.time), _whole(self.time) // 3600 % 24, -1)


Order = Callable[[Candidates, np.random.Generator], np.ndarray]  # (N,) indices, the first to review first


def arrange(candidates: Candidates, strategy: str, seed: int = 0) -> np.ndarray:
    """The order (N,) in which to review candidates, as indices.

    Args:
        candidates: of one label.
        strategy: a name in `STRATEGIES`.
        seed: of all random choices.

    Raises:
        InputError: no such strategy, or one that needs an example and has none.
    """
    found = STRATEGIES.get(strategy)
    if found is None:
        raise InputError(f"no strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if found is _nearest and candidates.similarity is None:
        raise InputError(f"the strategy {strategy} needs an example: a window whose embedding is stored")
    return found(candidates, np.random.default_rng(seed))


def keep_first(groups: np.ndarray, order: np.ndarray, limit: int) -> np.ndarray:
    """The order without what exceeds `limit` candidates of a group; `groups` (N,) int."""
    return np.asarray(order[_turns(groups[order]) < limit])


def _whole(values: np.ndarray) -> np.ndarray:
    """Values (N,) rounded down, as integers; -1 for NaN."""
    return np.floor(np.where(np.isfinite(values), values, -1)).astype(np.int64)


def _highest(candidates: Candidates, _: np.random.Generator) -> np.ndarray:
    return np.argsort(-candidates.score, kind="stable")  # unknown scores last


def _lowest(candidates: Candidates, _: np.random.Generator) -> np.ndarray:
    return np.argsort(candidates.score, kind="stable")


def _chronological(candidates: Candidates, _: np.random.Generator) -> np.ndarray:
    return np.lexsort((candidates.start, candidates.recording, candidates.time))


def _random(candidates: Candidates, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(candidates.size)


def _margin(candidates: Candidates, _: np.random.Generator) -> np.ndarray:
    return np.argsort(np.abs(candidates.score - candidates.middle), kind="stable")


def _nearest(candidates: Candidates, _: np.random.Generator) -> np.ndarray:
    assert candidates.similarity is not None
    return np.argsort(-candidates.similarity, kind="stable")


def _bands(candidates: Candidates) -> np.ndarray:
    """Bands of equal width from the lowest to the highest score; -1: unknown."""
    known = np.isfinite(candidates.score)
    if not known.any():
        return np.full(candidates.size, -1)
    low, high = candidates.score[known].min(), candidates.score[known].max()
    width = (high - low) / BANDS or 1.0
    return np.asarray(np.minimum(_whole((candidates.score - low) / width), BANDS - 1))


def _quantiles(candidates: Candidates) -> np.ndarray:
    """Bands of equal numbers of candidates."""
    rank = np.empty(candidates.size, np.int64)
    rank[_lowest(candidates, np.random.default_rng())] = np.arange(candidates.size)
    return rank * BANDS // max(1, candidates.size)


def _halves(candidates: Candidates) -> np.ndarray:
    """The bands of `avex_serve.calibration.density`."""
    edges = score_bands(candidates.score[np.isfinite(candidates.score)])
    return np.asarray(np.searchsorted(edges, candidates.score, side="right"))


def _everywhere(candidates: Candidates) -> np.ndarray:
    """Combinations of site, date and hour."""
    moment = (candidates.date + 1) * 25 + candidates.hour + 1
    return np.asarray(candidates.site * (moment.max(initial=0) + 1) + moment)


def _best_of(group: Callable[[Candidates], np.ndarray]) -> Order:
    """The best of each group, then the second best of each, and so on."""
    return lambda candidates, rng: _in_turn(group(candidates), _highest(candidates, rng))


def _some_of(group: Callable[[Candidates], np.ndarray]) -> Order:
    """One at random of each group, then another of each, and so on."""
    return lambda candidates, rng: _in_turn(group(candidates), _random(candidates, rng))


def _in_turn(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.asarray(order[_sorted(_turns(groups[order]))])


def _turns(groups: np.ndarray) -> np.ndarray:
    """How many of the same group are in front of each, (N,)."""
    by_group = _sorted(groups)
    ordered = groups[by_group]
    first = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    counts = np.diff(np.append(first, ordered.size))
    turns = np.empty(groups.size, np.int64)
    turns[by_group] = np.arange(groups.size) - np.repeat(first, counts)
    return turns


def _sorted(values: np.ndarray) -> np.ndarray:
    """The order of whole numbers (N,), equals as they are; numpy is several times faster with 16 bits."""
    lowest = values.min(initial=0)
    small = values.max(initial=0) - lowest < 2**16
    return np.argsort((values - lowest).astype(np.uint16) if small else values, kind="stable")


STRATEGIES: Final[dict[str, Order]] = {
    "highest": _highest,
    "lowest": _lowest,
    "margin": _margin,
    "chronological": _chronological,
    "random": _random,
    "bands": _some_of(_bands),
    "quantiles": _some_of(_quantiles),
    "density": _some_of(_halves),
    "recordings": _best_of(lambda each: each.recording),
    "sites": _best_of(lambda each: each.site),
    "dates": _best_of(lambda each: each.date),
    "hours": _best_of(lambda each: each.hour),
    "any-site": _some_of(lambda each: each.site),
    "any-date": _some_of(lambda each: each.date),
    "any-hour": _some_of(lambda each: each.hour),
    "everywhere": _some_of(_everywhere),
    "nearest": _nearest,
}
