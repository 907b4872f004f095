"""Calibration: the fit equals scipy's and scikit-learn's, and what it promises holds in simulated seasons."""

import msgspec
import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from avex_serve.calibration import fit
from avex_serve.calibration.scales import Calibration, Calibrator, log_odds, read_calibration, sigmoid
from avex_serve.errors import BundleError, InputError
from avex_serve.training import metrics

FREE = (np.inf, np.inf)


def season(seed, recordings=60, windows=30, labels=6):
    """Logits (N, C), targets, recordings and the true probabilities of windows of a simulated season.

    Labels differ in how common they are, and in how far their logits are from the truth; recordings in a noise that
    shifts all logits of a label.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(recordings), windows)
    centre = rng.normal(-2.5, 0.7, labels) + rng.normal(0, 0.5, (recordings, labels))[groups]
    truth = rng.normal(centre, 2.5)  # logit of the true probability
    targets = (rng.random(truth.shape) < sigmoid(truth)).astype(np.int8)
    slope, offset = rng.uniform(0.5, 2.0, labels), rng.normal(0, 1, labels)
    return truth * slope + offset, targets, groups, sigmoid(truth)


def probabilities_of(calibration, logits):
    """By the scores of these logits, as they are served."""
    return Calibrator.of(calibration, "sigmoid").probabilities(sigmoid(logits).astype(np.float32))


def calibrated(seed, **options):
    logits, targets, groups, _ = season(seed, **options)
    names = [f"label {i}" for i in range(logits.shape[1])]
    return fit.calibrate(logits, targets, groups, names, source="a simulated season", seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_equals_scikit_learn_and_scipy(seed):
    logits, targets, _, _ = season(seed)
    x, y = logits[:, 0], targets[:, 0]
    ours = fit.fit_logistic(x, y, (0.0, 0.0), FREE).parameters
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(x[:, None], y)
    assert ours == pytest.approx([theirs.intercept_[0], theirs.coef_[0, 0]], abs=1e-5)

    def loss(theta):
        z = theta[0] + theta[1] * x
        prior = (theta[0] - 1) ** 2 / (2 * 0.3**2) + (theta[1] - 2) ** 2 / (2 * 0.1**2)
        return np.logaddexp(0, z).sum() - y @ z + prior

    best = optimize.minimize(loss, [0, 1], method="BFGS", tol=1e-9).x
    assert fit.fit_logistic(x, y, (1.0, 2.0), (0.3, 0.1)).parameters == pytest.approx(best, abs=1e-4)


def test_separable_labels_have_a_finite_fit():
    x = np.linspace(-5, 5, 40)
    found = fit.fit_logistic(x, (x > 0).astype(int), (0.0, 1.0), (2.0, 1.0)).parameters
    assert np.isfinite(found).all()
    assert found[1] > 1


def test_held_out_recordings_are_calibrated():
    errors = []
    for seed in range(10):
        logits, targets, groups, _ = season(seed, recordings=120)
        train = groups < 60
        names = [str(i) for i in range(6)]
        result = fit.calibrate(logits[train], targets[train], groups[train], names, source="", seed=seed)
        probabilities = probabilities_of(result, logits[~train]).astype(np.float64)
        for i in range(6):
            ones = np.ones(len(probabilities))
            errors.append(float(metrics.calibration_error(targets[~train][:, i], probabilities[:, i], ones)))
    assert np.mean(errors) <= 0.03
    assert np.quantile(errors, 0.95) <= 0.05


def test_the_true_precision_is_within_the_interval_in_nine_of_ten_seasons():
    hits, widths = [], []
    for seed in range(200):
        result = calibrated(seed, labels=2, windows=20)
        truth, thresholds = season(seed, labels=2, windows=20), result.thresholds()
        for i, label in enumerate(result.labels):
            if label.threshold is None:
                continue
            detected = truth[0][:, i] >= thresholds[i]
            low, high = label.threshold.precision_interval
            hits.append(low <= truth[3][detected, i].mean() <= high)
            widths.append(high - low)
    assert len(hits) > 350
    assert np.mean(hits) >= 0.9
    assert np.mean(widths) < 0.25


def test_few_labels_are_drawn_to_the_pooled_fit():
    logits, targets, groups, _ = season(1, recordings=100)
    few = targets.copy()
    few[np.flatnonzero(targets[:, 0] == 1)[12:], 0] = -1
    few[np.flatnonzero(targets[:, 0] == 0)[12:], 0] = -1
    names = [str(i) for i in range(6)]
    every = fit.calibrate(logits, targets, groups, names, source="").labels[0].scale
    some = fit.calibrate(logits, few, groups, names, source="").labels[0].scale
    known = few[:, 0] >= 0
    alone = fit.fit_logistic(logits[known, 0], few[known, 0], (0.0, 1.0), FREE).parameters[1]
    pooled = fit.fit_logistic(logits.ravel(), targets.ravel(), (0.0, 1.0), FREE).parameters[1]
    assert abs(some.slope - pooled) < abs(alone - pooled)
    assert some.slope_interval[1] - some.slope_interval[0] > 3 * (every.slope_interval[1] - every.slope_interval[0])


def test_too_few_labels_are_refused_with_the_number_missing():
    logits, targets, groups, _ = season(0)
    targets[np.flatnonzero(targets[:, 0] == 1)[7:], 0] = 0
    targets[:, 1] = np.where(groups < 2, targets[:, 1], 0)
    result = fit.calibrate(logits, targets, groups, [*"abcdef"], source="")
    first, second, *others = result.labels
    assert (first.missing.with_sound, first.scale, first.threshold) == (3, None, None)
    assert "3 windows with the sound" in first.reason
    assert second.missing.recordings == 1
    assert all(label.missing is None and label.scale is not None for label in others)
    probabilities = probabilities_of(result, logits)
    assert np.isnan(probabilities[:, :2]).all()
    assert np.isfinite(probabilities[:, 2:]).all()


def test_scores_that_mean_nothing_are_refused():
    logits, targets, groups, _ = season(0)
    result = fit.calibrate(-logits, targets, groups, [*"abcdef"], source="")
    assert all(label.scale is None and "don't rise" in label.reason for label in result.labels)


def test_a_precision_that_no_threshold_reaches_is_said():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(600, 1))
    targets = (rng.random((600, 1)) < sigmoid(0.5 * logits - 1)).astype(int)
    label = fit.calibrate(logits, targets, np.arange(600) // 10, ["faint"], source="").labels[0]
    assert label.threshold is None
    assert "no threshold reaches a precision of 0.9" in label.reason


def test_sure_detections_do_not_make_up_for_likely_mistakes():
    """Between clear sounds and clear silence the threshold is in the gap, not among the silent windows."""
    rng = np.random.default_rng(0)
    has = np.arange(400) % 4 == 0
    logits = np.where(has, 8.0, -8.0) + rng.normal(size=400)
    result = fit.calibrate(logits[:, None], has[:, None].astype(int), np.arange(400) // 10, ["clear"], source="")
    threshold = result.labels[0].threshold
    assert -6 < threshold.logit < 6
    assert threshold.logit_interval[0] <= threshold.logit <= threshold.logit_interval[1]
    assert probabilities_of(result, np.array([[threshold.logit]]))[0, 0] >= 0.5


def test_a_target_that_is_no_share_is_refused():
    with pytest.raises(InputError, match="target precision is 90"):
        fit.calibrate(np.zeros((4, 1)), np.zeros((4, 1)), np.arange(4), ["a"], source="", target_precision=90)


def test_written_and_read(tmp_path):
    assert read_calibration(tmp_path) is None
    result = calibrated(3)
    result.write(tmp_path)
    assert read_calibration(tmp_path) == result
    text = (tmp_path / "calibration.json").read_text()
    assert msgspec.json.decode(text, type=Calibration) == result
    (tmp_path / "calibration.json").write_text(text.replace('"slope"', '"slop"'))
    with pytest.raises(BundleError, match="fit the probe again"):
        read_calibration(tmp_path)


def test_the_sigmoid_neither_overflows_nor_rounds_to_nan():
    assert sigmoid(np.array([-1e5, 0.0, 1e5])).tolist() == [0.0, 0.5, 1.0]


def test_probabilities_of_scores_are_those_of_the_logits():
    """Scores are float32; where they are all but 1, the logistic is flat."""
    logits = np.linspace(-25, 25, 101)
    scores = sigmoid(logits).astype(np.float32)
    result = calibrated(3, labels=1)
    scale = result.labels[0].scale
    expected = sigmoid(scale.slope * np.clip(logits, -17.3, 17.3) + scale.offset)
    found = Calibrator.of(result, "sigmoid").probabilities(scores[:, None])[:, 0]
    assert found == pytest.approx(expected, abs=2e-3)
    near = np.abs(logits) < 8
    assert found[near] == pytest.approx(expected[near], abs=1e-5)
    assert np.isfinite(log_odds(np.array([0.0, 1.0], np.float32), "sigmoid")).all()
    raw = Calibrator.of(result, "none")
    assert raw.probabilities(logits[:, None])[:, 0] == pytest.approx(sigmoid(scale.slope * logits + scale.offset))
    assert raw.lowest == pytest.approx(result.thresholds(np.nan))
