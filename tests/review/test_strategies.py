"""Strategies and filters; pandas is the oracle of what is in a group, and which rows pass."""

from dataclasses import replace
from datetime import date, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from avex_serve.cli.suggest import STRATEGIES as SHOWN
from avex_serve.errors import InputError
from avex_serve.review.pool import Pool, Queue, Sound, suggest
from avex_serve.review.strategies import STRATEGIES, Candidates, arrange, keep_first

GROUPS = {"recordings": "recording", "sites": "site", "dates": "date", "hours": "hour"}


@pytest.fixture(scope="module")
def pool():
    """400 windows of 20 recordings at three sites; one recording has no time."""
    rng = np.random.default_rng(0)
    sounds = [
        Sound(f"/{i}.wav", None if i == 7 else datetime(2026, 4, 1) + timedelta(hours=5.3 * i), 60.0, "abc"[i % 3])
        for i in range(20)
    ]
    recording = np.repeat(np.arange(20, dtype=np.int32), 20)
    starts = np.tile(np.arange(20) * 3.0, 20)
    scores = rng.random((400, 2)).astype(np.float32)
    spans = np.stack([starts, starts + 3], axis=1)
    return Pool(sounds, ["wren", "robin"], recording, spans, [(None, scores[:, 0]), (None, scores[:, 1])])


@pytest.fixture(scope="module")
def frame(pool):
    """The same as a data frame."""
    scores = pool.select(0, Queue(strategy="chronological"))
    score = pd.Series(scores[1], scores[0]).sort_index()
    sounds = [pool.sounds[i] for i in pool.recording]
    time = pd.Series([sound.start for sound in sounds]) + pd.to_timedelta(pool.spans[:, 0], unit="s")
    return pd.DataFrame(
        {
            "score": score.to_numpy(),
            "recording": pool.recording,
            "site": [sound.site for sound in sounds],
            "time": time,
            "date": time.dt.date.astype(str),
            "hour": time.dt.hour,
        }
    )


def test_the_command_names_every_strategy():
    assert list(SHOWN) == list(STRATEGIES)
    assert len(STRATEGIES) == 17


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_order_has_every_candidate_once(pool, strategy):
    queue = Queue(strategy=strategy, similarity=np.linspace(-1, 1, 400))
    windows, _ = pool.select(1, queue)
    assert sorted(windows) == list(range(400))
    assert pool.select(1, queue)[0].tolist() == windows.tolist(), "the same each time"
    other = pool.select(1, replace(queue, seed=1))[0].tolist()
    at_random = "any" in SHOWN[strategy]
    assert (other != windows.tolist()) == at_random


def test_scores(pool, frame):
    for strategy, key in (("highest", -frame.score), ("lowest", frame.score), ("margin", (frame.score - 0.5).abs())):
        assert pool.select(0, Queue(strategy=strategy))[0].tolist() == key.sort_values(kind="stable").index.tolist()
    near = pool.select(0, Queue(strategy="margin", middle=0.9))[1]
    assert near[0] == pytest.approx(0.9, abs=0.02)


def test_time(pool, frame):
    expected = frame.sort_values(["time", "recording"], kind="stable").index
    assert pool.select(0, Queue(strategy="chronological"))[0].tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", GROUPS)
def test_the_best_of_each_group_then_the_second_best(pool, frame, strategy):
    best = frame.sort_values("score", ascending=False, kind="stable")
    turn = best.groupby(GROUPS[strategy], dropna=False).cumcount()
    expected = best.assign(turn=turn).sort_values("turn", kind="stable").index
    assert pool.select(0, Queue(strategy=strategy))[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("strategy", "columns"),
    [
        ("any-site", ["site"]),
        ("any-date", ["date"]),
        ("any-hour", ["hour"]),
        ("everywhere", ["site", "date", "hour"]),
        ("bands", ["band"]),
        ("quantiles", ["quantile"]),
        ("density", ["half"]),
    ],
)
def test_every_group_has_its_turn(pool, frame, strategy, columns):
    halves = pd.cut(frame.score, [-1, *frame.score.quantile([0.5, 0.75, 0.875]), 2], labels=False, right=False)
    frame = frame.assign(
        half=halves, band=pd.cut(frame.score, 10, labels=False), quantile=pd.qcut(frame.score, 10, labels=False)
    )
    groups = frame.groupby(columns, dropna=False)
    ordered = groups.ngroup().loc[pool.select(0, Queue(strategy=strategy))[0]].to_numpy()
    first = min(groups.size())  # as long as no group is exhausted
    for turn in range(first):
        assert sorted(ordered[turn * groups.ngroups : (turn + 1) * groups.ngroups]) == list(range(groups.ngroups))


def test_the_most_similar(pool):
    similarity = np.random.default_rng(1).random(400)
    windows, _ = pool.select(0, Queue(strategy="nearest", similarity=similarity))
    assert windows.tolist() == np.argsort(-similarity).tolist()
    with pytest.raises(InputError, match="needs an example"):
        pool.select(0, Queue(strategy="nearest"))


@pytest.mark.parametrize(
    ("queue", "query"),
    [
        (Queue(lowest=0.3, highest=0.6), "0.3 <= score <= 0.6"),
        (Queue(sites=["a", "c"]), "site in ('a', 'c')"),
        (Queue(first=date(2026, 4, 2), last=date(2026, 4, 3)), "'2026-04-02' <= date <= '2026-04-03'"),
        (Queue(hours=(4, 9)), "4 <= hour < 9"),
        (Queue(hours=(22, 3)), "hour >= 22 or hour < 3"),
        (Queue(lowest=0.5, sites=["b"], hours=(0, 12)), "score >= 0.5 and site == 'b' and hour < 12"),
    ],
)
def test_filters(pool, frame, queue, query):
    assert sorted(pool.select(0, queue)[0]) == frame.query(query).index.tolist()


def test_limits_for_each_recording_keep_the_first(pool, frame):
    windows, _ = pool.select(0, Queue(per_recording=2, lowest=0.2))
    best = frame[frame.score >= 0.2].sort_values("score", ascending=False, kind="stable")
    assert windows.tolist() == best[best.groupby("recording").cumcount() < 2].index.tolist()


def test_what_is_reviewed_is_left_out(pool):
    windows, _ = pool.select(0, Queue())
    again, _ = pool.select(0, Queue(), set(windows[:3].tolist()))
    assert again.tolist() == windows[3:].tolist()


def test_labels_take_turns(pool):
    found = suggest(pool, Queue(), 5)
    assert [each.label for each in found] == [0, 1, 0, 1, 0]
    assert [each.window for each in found[::2]] == pool.select(0, Queue())[0][:3].tolist()


def test_unknown_scores_come_last():
    nothing = np.zeros(4, int)
    score = np.array([0.2, np.nan, 0.9, np.nan])
    candidates = Candidates(score, nothing, nothing, np.full(4, np.nan), np.arange(4.0))
    assert arrange(candidates, "highest").tolist() == [2, 0, 1, 3]
    for strategy in set(STRATEGIES) - {"nearest"}:
        assert sorted(arrange(candidates, strategy)) == [0, 1, 2, 3]
    assert keep_first(nothing, np.array([2, 0, 1, 3]), 1).tolist() == [2]


@pytest.mark.parametrize(
    ("queue", "reason"),
    [
        (Queue(lowest=0.6, highest=0.3), "scores from 0.6 to 0.3"),
        (Queue(first=date(2026, 4, 2), last=date(2026, 4, 1)), "dates from 2026-04-02 to 2026-04-01"),
        (Queue(hours=(4, 25)), "hours 4-25; expected 0 to 24"),
        (Queue(per_recording=0), "expected at least 1"),
        (Queue(strategy="best"), "no strategy 'best'; expected one of highest, lowest"),
    ],
)
def test_what_cannot_be_chosen(pool, queue, reason):
    with pytest.raises(InputError, match=reason):
        pool.select(0, queue)
