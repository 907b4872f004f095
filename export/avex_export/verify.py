"""Verification: each format against the eager module, through the backends that serve it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avex_export.assemble import Assembly, Graph
from avex_export.torchscript import meta_shapes
from avex_serve.models.aggregation import time_steps
from avex_serve.runtime import audio
from avex_serve.runtime.backend import Backend
from avex_serve.runtime.windows import plan_windows

# Largest error that passes, relative to the largest output or to 1, whichever is more: float32 through a
# transformer and two ways to take a spectrum.
TOLERANCE = 1e-4
# A batch of as many clips as a clip has tokens shows whether batch and time were mixed up. Beyond this it would
# take minutes and gigabytes.
_LARGEST_BATCH = 128


@dataclass(frozen=True)
class Check:
    """One comparison."""

    input: str
    batch: int
    format: str
    errors: dict[str, float]  # by output, relative to max(1, largest expected value); NaN if not finite
    passed: bool


@dataclass(frozen=True)
class Verification:
    """All comparisons of an export."""

    checks: tuple[Check, ...]
    skipped: tuple[str, ...]  # what was not compared, and why

    @property
    def passed(self) -> bool:
        """Whether everything that was compared agrees."""
        return all(check.passed for check in self.checks)

    def document(self) -> dict[str, Any]:
        """As JSON, for the bundle."""
        checks = [
            {**asdict(check), "errors": {n: e if math.isfinite(e) else None for n, e in check.errors.items()}}
            for check in self.checks
        ]
        return {"tolerance": TOLERANCE, "passed": self.passed, "checks": checks, "skipped": list(self.skipped)}

    def table(self) -> str:
        """As text."""
        names = list(self.checks[0].errors)
        head = f"{'input':24} {'batch':>5}  {'format':12}" + "".join(f"{name + ' error':>18}" for name in names)
        lines = [head]
        for check in self.checks:
            errors = "".join(f"{check.errors.get(name, math.nan):18.1e}" for name in names)
            mark = "✓" if check.passed else "✗"
            lines.append(f"{check.input[:24]:24} {check.batch:5}  {check.format:12}{errors}  {mark}")
        return "\n".join([*lines, *(f"not compared: {reason}" for reason in self.skipped)])


def verify(
    graph: Graph,
    assembly: Assembly,
    backends: Mapping[str, Backend],
    torchscript: Path | None,
    recordings: Sequence[Path] = (),
) -> Verification:
    """Compare each format with the eager module.

    Args:
        graph: the eager module.
        assembly: what was exported.
        backends: by format.
        torchscript: the traced module, to be run on the meta device too.
        recordings: real audio to compare on as well.
    """
    checks: list[Check] = []
    with torch.no_grad():
        for name, batch in _inputs(assembly, recordings):
            outputs = graph(torch.from_numpy(batch))
            expected = {n: o.numpy() for n, o in zip(graph.outputs, outputs, strict=True)}
            checks += [_compare(name, batch, form, backend, expected) for form, backend in backends.items()]
    if torchscript is not None:
        checks.append(_on_meta(graph, assembly, torchscript))
    tokens = _tokens(assembly)
    skipped = []
    if tokens > _LARGEST_BATCH:
        skipped.append(f"a batch of {tokens} clips, one for each token of a clip: too large at this clip length")
    return Verification(tuple(checks), tuple(skipped))


def _compare(name: str, batch: np.ndarray, form: str, backend: Backend, expected: Mapping[str, np.ndarray]) -> Check:
    found = backend.run(batch)
    errors = {output: _error(found[output], value) for output, value in expected.items()}
    return Check(name, len(batch), form, errors, all(error <= TOLERANCE for error in errors.values()))


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.nan
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def _on_meta(graph: Graph, assembly: Assembly, torchscript: Path) -> Check:
    example = example_batch(assembly, 3)
    with torch.no_grad():
        expected = [tuple(output.shape) for output in graph(example)]
    try:
        passed = meta_shapes(torchscript, example) == expected
    except (RuntimeError, NotImplementedError):
        passed = False
    error = 0.0 if passed else math.nan
    return Check("shapes on device meta", 3, "torchscript", dict.fromkeys(graph.outputs, error), passed)


def example_batch(assembly: Assembly, rows: int) -> torch.Tensor:
    """Noise of the input's shape, (rows, …)."""
    return torch.from_numpy(_noise(assembly, rows))


def _inputs(assembly: Assembly, recordings: Sequence[Path]) -> Iterator[tuple[str, np.ndarray]]:
    tokens = _tokens(assembly)
    for rows in sorted({1, 3, *([tokens] if tokens <= _LARGEST_BATCH else [])}):
        yield "noise", _noise(assembly, rows)
    samples, rate = assembly.clip_samples, assembly.sample_rate
    if samples is None or rate is None:
        yield "zeros", np.zeros_like(_noise(assembly, 1))
        return
    yield "digital silence", np.zeros((1, samples), np.float32)
    yield "chirp in noise", (_noise(assembly, 1) * 0.1 + 0.5 * _chirp(samples, rate)).astype(np.float32)
    for path in recordings:
        recording = audio.decode(path)
        wave = audio.resample(recording.wave, recording.sample_rate, rate)
        windows = list(plan_windows(wave.size, samples, rate, overlap=0.0).cut(wave))
        yield path.name, np.stack(windows[:3])


def _noise(assembly: Assembly, rows: int) -> np.ndarray:
    random = np.random.default_rng(rows)
    if assembly.clip_samples is not None:
        return (0.1 * random.standard_normal((rows, assembly.clip_samples))).astype(np.float32)
    (shape,) = assembly.probe.input_dim
    if assembly.probe.takes_sequence:
        shape = (_SEQUENCE_STEPS, shape[-1])
    return random.standard_normal((rows, *shape)).astype(np.float32)


# Of a head that reads sequences of any length.
_SEQUENCE_STEPS = 24


def _chirp(samples: int, rate: int) -> np.ndarray:
    time = np.arange(samples) / rate
    duration = samples / rate
    low, high = 500.0, 0.4 * rate  # Hz
    return np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * duration)))


def _tokens(assembly: Assembly) -> int:
    """Time steps of the shortest layer that the head taps, or of the embedding that it takes."""
    if assembly.clip_samples is None:
        return _SEQUENCE_STEPS if assembly.probe.takes_sequence else assembly.probe.input_dim[0][0]
    probe = assembly.probe
    assert probe.base_model is not None
    with torch.no_grad():
        tapped = probe.base_model.taps(example_batch(assembly, 1), probe.layers)
    return min(time_steps(embedding) for embedding in tapped.values())
