"""Call density: the share of windows that hold a sound, from reviewed windows of every band of scores.

Needs numpy alone. Method: Navine et al. 2024 (doi 10.3389/fbirs.2024.1380636). Windows are sorted into bands by
score, and some windows of each band are reviewed. The density is the mean of the bands' shares of windows with the
sound, weighted by the bands' windows. No threshold has a part in it, so missed sounds count too.

The interval is of these windows, not of other seasons: reviewed windows are known, and the others follow the share
of their band, whose interval is Jeffreys'. Intervals of bands are joined by the method of variance estimates
recovery (Zou & Donner 2008, doi 10.1002/sim.3095).

At a site where the sound is more common than elsewhere, every band holds more of it: all its odds are those of all
sites times one factor. Factors are log-normal, with a deviation that the reviews of all sites say.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from avex_serve.calibration.scales import sigmoid
from avex_serve.errors import InputError

BANDS: Final = 8
LEAST: Final = 10  # reviewed windows of a label, without which nothing is estimated
DRAWS: Final = 2000
_ENDS: Final = (0.025, 0.975)  # of the intervals of 95 %
_SMALLEST: Final = 30  # windows of the highest band
_PRIOR: Final = 0.5  # Jeffreys
_FACTORS: Final = np.linspace(-4, 4, 65)  # logarithms of the factors of sites
_DEVIATIONS: Final = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0])  # of these


class Density(NamedTuple):
    """The share of windows with a sound, with its interval of 95 %."""

    value: float
    low: float
    high: float
    windows: int
    reviewed: int  # windows with a decision
    present: int  # of these, with the sound


class Band(NamedTuple):
    """A band of scores, from `low` on and below `high`."""

    low: float
    high: float
    windows: int
    reviewed: int
    present: int


class Densities(NamedTuple):
    """The call density of one label."""

    all: Density
    sites: dict[str, Density]
    bands: tuple[Band, ...]


def score_bands(scores: np.ndarray, bands: int = BANDS) -> np.ndarray:
    """Edges between bands of scores: the lowest band has half of the windows, the next half of the rest, and so on.

    Draw the windows to review from these bands: rare sounds have high scores, where bands are narrow.

    Args:
        scores: (N,).
        bands: most bands; fewer if the highest would have less than `_SMALLEST` windows, or for equal scores.

    Returns:
        (B - 1,) increasing; a score is in the band of `np.searchsorted(edges, score, side="right")`.
    """
    halves = int(np.log2(max(1.0, scores.size / _SMALLEST)))
    shares = 1 - 0.5 ** np.arange(1, min(bands - 1, halves) + 1)
    edges = np.unique(np.quantile(scores, shares)) if scores.size and shares.size else np.empty(0)
    return np.asarray(edges[edges > scores.min(initial=np.inf)])


def call_density(
    scores: np.ndarray,
    decisions: np.ndarray,
    sites: Sequence[str] | np.ndarray | None = None,
    *,
    bands: int = BANDS,
    seed: int = 0,
) -> Densities:
    """The call density of a label, in all windows and at each site.

    Args:
        scores: (N,) of all windows.
        decisions: (N,) 1 present, 0 absent, -1 not reviewed or unsure. Within a band of `score_bands`, the reviewed
            windows must be drawn without regard to anything else.
        sites: (N,) name of each window's site; None: one site.
        bands: see `score_bands`.
        seed: of the draws.

    Raises:
        InputError: fewer than `LEAST` reviewed windows.
    """
    missing = LEAST - int((decisions >= 0).sum())
    if missing > 0:
        raise InputError(f"too few reviewed windows; missing: {missing} (with present or absent)")
    rng = np.random.default_rng(seed)
    edges = score_bands(scores, bands)
    band = np.searchsorted(edges, scores, side="right")
    count = edges.size + 1
    counts = windows, reviewed, present = _counts(band, decisions, count)
    shares = _shares(reviewed, present)
    limits = [-np.inf, *map(float, edges), np.inf]
    parts = zip(limits, limits[1:], windows.tolist(), reviewed.tolist(), present.tolist(), strict=False)
    return Densities(
        all=_in_all(shares, counts, rng),
        sites={} if sites is None else _by_site(np.asarray(sites), band, decisions, shares, rng),
        bands=tuple(Band(*part) for part in parts),
    )


def _in_all(shares: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Density:
    """From shares of bands (B,) and counts (3, B)."""
    windows, reviewed, present = counts
    left = windows - reviewed
    likely = rng.beta(present + _PRIOR, reviewed - present + _PRIOR, size=(DRAWS, left.size))
    low, high = np.quantile(rng.binomial(left, likely), _ENDS, axis=0)
    low = np.where(present == 0, 0, low)  # a band without any sound, or with nothing else, may be so throughout
    high = np.where(present == reviewed, left, high)
    expected = left * shares
    blank = reviewed == 0  # anything may be in them
    down, up = (np.maximum(each, 0) for each in (expected - low, high - expected))
    down, up = (np.sqrt(np.square(each[~blank]).sum()) + each[blank].sum() for each in (down, up))
    return _density(expected.sum(), expected.sum() - down, expected.sum() + up, counts)


def _by_site(
    sites: np.ndarray, band: np.ndarray, decisions: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> dict[str, Density]:
    names, member = np.unique(sites, return_inverse=True)
    counts = np.array([_counts(band[member == i], decisions[member == i], shares.size) for i in range(names.size)])
    reviewed, present = counts[:, 1], counts[:, 2]  # (S, B)
    pooled = (present.sum(axis=0) + _PRIOR) / (reviewed.sum(axis=0) + 2 * _PRIOR)
    z = _log_odds(pooled) + _FACTORS[:, None]  # (F, B)
    log = present @ -np.logaddexp(0, -z).T + (reviewed - present) @ -np.logaddexp(0, z).T  # (S, F)
    prior = -np.square(_FACTORS / _DEVIATIONS[:, None]) / 2  # (V, F)
    prior -= np.log(np.exp(prior).sum(axis=1, keepdims=True))
    joint = log[:, None] + prior  # (S, V, F)
    evidence = np.logaddexp.reduce(joint, axis=2)  # (S, V)
    deviations = _normal(evidence.sum(axis=0))
    factors = _normal(joint - evidence[..., None], axis=2) * deviations[:, None]
    ends = [_draw(reviewed.sum(axis=0), present.sum(axis=0), end, rng) for end in (0, 1)]  # (draws, B) each
    found = {}
    for i, name in enumerate(names.tolist()):
        left = counts[i, 0] - counts[i, 1]
        weights = factors[i].sum(axis=0)
        expected = left @ (weights @ sigmoid(_log_odds(shares) + _FACTORS[:, None]))
        drawn = rng.choice(_FACTORS, size=(DRAWS, 1), p=weights)
        totals = [rng.binomial(left, sigmoid(_log_odds(each) + drawn)).sum(axis=1) for each in ends]
        low, high = (np.quantile(total, end) for total, end in zip(totals, _ENDS, strict=True))
        found[str(name)] = _density(expected, min(low, expected), max(high, expected), counts[i])
    return found


def _draw(reviewed: np.ndarray, present: np.ndarray, end: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of bands (draws, B) whose quantiles are the lower (0) or upper (1) ends of Clopper & Pearson."""
    shape = (DRAWS, reviewed.size)
    return rng.beta(np.maximum(present + end, 1e-9), np.maximum(reviewed - present + 1 - end, 1e-9), size=shape)


def _density(expected: float, low: float, high: float, counts: np.ndarray) -> Density:
    """From sounds in windows that nobody reviewed, and the counts (3, B)."""
    windows, reviewed, present = (int(each.sum()) for each in counts)
    ends = (min(max(each, 0), windows - reviewed) for each in (expected, low, high))
    value, least, most = (float(present + each) / windows for each in ends)
    return Density(value, least, most, windows, reviewed, present)


def _counts(band: np.ndarray, decisions: np.ndarray, bands: int) -> np.ndarray:
    """(3, B) windows, reviewed windows, and those with the sound."""
    rows = (np.ones(band.size, bool), decisions >= 0, decisions == 1)
    return np.array([np.bincount(band[each], minlength=bands) for each in rows])


def _shares(reviewed: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Share of windows with the sound by band (B,); between its neighbours for a band without reviews."""
    known = np.flatnonzero(reviewed)
    return np.asarray(np.interp(np.arange(reviewed.size), known, present[known] / reviewed[known]))


def _normal(log: np.ndarray, axis: int = 0) -> np.ndarray:
    """Probabilities from their logarithms, up to a constant."""
    weights = np.exp(log - log.max(axis=axis, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axis, keepdims=True))


def _log_odds(shares: np.ndarray) -> np.ndarray:
    inside = np.clip(shares, 1e-12, 1 - 1e-12)
    return np.asarray(np.log(inside) - np.log1p(-inside))
