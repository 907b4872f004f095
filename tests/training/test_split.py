"""Splits keep groups together and give each part its share of the labels."""

import numpy as np
import pytest

from avex_serve.errors import InputError
from avex_serve.training.split import folds, near_duplicates, split


def season(recordings=60, windows=5, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(recordings), windows)
    holds = rng.random((recordings, labels)) < [0.5, 0.3, 0.2, 0.2]
    return (holds[groups] & (rng.random((groups.size, labels)) < 0.8)).astype(np.int8), groups


def nothing(groups):
    return np.full(groups.size, "")


def test_a_fifth_of_the_groups_is_held_out_where_labels_have_many():
    targets, groups = season(recordings=200)
    result = split(targets, groups, nothing(groups), 0)
    assert (result.how, result.trains_on_all) == ("hold-out", False)
    ((train, test),) = result.parts
    assert not (train & test).any()
    assert (train | test).all()
    assert not np.intersect1d(groups[train], groups[test]).size
    assert np.unique(groups[test]).size == 40
    for label in range(4):
        with_it = np.unique(groups[targets[:, label] == 1])
        share = np.isin(with_it, groups[test]).mean()
        assert 0.1 < share < 0.3


@pytest.mark.parametrize(("recordings", "how"), [(20, "cross-validation"), (25, "hold-out")])
def test_what_is_held_out_has_five_groups_with_each_label(recordings, how):
    """With fewer, more recordings would make a report of fewer."""
    groups = np.arange(2 * recordings)
    targets = np.eye(2, dtype=np.int8)[groups % 2]
    for seed in range(5):
        result = split(targets, groups, nothing(groups), seed)
        assert result.how == how
        evaluated = np.any([test for _, test in result.parts], axis=0)
        assert (targets[evaluated].sum(axis=0) >= 5).all()


def test_few_groups_are_cross_validated():
    targets, groups = season(recordings=8)
    result = split(targets, groups, nothing(groups), 0)
    assert (result.how, result.trains_on_all, len(result.parts)) == ("cross-validation", True, 5)
    assert (sum(test.astype(int) for _, test in result.parts) == 1).all()
    for train, test in result.parts:
        assert not np.intersect1d(groups[train], groups[test]).size


def test_two_groups_make_two_folds_and_one_makes_none():
    targets, groups = season(recordings=2)
    assert len(split(targets, groups, nothing(groups), 0).parts) == 2
    targets, groups = season(recordings=1)
    assert split(targets, groups, nothing(groups), 0).how == "none"


def test_the_seed_chooses_the_groups():
    targets, groups = season()
    first, again, other = (folds(targets, groups, 5, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_rare_labels_are_spread():
    targets, groups = season(recordings=50, labels=4)
    targets[:, 3] = groups % 10 == 0  # five groups in fifty
    fold = folds(targets, groups, 5, 0)
    assert sorted(set(fold[targets[:, 3] == 1])) == [0, 1, 2, 3, 4]


def test_a_split_of_the_data_is_honoured():
    targets, groups = season()
    given = np.where(groups < 7, "test", "train")
    result = split(targets, groups, given, 0)
    assert result.how == "split column"
    assert (result.parts[0][1] == (groups < 7)).all()
    assert not result.trains_on_all


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda groups: np.where(groups < 7, "test", ""), "'none', 'test'"),
        (lambda groups: np.full(groups.size, "train"), "expected train and test"),
        (lambda groups: np.where(np.arange(groups.size) % 5 < 2, "test", "train"), "60 groups are in both"),
    ],
)
def test_a_split_that_can_not_be_is_refused(given, reason):
    targets, groups = season()
    with pytest.raises(InputError, match=reason):
        split(targets, groups, given(groups), 0)


@pytest.mark.parametrize("shape", [(16,), (300,), (4, 80)])
def test_recordings_that_are_nearly_the_same_are_found(shape):
    rng = np.random.default_rng(0)
    recording = np.repeat(np.arange(500), 10)
    embeddings = 3 + rng.normal(size=(5000, *shape)).astype(np.float32)
    embeddings[4000:4010] = embeddings[20:30] + 1e-3  # 400 is a copy of 2
    embeddings[4010:4015] = embeddings[13:18]  # 401 is half of 1, from elsewhere in it
    embeddings[4020:4024] = embeddings[30:34]  # 402 shares four of its windows with 3
    found = near_duplicates(embeddings, recording)
    assert [copies.recordings for copies in found] == [(1, 401), (2, 400)]
    for copies in found:
        assert copies.cosine > 0.999
        assert tuple(recording[list(copies.windows)]) == copies.recordings
    assert near_duplicates(embeddings[:4000], recording[:4000]) == []


def test_every_pair_is_compared(monkeypatch):
    """The result is that of comparing all pairs of windows."""
    monkeypatch.setattr("avex_serve.training.split._BLOCK", 256)
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(40, 8))
    embeddings = (centres[rng.integers(0, 40, 1500)] + 0.01 * rng.normal(size=(1500, 8))).astype(np.float32)
    recording = np.sort(np.append(np.arange(250), rng.integers(0, 250, 1250)))
    centred = embeddings - embeddings[:: 1500 // 256].mean(axis=0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    alike = units @ units.T >= 0.999
    holds = np.stack([alike[:, recording == r].any(axis=1) for r in range(250)], axis=1)
    shares = np.stack([holds[recording == r].mean(axis=0) for r in range(250)])
    expected = {(a, b) for a, b in np.argwhere(np.maximum(shares, shares.T) >= 0.5) if a < b}
    assert {copies.recordings for copies in near_duplicates(embeddings, recording)} == expected
    assert len(expected) > 100
