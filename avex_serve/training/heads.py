"""Training of heads on stored embeddings: choices by grouped folds, then a head with its calibration.

A linear head on one embedding is a convex problem and is solved. Every other head is trained by AdamW. Each fit
computes on one thread of torch, since sums in another order round differently: the same data and seed give the same
bytes with any number of cores.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avex_serve.calibration.fit import TARGET, calibrate
from avex_serve.calibration.scales import Calibration, log_odds
from avex_serve.configs import ProbeConfig
from avex_serve.inference.scores import activate
from avex_serve.models.probes import build_probe_from_config
from avex_serve.models.probes.base import Probe
from avex_serve.scheduling.cores import usable_cores
from avex_serve.training.split import folds

logger = logging.getLogger(__name__)

FOLDS: Final = 4  # inside of the training data
# C of scikit-learn's LogisticRegression, with standardised features: the mean loss has the penalty 1 / (C windows).
STRENGTHS: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
STRENGTH: Final = 0.1  # where a single group leaves nothing to choose by
RATES: Final = (1e-3, 3e-3)  # of AdamW
EPOCHS: Final = 50  # at most
EPOCHS_BLIND: Final = 15  # where a single group leaves nothing to stop by
PATIENCE: Final = 5  # epochs without a lower validation loss
BATCH: Final = 32
DECAY: Final = 1e-2
MOST_WEIGHT: Final = 10.0  # of windows with a rare sound, relative to those without it

_BLOCK: Final = 1024  # windows in memory as float64; larger pieces of memory stay with the process
_KEPT_BYTES: Final = 640 * 2**20  # of standardised features; larger data is read again in each pass
_KEPT_BY_ALL: Final = 2**30  # the same of all folds at work, which on many cores are few if they are large
_WIDEST: Final = 2048  # features, for which the eigenvectors of their covariance are computed in seconds
_GRADIENT: Final = 1e-7  # where the solver stops
_GRADIENT_TO_CHOOSE: Final = 1e-6  # the same in folds: the last digits take most of the passes, and choose nothing


@dataclass(frozen=True)
class Task:
    """What a head is to learn."""

    config: ProbeConfig
    labels: tuple[str, ...]
    embeddings: Sequence[np.ndarray]  # one for each input of the head, (N, ...) float32
    targets: np.ndarray  # (N, C) int8: 1, 0, or -1 where unknown
    groups: np.ndarray  # (N,) int

    @property
    def convex(self) -> bool:
        """Whether the head is solved instead of trained."""
        return self.config.probe_type == "linear" and len(self.embeddings) == 1

    def build(self) -> Probe:
        """The head with random weights."""
        shapes = [tuple(embedding.shape[1:]) for embedding in self.embeddings]
        return build_probe_from_config(self.config, len(self.labels), "cpu", input_dim=shapes)

    def inputs(self, rows: np.ndarray) -> list[Tensor]:
        """The embeddings of some windows, for `Probe.forward`."""
        return [torch.from_numpy(np.ascontiguousarray(embedding[rows])) for embedding in self.embeddings]


@dataclass(frozen=True)
class Trained:
    """A head with its calibration, and what was chosen for it."""

    state: dict[str, Tensor]
    calibration: Calibration
    chosen: dict[str, float]

    def logits(self, task: Task, rows: np.ndarray) -> np.ndarray:
        """Logits (n, C) float32 of some windows."""
        head = task.build()
        head.load_state_dict(self.state)
        return _logits(head, task, rows)


def train(task: Task, rows: np.ndarray, seed: int, target_precision: float = TARGET) -> Trained:
    """Train a head on some windows: nothing else has an influence on it, nor on its calibration.

    The calibration is fitted to logits of folds of groups, each from a head that these groups neither trained nor
    chose: not its penalty, and neither its rate nor when it stopped.

    Args:
        task: the data.
        rows: (N,) bool, the windows to train with.
        seed: of folds, initial weights, order and dropout.
        target_precision: of the thresholds.
    """
    windows = np.flatnonzero(rows)
    targets, groups = task.targets[windows], task.groups[windows]
    count = min(FOLDS, np.unique(groups).size)
    fold = folds(targets, groups, count, seed) if count > 1 else np.zeros(windows.size, int)
    parts = [(windows[fold != i], windows[fold == i]) for i in range(count)] if count > 1 else []
    with _one_thread():
        state, chosen, logits = (_solve if task.convex else _descend)(task, windows, parts, seed)
    order = windows if not parts else np.concatenate([part for _, part in parts])
    calibration = calibrate(
        log_odds(activate(logits, "sigmoid"), "sigmoid"),  # of the scores that are served
        task.targets[order],
        task.groups[order],
        task.labels,
        source=f"logits of {count} folds of the training data" if parts else "nothing: one recording or group",
        target_precision=target_precision,
        seed=seed,
    )
    return Trained(state, calibration, chosen)


_Parts = Sequence[tuple[np.ndarray, np.ndarray]]  # windows to train with, and windows left out
# Head, choice, and the logits of the windows left out; of a single group, which can't be calibrated, zeros.
_Found = tuple[dict[str, Tensor], dict[str, float], np.ndarray]


def loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over labels of the mean logistic loss over known windows, float64."""
    z = logits.astype(np.float64)
    each = np.logaddexp(0, z) - np.where(targets == 1, z, 0)
    known = targets >= 0
    sums, counts = np.where(known, each, 0).sum(axis=0), known.sum(axis=0)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


# -- solved heads -------------------------------------------------------------------------------------------------


def _solve(task: Task, windows: np.ndarray, parts: _Parts, seed: int) -> _Found:
    def path(part: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """Logits of the windows left out, for each penalty."""
        design, left = _Design(task, part[0]), part[1]
        found, start = [], None
        for strength in STRENGTHS:
            start = design.solve(1 / (strength * len(part[0])), start, _GRADIENT_TO_CHOOSE)
            found.append(_linear_logits(task, left, *start))
        return found

    strength, logits = STRENGTH, np.zeros(task.targets[windows].shape, np.float32)
    if parts:
        largest = max(_bytes_kept(task, train.size) for train, _ in parts)
        workers = min(usable_cores(), len(parts), max(1, _KEPT_BY_ALL // max(1, largest)))
        with ThreadPoolExecutor(workers, initializer=_use_one_thread) as pool:
            paths = list(pool.map(path, parts))
        targets = [task.targets[left] for _, left in parts]

        def choose(but: int | None) -> int:
            """The best penalty for all folds but one."""
            used = [k for k in range(len(parts)) if k != but]
            known = np.concatenate([targets[k] for k in used])
            losses = [loss(np.concatenate([paths[k][i] for k in used]), known) for i in range(len(STRENGTHS))]
            return int(np.argmin(losses))

        strength = STRENGTHS[choose(None)]
        logits = np.concatenate([paths[k][choose(k)] for k in range(len(parts))])
    weight, bias = _Design(task, windows).solve(1 / (strength * windows.size))
    return {"classifier.weight": weight.float(), "classifier.bias": bias.float()}, {"C": strength}, logits


def _bytes_kept(task: Task, windows: int) -> int:
    """Bytes that the standardised features of some windows take in memory; 0 if they are read again instead."""
    size = 4 * windows * int(np.prod(task.embeddings[0].shape[1:]))
    return size if size <= _KEPT_BYTES else 0


def _linear_logits(task: Task, windows: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
    blocks = [_features(task, rows) @ weight.T + bias for rows in _blocks(windows)]
    return torch.cat(blocks).float().numpy()


def _features(task: Task, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(task.embeddings[0][rows].reshape(rows.size, -1)).double()


def _blocks(windows: np.ndarray) -> Iterator[np.ndarray]:
    return (windows[start : start + _BLOCK] for start in range(0, windows.size, _BLOCK))


def _pieces(features: Tensor) -> Iterator[Tensor]:
    return (features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK))


class _Design:
    """Standardised features of some windows, for fits with several penalties.

    The unknowns are the weights in the eigenvectors of the features' covariance, each divided by the root of the
    curvature that it has where every probability is the label's share. There the loss is nearly round, and L-BFGS
    takes tens of passes where plain weights take thousands.
    """

    def __init__(self, task: Task, windows: np.ndarray) -> None:
        self.task, self.windows = task, windows
        targets = torch.from_numpy(task.targets[windows]).double()  # (n, C)
        self.known = (targets >= 0).double()
        self.targets = targets.clamp(min=0)
        counts = self.known.sum(dim=0)
        share = self.targets.mul(self.known).sum(dim=0) / counts.clamp(min=1)
        # Without windows of both kinds there is nothing to solve: the bias alone, of one more window of each kind.
        self.solvable = (share > 0) & (share < 1)
        self.share = share.where(self.solvable, (share * counts + 1) / (counts + 2))
        self.scaled = self.known / counts.clamp(min=1)
        self.kept: Tensor | None = None  # (n, D) float32, of which each pass takes blocks as float64
        self._standardise()

    def _standardise(self) -> None:
        width = int(np.prod(self.task.embeddings[0].shape[1:]))
        total, squares = torch.zeros(width).double(), torch.zeros(width).double()
        for rows in _blocks(self.windows):
            total += _features(self.task, rows).sum(dim=0)
        self.mean = total / self.windows.size
        for rows in _blocks(self.windows):
            squares += _features(self.task, rows).sub_(self.mean).square_().sum(dim=0)
        deviation = (squares / self.windows.size).sqrt()
        self.deviation = deviation.where(deviation > 1e-12, torch.ones(()).double())  # a constant feature stays 0
        if _bytes_kept(self.task, self.windows.size):
            # One piece of memory, which goes back to the system as a whole; many smaller ones would not.
            kept = torch.empty(self.windows.size, width, dtype=torch.float32)
            for part, block in zip(_pieces(kept), self._read(), strict=True):
                part.copy_(block)
            self.kept = kept
        if width <= _WIDEST:
            covariance = torch.zeros(width, width).double()
            for block in self._standardised():
                covariance += block.T @ block
            values, vectors = torch.linalg.eigh(covariance / self.windows.size)
            self.spread, self.vectors = values.clamp(min=0), vectors
            if self.kept is not None:  # in the eigenvectors once, instead of the weights in each pass
                for part in _pieces(self.kept):
                    part.copy_(part.double() @ vectors)
        else:
            self.spread, self.vectors = torch.ones(width).double(), None

    def _read(self) -> Iterator[Tensor]:
        for rows in _blocks(self.windows):
            yield _features(self.task, rows).sub_(self.mean).div_(self.deviation)

    def _standardised(self) -> Iterable[Tensor]:
        return self._read() if self.kept is None else (part.double() for part in _pieces(self.kept))

    def solve(
        self, penalty: float, start: tuple[Tensor, Tensor] | None = None, gradient_left: float = _GRADIENT
    ) -> tuple[Tensor, Tensor]:
        """Weights (C, D) and bias (C,) float64 for features as they are; `start` is such a result to start from."""
        curvature = self.share * (1 - self.share)  # (C,)
        scale = (self.spread[:, None] * curvature + penalty).rsqrt() * self.solvable  # (D, C)
        unknown = torch.zeros(scale.shape[0] + 1, scale.shape[1], dtype=torch.float64)
        unknown[-1] = self.share.logit() * curvature.sqrt()
        if start is not None:
            weight = start[0].T * self.deviation[:, None]
            turned = weight if self.vectors is None else self.vectors.T @ weight
            unknown[:-1] = torch.where(self.solvable, turned / scale, 0.0)
            unknown[-1] = (start[1] + self.mean @ start[0].T) * curvature.sqrt()
        unknown.requires_grad_()
        solver = torch.optim.LBFGS(
            [unknown],
            max_iter=500,
            max_eval=1000,
            tolerance_grad=gradient_left,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        # Between the unknowns and the features of `_standardised`; None: these are in the eigenvectors already.
        rotation = self.vectors if self.kept is None else None

        def weights() -> tuple[Tensor, Tensor]:
            found = unknown.detach()
            turned = found[:-1] * scale
            return (turned if rotation is None else rotation @ turned), found[-1] / curvature.sqrt()

        def evaluate() -> Tensor:
            weight, bias = weights()
            total = penalty / 2 * weight.square().sum()
            gradient = penalty * weight
            slope = torch.zeros_like(bias)
            first = 0
            for block in self._standardised():
                part = slice(first, first := first + len(block))
                z = block @ weight + bias
                each = F.softplus(z) - self.targets[part] * z
                total = total + (each * self.scaled[part]).sum()
                residual = (z.sigmoid() - self.targets[part]) * self.scaled[part]
                gradient += block.T @ residual
                slope += residual.sum(dim=0)
            turned = gradient if rotation is None else rotation.T @ gradient
            unknown.grad = torch.cat([turned * scale, (slope / curvature.sqrt() * self.solvable)[None]])
            return total

        with torch.no_grad():
            solver.step(evaluate)  # type: ignore[no-untyped-call]
            evaluate()
        assert unknown.grad is not None
        if (left := float(unknown.grad.abs().max())) > 1e3 * gradient_left:
            logger.warning("the linear head has not converged for penalty %g: its gradient is %.1g", penalty, left)
        weight, bias = weights()
        if self.vectors is not None and rotation is None:
            weight = self.vectors @ weight
        weight = weight / self.deviation[:, None]
        return weight.T.contiguous(), bias - self.mean @ weight


# -- heads that are trained ---------------------------------------------------------------------------------------


class _Run(NamedTuple):
    head: Probe  # after its best epoch
    epochs: int  # the best one, from 1
    loss: float  # of the windows held out, the lowest
    rate: float


def _descend(task: Task, windows: np.ndarray, parts: _Parts, seed: int) -> _Found:
    rate, epochs, logits = RATES[0], EPOCHS_BLIND, np.zeros(task.targets[windows].shape, np.float32)
    if parts:
        choices = [_choose(task, train, seed) for train, _ in parts]
        logits = np.concatenate([_logits(c.head, task, left) for c, (_, left) in zip(choices, parts, strict=True)])
        chosen = [(c.rate, c.epochs) for c in choices]
        rate = max(sorted({r for r, _ in chosen}), key=[r for r, _ in chosen].count)
        epochs = round(float(np.mean([e for r, e in chosen if r == rate])))
    head = _run(task, windows, None, rate, epochs, seed).head
    return head.state_dict(), {"rate": rate, "epochs": epochs}, logits


def _choose(task: Task, windows: np.ndarray, seed: int) -> _Run:
    """A head whose rate and epochs some groups of the windows chose, and which the others trained."""
    targets, groups = task.targets[windows], task.groups[windows]
    count = min(FOLDS, np.unique(groups).size)
    if count < 2:
        return _run(task, windows, None, RATES[0], EPOCHS_BLIND, seed)
    held = folds(targets, groups, count, seed) == 0
    runs = [_run(task, windows[~held], windows[held], rate, EPOCHS, seed) for rate in RATES]
    return min(runs, key=lambda run: run.loss)


def _run(task: Task, windows: np.ndarray, held: np.ndarray | None, rate: float, epochs: int, seed: int) -> _Run:
    """Train on some windows, with early stopping on those held out, if there are any."""
    targets = task.targets[windows]
    present = (targets == 1).sum(axis=0)
    weight = np.clip((targets == 0).sum(axis=0) / np.maximum(present, 1), 1.0, MOST_WEIGHT)
    positive = torch.from_numpy(weight.astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = task.build()
        optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=DECAY)
        best, lowest, state = epochs, np.inf, head.state_dict()
        for epoch in range(1, epochs + 1):
            head.train()
            for batch in _batches(torch.randperm(windows.size).numpy()):
                rows = windows[batch]
                known = torch.from_numpy(task.targets[rows] >= 0).float()
                wanted = torch.from_numpy(task.targets[rows]).float().clamp(min=0)
                each = F.binary_cross_entropy_with_logits(
                    head(task.inputs(rows)), wanted, weight=known, pos_weight=positive, reduction="sum"
                )
                optimiser.zero_grad()
                (each / known.sum().clamp(min=1)).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            if held is None:
                continue
            reached = loss(_logits(head, task, held), task.targets[held])
            if reached < lowest:
                best, lowest = epoch, reached
                state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
            elif epoch - best >= PATIENCE:
                break
        if held is not None:
            head.load_state_dict(state)
    return _Run(head, best, float(lowest), rate)


def _batches(order: np.ndarray) -> Iterator[np.ndarray]:
    return (order[start : start + BATCH] for start in range(0, order.size, BATCH))


@torch.no_grad()
def _logits(head: Probe, task: Task, rows: np.ndarray) -> np.ndarray:
    head.eval()
    if not rows.size:
        return np.empty((0, len(task.labels)), np.float32)
    return torch.cat([head(task.inputs(batch)) for batch in _batches(rows)]).numpy()


# -- one thread ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _use_one_thread() -> None:
    """The same in a thread of a pool, which has a number of its own."""
    torch.set_num_threads(1)
