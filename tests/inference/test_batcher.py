"""Batches across requests, with a backend that notes what it is given and waits where it is told to."""

import io
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from avex_serve.inference.batcher import Batcher
from avex_serve.inference.torch import TorchBackend

PATIENCE = 20
LONG = 2  # seconds to wait for others, where the test brings some


class Recording:
    """Answers the sum of each row and the row; rows that hold -1 are refused with all that came with them."""

    device = "cuda"
    format = "recording"
    max_batch = 4

    def __init__(self):
        self.sizes, self.began, self.go = [], threading.Event(), threading.Event()
        self.go.set()

    def run(self, batch):
        self.sizes.append(batch.shape)
        self.began.set()
        assert self.go.wait(PATIENCE)
        if (batch == -1).any():
            raise ValueError("a bad row")
        return {"sum": batch.sum(axis=1), "row": batch}


def rows(value, count=1, width=3):
    return np.full((count, width), value, np.float32)


@pytest.fixture
def backend():
    return Recording()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def check(answer, batch):
    np.testing.assert_array_equal(answer["row"], batch)
    np.testing.assert_array_equal(answer["sum"], batch.sum(axis=1))


def test_batches_that_come_together_run_as_one(backend, pool):
    batcher = Batcher(backend, LONG)
    batches = [rows(1), rows(2, 2), rows(3)]
    for future, batch in [(pool.submit(batcher.run, batch), batch) for batch in batches]:
        check(future.result(PATIENCE), batch)
    assert backend.sizes == [(4, 3)]


def test_no_more_than_the_backend_takes_best(backend, pool):
    batcher = Batcher(backend, LONG)
    batches = [rows(value) for value in range(12)]
    for future, batch in [(pool.submit(batcher.run, batch), batch) for batch in batches]:
        check(future.result(PATIENCE), batch)
    assert backend.sizes == [(4, 3)] * 3


def test_what_does_not_fit_runs_next(backend, pool):
    batcher = Batcher(backend, LONG)
    batches = [rows(1, 3), rows(2, 3)]
    for future, batch in [(pool.submit(batcher.run, batch), batch) for batch in batches]:
        check(future.result(PATIENCE), batch)
    assert backend.sizes == [(3, 3)] * 2


def test_full_batch_does_not_wait(backend):
    check(Batcher(backend, PATIENCE).run(rows(1, 4)), rows(1, 4))
    check(Batcher(backend, PATIENCE).run(rows(1, 9)), rows(1, 9))
    assert backend.sizes == [(4, 3), (9, 3)]


def test_shapes_are_kept_apart(backend, pool):
    batcher = Batcher(backend, LONG)
    batches = [rows(1), rows(2, width=5), rows(3), rows(4, width=5)]
    for future, batch in [(pool.submit(batcher.run, batch), batch) for batch in batches]:
        check(future.result(PATIENCE), batch)
    assert sorted(backend.sizes) == [(2, 3), (2, 5)]


def test_others_join_while_the_device_is_busy(backend, pool):
    batcher = Batcher(backend, 0)
    backend.go.clear()
    first = pool.submit(batcher.run, rows(0, 4))
    assert backend.began.wait(PATIENCE)
    waiting = [pool.submit(batcher.run, rows(value)) for value in range(1, 4)]
    end = time.monotonic() + PATIENCE
    while sum(joint.rows for joint in list(batcher._open.values())) < 3 and time.monotonic() < end:
        time.sleep(0.001)
    backend.go.set()
    check(first.result(PATIENCE), rows(0, 4))
    for value, future in enumerate(waiting, 1):
        check(future.result(PATIENCE), rows(value))
    assert backend.sizes == [(4, 3), (3, 3)]


def test_every_input_is_joined(pool):
    class Two(Recording):
        def run(self, batch, mask):
            self.sizes.append((batch.shape, mask.shape))
            return {"row": batch * mask}

    backend = Two()
    batcher = Batcher(backend, LONG)
    futures = [pool.submit(batcher.run, rows(value, 2), rows(value + 1, 2, 1)) for value in (3, 5)]
    for value, future in zip((3, 5), futures, strict=True):
        np.testing.assert_array_equal(future.result(PATIENCE)["row"], rows(value * (value + 1), 2))
    assert backend.sizes == [((4, 3), (4, 1))]


def test_bad_batch_fails_alone(backend, pool):
    batcher = Batcher(backend, LONG)
    good, bad = [rows(1), rows(2)], rows(-1, 2)
    answers = [pool.submit(batcher.run, batch) for batch in good]
    failed = pool.submit(batcher.run, bad)
    with pytest.raises(ValueError, match="a bad row"):
        failed.result(PATIENCE)
    for answer, batch in zip(answers, good, strict=True):
        check(answer.result(PATIENCE), batch)
    assert backend.sizes[0] == (4, 3)
    assert sorted(backend.sizes[1:]) == [(1, 3), (1, 3), (2, 3)]
    check(batcher.run(rows(5, 4)), rows(5, 4))


def test_storm(pool):
    """Every answer goes to who asked for it."""
    backend = Recording()
    batcher = Batcher(backend, 0.0005)
    random = np.random.default_rng(0)
    asked = [
        random.integers(0, 9, (random.integers(1, 6), random.integers(2, 4))).astype(np.float32) for _ in range(500)
    ]
    asked[::50] = [rows(-1) for _ in asked[::50]]
    futures = [pool.submit(batcher.run, batch) for batch in asked]
    for future, batch in zip(futures, asked, strict=True):
        if (batch == -1).any():
            with pytest.raises(ValueError, match="a bad row"):
                future.result(PATIENCE)
        else:
            check(future.result(PATIENCE), batch)
    assert len(backend.sizes) < 500
    assert not batcher._open


def test_shows_the_backend_that_it_joins_batches_for(backend):
    batcher = Batcher(backend)
    assert (batcher.device, batcher.format, batcher.max_batch) == ("cuda", "recording", 4)


def test_torch_backend(tmp_path, pool):
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32))
    linear = torch.nn.Linear(3, 2)
    linear.load_state_dict({"weight": matrix.T, "bias": torch.zeros(2)})

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, waveform):
            return (self.linear(waveform),)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Graph().eval(), torch.zeros(2, 3)), file)
    path = tmp_path / "graph.pt"
    path.write_bytes(file.getvalue())
    backend = TorchBackend(path, ["logits"], "cpu")
    backend.max_batch = 8
    batcher = Batcher(backend, 0.05)
    batches = [np.random.default_rng(seed).normal(size=(1 + seed % 3, 3)).astype(np.float32) for seed in range(20)]
    for future, batch in [(pool.submit(batcher.run, batch), batch) for batch in batches]:
        np.testing.assert_allclose(future.result(PATIENCE)["logits"], batch @ matrix.numpy(), rtol=1e-6, atol=1e-6)
