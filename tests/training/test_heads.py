"""Heads: the linear one equals scikit-learn's, all are deterministic, and choices come from other groups."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from avex_export.recipes import find_recipe
from avex_serve.configs import ProbeConfig
from avex_serve.training import heads
from avex_serve.training.heads import Task, train

LINEAR = ProbeConfig(probe_type="linear", target_layers=["last_layer"])


def task(config=LINEAR, windows=400, shape=(24,), labels=3, layers=1, seed=0, unknown=0.2):
    """Embeddings of unequal scales, with labels that depend on them."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(windows // 10), 10)
    first = rng.normal(size=(windows, *shape))
    # In sequences the label is in the mean over time.
    pooled = first.reshape(windows, -1, shape[-1]).mean(axis=1)
    scores = pooled @ rng.normal(size=(shape[-1], labels)) - 1
    scores *= np.sqrt(np.prod(shape[:-1], dtype=float))
    targets = (rng.random(scores.shape) < 1 / (1 + np.exp(-scores))).astype(np.int8)
    targets[rng.random(targets.shape) < unknown] = -1
    scales = np.exp(rng.normal(size=shape[-1]))
    embeddings = [(first * scales + 5 * i + 3).astype(np.float32) for i in range(layers)]
    return Task(config, tuple(f"label {i}" for i in range(labels)), embeddings, targets, groups)


def every(data):
    return np.ones(len(data.targets), bool)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("limit", ["_KEPT_BYTES", "_WIDEST", "_BLOCK"])
def test_the_linear_head_equals_scikit_learn(penalty, limit, monkeypatch):
    """At the same penalty, with the features in memory or not, with eigenvectors or not, in one block or several."""
    monkeypatch.setattr(heads, limit, {"_BLOCK": 50}.get(limit, 0))
    data = task()
    windows = np.arange(380)
    design = heads._Design(data, windows)
    weight, bias = design.solve(penalty, design.solve(10 * penalty))
    features = data.embeddings[0][windows].astype(np.float64)
    for i in range(3):
        known = data.targets[windows, i] >= 0
        scaler = StandardScaler().fit(features)
        oracle = LogisticRegression(C=1 / (penalty * known.sum()), tol=1e-10, max_iter=10_000)
        oracle.fit(scaler.transform(features)[known], data.targets[windows, i][known])
        assert weight[i].numpy() == pytest.approx(oracle.coef_[0] / scaler.scale_, abs=1e-4, rel=1e-4)
        scores = oracle.decision_function(scaler.transform(features))
        assert features @ weight[i].numpy() + float(bias[i]) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(("limit", "together"), [(2**30, 4), (1, 1)])
def test_large_folds_take_turns_on_many_cores(limit, together, monkeypatch):
    """Each keeps its features in memory: on many cores all of them would take more than the limit."""
    monkeypatch.setattr(heads, "usable_cores", lambda: 64)
    monkeypatch.setattr(heads, "_KEPT_BY_ALL", limit)
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, **options):
            pools.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr(heads, "ThreadPoolExecutor", Pool)
    data = task()
    trained = train(data, every(data), 0)
    assert pools == [together]
    monkeypatch.undo()
    for name, value in train(data, every(data), 0).state.items():
        assert torch.equal(trained.state[name], value)


def test_a_label_of_one_kind_gets_its_bias_alone():
    data = task(unknown=0)
    data.targets[:, 1] = 0
    weight, bias = heads._Design(data, np.arange(400)).solve(1e-2)
    assert (weight[1] == 0).all()
    assert float(bias[1].sigmoid()) == pytest.approx(1 / 402)
    assert (weight[0] != 0).all()


def test_a_constant_feature_has_no_weight():
    data = task()
    data.embeddings[0][:, 4] = 7
    weight, _ = heads._Design(data, np.arange(400)).solve(1e-2)
    assert weight[:, 4].abs().max() < 1e-9


def test_the_penalty_is_chosen_by_groups_left_out(monkeypatch):
    data = task(windows=120, shape=(90,), unknown=0)
    trained = train(data, every(data), seed=0)
    assert trained.chosen["C"] <= 0.1, "120 windows can't support 90 free weights"
    monkeypatch.setattr(heads, "STRENGTHS", (10.0,))
    free = train(data, every(data), seed=0)
    rows = np.arange(120)
    assert heads.loss(free.logits(data, rows), data.targets) < heads.loss(trained.logits(data, rows), data.targets)


def test_windows_left_out_have_no_influence():
    data = task()
    rows = data.groups < 30
    before = train(data, rows, seed=0)
    data.embeddings[0][~rows] = 1e6
    data.targets[~rows] = 1
    after = train(data, rows, seed=0)
    assert before.calibration == after.calibration
    assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)


def test_one_group_trains_without_choosing_or_calibrating():
    data = task(windows=10, unknown=0)
    trained = train(data, every(data), seed=0)
    assert trained.chosen == {"C": heads.STRENGTH}
    assert all(label.scale is None for label in trained.calibration.labels)


# Every kind of head, and merged layers.
VARIANTS = {
    "linear_last": {"shape": (24,)},
    "linear_all": {"shape": (24,), "layers": 2},
    "mlp_last": {"shape": (24,)},
    "lstm_last": {"shape": (5, 24)},
    "attention_last": {"shape": (5, 24)},
    "transformer_all": {"shape": (5, 24), "layers": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_head_learns(name, monkeypatch):
    monkeypatch.setattr(heads, "EPOCHS", 8)
    monkeypatch.setattr(heads, "RATES", (3e-3,))
    data = task(find_recipe(name).config, windows=300, unknown=0, **VARIANTS[name])
    trained = train(data, every(data), seed=0)
    guess = np.log(np.mean(data.targets, axis=0) / (1 - np.mean(data.targets, axis=0)))
    reached = heads.loss(trained.logits(data, np.arange(300)), data.targets)
    assert reached < heads.loss(np.tile(guess, (300, 1)), data.targets)
    head = data.build()
    head.load_state_dict(trained.state)
    alone = head.eval()(data.inputs(np.arange(5))).detach().numpy()
    assert trained.logits(data, np.arange(5)) == pytest.approx(alone, abs=1e-5)


SCRIPT = """
    import hashlib, sys
    import numpy as np
    from tests.training.test_heads import VARIANTS, find_recipe, task, every
    from avex_serve.training import heads
    heads.EPOCHS, heads.RATES = 3, (3e-3,)
    for name in sys.argv[1:]:
        data = task(find_recipe(name).config, windows=400, **VARIANTS[name])
        state = heads.train(data, every(data), seed=1).state
        print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest())
"""


def test_the_same_bytes_with_any_number_of_threads():
    names = ["linear_last", "attention_last"]
    found = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *names]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1
