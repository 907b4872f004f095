"""How many labels each strategy of review needs, on a simulated season.

    python bench/learning.py [--seed N]

A season has sites with backgrounds of their own, rare sounds that come in bouts, and other sounds that resemble
them. A head trained on a few clean examples scores all windows. In each round a scripted reviewer answers about the
windows that a strategy puts first, every label in turn, and the heads are trained again on all answers. The table
has the macro average precision on other recordings by the share of labels, and the share that is needed to come
within 0.02 of a head trained on all labels.
"""

import argparse
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from avex_serve.review.pool import Pool, Queue, Sound
from avex_serve.review.strategies import STRATEGIES

SITES, RECORDINGS, WINDOWS, DIM = 8, 160, 30, 32
SHARES = (0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03)  # of recordings with a label
EXAMPLES = 5  # clean ones of each label, and 50 windows of background
BUDGET = 0.25  # of all labels
ROUNDS = 10
NEAR = 0.02


@dataclass(frozen=True)
class Season:
    """Embeddings (N, DIM) of windows with the truth (N, C); the last quarter of the recordings is for evaluation."""

    embeddings: np.ndarray
    truth: np.ndarray
    recording: np.ndarray  # (N,)
    site: np.ndarray  # (N,)
    clean: np.ndarray  # (M, DIM) examples
    clean_truth: np.ndarray  # (M, C)

    @property
    def held_out(self) -> np.ndarray:
        return self.recording >= RECORDINGS * 3 // 4


def simulate(seed: int) -> Season:
    rng = np.random.default_rng(seed)
    classes = len(SHARES)
    calls = rng.normal(size=(classes, DIM))
    resembling = calls[rng.integers(classes, size=6)] * 0.6 + rng.normal(size=(6, DIM)) * 0.8  # other sounds
    background = rng.normal(size=(SITES, DIM)) * 0.8
    recording = np.repeat(np.arange(RECORDINGS), WINDOWS)
    site = rng.integers(SITES, size=RECORDINGS)[recording]
    bout = rng.random((RECORDINGS, classes)) < SHARES
    truth = bout[recording] & (rng.random((recording.size, classes)) < 0.35)
    other = (rng.random((RECORDINGS, 6)) < 0.3)[recording] & (rng.random((recording.size, 6)) < 0.3)

    def loudness(shape: tuple[int, ...]) -> np.ndarray:
        return rng.lognormal(0.3, 0.4, shape)

    embeddings = (truth * loudness(truth.shape)) @ calls + (other * loudness(other.shape)) @ resembling
    embeddings += background[site] + rng.normal(size=embeddings.shape)
    clean_truth = np.concatenate(
        [np.repeat(np.eye(classes, dtype=bool), EXAMPLES, axis=0), np.zeros((50, classes), bool)]
    )
    clean = clean_truth * 1.5 @ calls + rng.normal(size=(len(clean_truth), DIM)) * 0.8
    return Season(embeddings, truth, recording, site, clean, clean_truth)


def fit_scores(season: Season, known: np.ndarray) -> np.ndarray:
    """Scores (N, C) of heads trained on the clean examples and the known labels (N, C)."""
    scores = np.empty(season.truth.shape)
    with threadpool_limits(1):  # more threads are slower with so little data
        for i in range(season.truth.shape[1]):
            x = np.concatenate([season.clean, season.embeddings[known[:, i]]])
            y = np.concatenate([season.clean_truth[:, i], season.truth[known[:, i], i]])
            head = LogisticRegression(C=0.1, max_iter=1000).fit(x, y)
            scores[:, i] = head.predict_proba(season.embeddings)[:, 1]
    return scores


def macro_ap(season: Season, scores: np.ndarray) -> float:
    held = season.held_out
    return float(
        np.mean(
            [
                average_precision_score(season.truth[held, i], scores[held, i])
                for i in range(season.truth.shape[1])
                if season.truth[held, i].any()
            ]
        )
    )


def all_labels(season: Season) -> float:
    """Macro average precision of heads trained on every label."""
    return macro_ap(season, fit_scores(season, np.repeat(~season.held_out[:, None], season.truth.shape[1], axis=1)))


def learn(season: Season, strategy: str, seed: int = 0) -> list[float]:
    """Macro average precision at first, and after each round."""
    train = np.flatnonzero(~season.held_out)
    sounds = [
        Sound(f"/{i}.wav", datetime(2026, 4, 1) + timedelta(hours=7 * i), 150.0, str(season.site[i * WINDOWS]))
        for i in range(RECORDINGS * 3 // 4)
    ]
    starts = 5.0 * (train % WINDOWS)
    similar = season.embeddings[train] / np.linalg.norm(season.embeddings[train], axis=1, keepdims=True)
    known = np.zeros(season.truth.shape, bool)
    scores = fit_scores(season, known)
    reached = [macro_ap(season, scores)]
    for turn in range(1, ROUNDS + 1):
        count = round(BUDGET * train.size * turn / ROUNDS) - int(known[:, 0].sum())
        candidates = [(None, scores[train, i]) for i in range(known.shape[1])]
        labels = [str(i) for i in range(known.shape[1])]
        spans = np.stack([starts, starts + 5], axis=1)
        pool = Pool(sounds, labels, season.recording[train].astype(np.int32), spans, candidates)
        for i in range(known.shape[1]):
            queue = Queue(strategy=strategy, seed=seed + turn)
            if strategy == "nearest":
                queue = replace(queue, similarity=similar @ season.clean[i * EXAMPLES])
            windows, _ = pool.select(i, queue, set(np.flatnonzero(known[train, i]).tolist()))
            known[train[windows[:count]], i] = True
        scores = fit_scores(season, known)
        reached.append(macro_ap(season, scores))
    return reached


def share_needed(reached: list[float], goal: float) -> float | None:
    """The share of labels from which on all later rounds reach a goal; None: not within the budget."""
    first = next((i for i in range(len(reached)) if min(reached[i:]) >= goal), None)
    return None if first is None else BUDGET * first / ROUNDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    season = simulate(arguments.seed)
    goal = all_labels(season)
    print(f"{season.truth.size} labels, {season.truth.sum()} of them present; all labels: {goal:.3f}")
    shown = range(0, ROUNDS + 1, 2)
    print(f"{'strategy':14}" + "".join(f"{BUDGET * i / ROUNDS:>8.0%}" for i in shown) + f"{'needed':>9}")
    rows = {strategy: learn(season, strategy) for strategy in STRATEGIES}
    for strategy, reached in sorted(rows.items(), key=lambda row: -row[1][-1]):
        needed = share_needed(reached, goal - NEAR)
        text = "-" if needed is None else f"{needed:.1%}"
        print(f"{strategy:14}" + "".join(f"{reached[i]:>8.3f}" for i in shown) + f"{text:>9}")


if __name__ == "__main__":
    main()
