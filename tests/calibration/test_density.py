"""Call density on simulated seasons with known truth."""

import numpy as np
import pytest

from avex_serve.calibration.density import LEAST, call_density, score_bands
from avex_serve.errors import InputError


def season(rng, windows=4000, sites=6, share=0.05, spread=1.0):
    """Scores, whether windows hold the sound, and their sites; the sound is more common at some sites."""
    site = rng.integers(sites, size=windows)
    odds = share / (1 - share) * np.exp(spread * rng.standard_normal(sites))
    has = rng.random(windows) < (odds / (1 + odds))[site]
    return np.where(has, rng.normal(1.5, 1.2, windows), rng.normal(-1.5, 1.2, windows)), has, site.astype(str)


def reviewed(rng, scores, has, each):
    """Decisions on windows drawn from each band."""
    band = np.searchsorted(score_bands(scores), scores, side="right")
    decisions = np.full(scores.size, -1)
    for i in range(band.max() + 1):
        rows = rng.permutation(np.flatnonzero(band == i))[:each]
        decisions[rows] = has[rows]
    return decisions


@pytest.mark.parametrize(("share", "each"), [(0.005, 15), (0.3, 40)])
def test_intervals_hold_the_truth(share, each):
    seasons, inside, at_sites, errors, widths = 60, 0, [], [], []
    for seed in range(seasons):
        rng = np.random.default_rng(seed)
        scores, has, sites = season(rng, share=share)
        found = call_density(scores, reviewed(rng, scores, has, each), sites, seed=seed)
        inside += found.all.low <= has.mean() <= found.all.high
        at_sites += [d.low <= has[sites == site].mean() <= d.high for site, d in found.sites.items()]
        errors.append(found.all.value - has.mean())
        widths.append(found.all.high - found.all.low)
    assert inside >= 0.9 * seasons
    assert np.mean(at_sites) >= 0.9
    assert abs(np.mean(errors)) < 3 * np.std(errors) / seasons**0.5 + 1e-3, "no bias"
    assert np.mean(widths) < 0.15


def test_bands_halve_what_is_left():
    scores = np.random.default_rng(0).permutation(1024).astype(float)
    edges = score_bands(scores, 4)
    assert np.bincount(np.searchsorted(edges, scores, side="right")).tolist() == [512, 256, 128, 128]
    assert score_bands(scores[:40]).size == 0, "too few windows for two bands"
    assert score_bands(np.zeros(1000)).size == 0
    assert score_bands(np.empty(0)).size == 0


def test_what_is_reviewed_throughout_is_known():
    scores = np.arange(1000.0)
    has = scores >= 900
    found = call_density(scores, has.astype(int), np.where(scores % 2, "a", "b"))
    assert found.all == (0.1, 0.1, 0.1, 1000, 1000, 100)
    assert found.sites["a"][:3] == pytest.approx((0.1, 0.1, 0.1))
    assert sum(band.present for band in found.bands) == 100


def test_a_band_that_nobody_reviewed_may_hold_anything():
    scores = np.arange(1000.0)
    decisions = np.where(scores >= 750, 1, -1)
    found = call_density(scores, decisions)
    assert (found.all.low, found.all.high) == (0.25, 1.0)


def test_few_reviews_are_refused_with_the_number_missing():
    decisions = np.full(100, -1)
    decisions[:3] = 1
    with pytest.raises(InputError, match=f"missing: {LEAST - 3} "):
        call_density(np.arange(100.0), decisions)


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    scores, has, sites = season(rng)
    decisions = reviewed(rng, scores, has, 15)
    assert call_density(scores, decisions, sites, seed=3) == call_density(scores, decisions, sites, seed=3)
