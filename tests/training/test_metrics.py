"""Metrics equal scikit-learn's, and intervals hold what they promise."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from avex_serve.training import metrics

PAIRS = {
    "average_precision": oracle.average_precision_score,
    "auroc": oracle.roc_auc_score,
}
DECISIONS = {"precision": oracle.precision_score, "recall": oracle.recall_score, "f1": oracle.f1_score}


def example(seed, ties):
    rng = np.random.default_rng(seed)
    targets = (rng.random(200) < 0.2).astype(int)
    scores = rng.normal(size=200) + targets
    return targets, scores.round(0 if ties else 9), rng.integers(0, 4, 200).astype(float)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed, ties):
    targets, scores, weights = example(seed, ties)
    for name, expected in PAIRS.items():
        ours = getattr(metrics, name)(targets, scores, np.stack([np.ones(200), weights]))
        assert ours == pytest.approx([expected(targets, scores), expected(targets, scores, sample_weight=weights)])
    for name, expected in DECISIONS.items():
        ours = getattr(metrics, name)(targets, scores >= 0.5, np.stack([np.ones(200), weights]))
        detected = (scores >= 0.5).astype(int)
        assert ours == pytest.approx(
            [expected(targets, detected), expected(targets, detected, sample_weight=weights)]
        )


def test_calibration_error_is_the_mean_gap_of_the_bins():
    rng = np.random.default_rng(0)
    probabilities = rng.random(1000)
    targets = (rng.random(1000) < probabilities**2).astype(int)
    bins = (probabilities * 10).astype(int)
    expected = sum(abs((targets - probabilities)[bins == i].sum()) for i in range(10)) / 1000
    assert metrics.calibration_error(targets, probabilities, np.ones(1000)) == pytest.approx(expected)
    curve = metrics.reliability(targets, probabilities)
    share, probability = oracle_curve(targets, probabilities)
    assert [point["share"] for point in curve] == pytest.approx(share)
    assert [point["probability"] for point in curve] == pytest.approx(probability)


def oracle_curve(targets, probabilities):
    from sklearn.calibration import calibration_curve

    return calibration_curve(targets, probabilities, n_bins=10)


def test_what_has_no_value_is_nan():
    scores, ones = np.array([0.1, 0.9]), np.ones(2)
    for targets in (np.array([0, 0]), np.array([1, 1])):
        assert np.isnan(metrics.auroc(targets, scores, ones))
    assert np.isnan(metrics.average_precision(np.array([0, 0]), scores, ones))
    assert metrics.average_precision(np.array([1, 1]), scores, ones) == 1
    assert np.isnan(metrics.precision(np.array([1, 0]), scores > 1, ones))
    assert np.isnan(metrics.recall(np.array([0, 0]), scores > 0, ones))


def test_intervals_cover_the_truth_although_windows_of_a_recording_are_alike():
    """Windows of a recording share an offset; resampling windows instead would make intervals far too narrow."""
    covered = narrow = 0
    truth = truth_of_simulation()
    for seed in range(100):
        targets, scores, groups = simulated(np.random.default_rng(seed), 60)
        found = metrics.estimate(metrics.auroc, targets, scores, groups, seed, resamples=200)
        covered += found.low <= truth <= found.high
        found = metrics.estimate(metrics.auroc, targets, scores, np.arange(targets.size), seed, resamples=200)
        narrow += found.low <= truth <= found.high
    assert covered >= 88
    assert narrow < 70


def simulated(rng, recordings):
    groups = np.repeat(np.arange(recordings), 20)
    targets = np.repeat((rng.random(recordings) < 0.4).astype(int), 20)
    return targets, targets + np.repeat(rng.normal(size=recordings), 20) + 0.2 * rng.normal(size=groups.size), groups


def truth_of_simulation():
    targets, scores, _ = simulated(np.random.default_rng(99), 50_000)
    return float(metrics.auroc(targets, scores, np.ones(targets.size)))


def test_blocks_of_resamples_draw_whole_groups(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 12)
    groups = np.array([3, 3, 7, 9])
    blocks = list(metrics.resample(groups, 0, 10))
    assert [len(block) for block in blocks] == [3, 3, 3, 1]
    weights = np.concatenate(blocks)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(axis=1) == 3).all()
