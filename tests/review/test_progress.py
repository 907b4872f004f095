"""Figures of a review; scikit-learn and scipy are the oracles."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from avex_serve.annotations.reviews import Review
from avex_serve.calibration.density import call_density
from avex_serve.calibration.fit import calibrate
from avex_serve.review.pool import Pool, Sound
from avex_serve.review.progress import agreement, count_labels, describe_label, reliability

CHOICES = ("present", "absent", "unsure")


def review(window, decision, annotator="bo", label="wren"):
    return Review(f"/{window // 20}.wav", 3.0 * (window % 20), 3.0 * (window % 20) + 3, label, decision, annotator)


def test_kappa():
    rng = np.random.default_rng(0)
    first = rng.choice(CHOICES, 200, p=[0.3, 0.6, 0.1])
    second = np.where(rng.random(200) < 0.7, first, rng.choice(CHOICES, 200))
    reviews = [review(i, each, "al") for i, each in enumerate(first)]
    reviews += [review(i, each, "bo") for i, each in enumerate(second)] + [review(500, "present", "cy")]
    (found,) = agreement(reviews)
    both = (first != "unsure") & (second != "unsure")
    assert (found.one, found.other, found.windows) == ("al", "bo", both.sum())
    assert found.agreeing == (first == second)[both].sum()
    assert found.value == pytest.approx(cohen_kappa_score(first[both], second[both]))


def test_kappa_of_two_who_always_say_the_same():
    reviews = [review(i, "present", name) for i in range(3) for name in ("al", "bo")]
    assert [(found.agreeing, found.value) for found in agreement(reviews)] == [(3, None)]


def test_counts():
    reviews = [review(0, "present", "al"), review(0, "absent", "bo"), review(1, "absent"), review(2, "present")]
    assert count_labels(reviews) == {
        "wren": {"present": 1, "absent": 1, "unsure": 1, "annotators": {"al": 1, "bo": 3}}
    }


def test_reliability():
    rng = np.random.default_rng(1)
    scores = rng.random(300)
    present = rng.random(300) < scores
    bins = reliability(scores, present)
    assert sum(each.windows for each in bins) == 300
    for each in bins:
        inside = (scores >= each.low) & (scores < each.high)
        assert (each.windows, each.present) == (inside.sum(), present[inside].sum())
        low, high = binomtest(each.present, each.windows).proportion_ci(method="wilson")
        assert (each.share_low, each.share_high) == pytest.approx((low, high), abs=1e-4)
    assert reliability(np.empty(0), np.empty(0, bool)) == []


@pytest.fixture(scope="module")
def season():
    """A pool of 400 windows with one label, and whether it is in them."""
    rng = np.random.default_rng(2)
    logits = rng.normal(-1, 3, 400)
    present = rng.random(400) < 1 / (1 + np.exp(-0.8 * logits - 0.3))
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    recording = np.repeat(np.arange(20, dtype=np.int32), 20)
    starts = np.tile(np.arange(20) * 3.0, 20)
    sounds = [Sound(f"/{i}.wav", None, 60.0, ".") for i in range(20)]
    pool = Pool(
        sounds,
        ["robin", "wren"],
        recording,
        np.stack([starts, starts + 3], axis=1),
        [(None, 1 - scores), (None, scores)],
    )
    return pool, scores, present


def test_the_threshold_is_that_of_calibrate(season):
    pool, scores, present = season
    reviews = [review(i, "present" if present[i] else "absent") for i in range(0, 400, 2)]
    found = describe_label(pool, "sigmoid", "wren", reviews, 0.8)
    logits = np.log(scores[::2].astype(float)) - np.log1p(-scores[::2].astype(float))
    (expected,) = calibrate(
        logits[:, None],
        present[::2, None].astype(int),
        pool.recording[::2],
        ["wren"],
        source="",
        target_precision=0.8,
    ).labels
    limits = 1 / (1 + np.exp(-np.array([expected.threshold.logit, *expected.threshold.logit_interval])))
    assert [found["threshold"][name] for name in ("score", "low", "high")] == pytest.approx(limits.tolist())
    curve = dict(found["curve"])
    logit = np.log(0.25 / 0.75)
    assert curve[0.25] == pytest.approx(1 / (1 + np.exp(-expected.scale.slope * logit - expected.scale.offset)))
    assert sum(each["windows"] for each in found["bins"]) == 200


def test_too_few_decisions_say_how_many_are_missing(season):
    pool, _, _ = season
    found = describe_label(pool, "sigmoid", "wren", [review(0, "present"), review(1, "unsure")], 0.9)
    assert found["threshold"] is None
    assert "missing: 9 windows with the sound" in found["reason"]
    assert describe_label(pool, "sigmoid", "robin", [review(0, "present")], 0.9)["reason"] == "no decisions yet"
    nothing = describe_label(pool, "sigmoid", "wren", [review(0, "unsure")], 0.9)
    assert (nothing["bins"], nothing["reason"]) == ([], "no decisions about windows with a score yet")


def test_the_density_is_that_of_the_command(season):
    pool, scores, present = season
    drawn = np.random.default_rng(3).permutation(400)[:60]
    found = describe_label(
        pool, "sigmoid", "wren", [review(i, "present" if present[i] else "absent") for i in drawn], 0.9
    )
    decisions = np.full(400, -1)
    decisions[drawn] = present[drawn]
    expected = call_density(scores, decisions).all
    assert [found["density"][name] for name in expected._fields] == list(expected)
    assert found["density"]["low"] <= present.mean() <= found["density"]["high"]
    few = describe_label(pool, "sigmoid", "wren", [review(0, "present")], 0.9)
    assert few["density"] is None
    assert few["density_reason"] == "too few reviewed windows; missing: 9 (with present or absent)"
