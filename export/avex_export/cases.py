"""What is verified: inputs of every kind, with what the eager module answers to them, in float32 and in float64."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from avex_export.graph import Assembly, Graph
from avex_export.passes import Target
from avex_export.progress import bar
from avex_serve.audio import reader as audio
from avex_serve.evidence.cases import INT16_SCALE, Case, Outputs
from avex_serve.models.aggregation import time_steps
from avex_serve.synthetic import LOWEST_SAMPLE_RATE, make_recording

# A batch of as many clips as a clip has tokens shows whether batch and time were mixed up. Beyond this it would
# take minutes and gigabytes.
_LARGEST_BATCH = 128
# Of a head that reads sequences of any length.
_SEQUENCE_STEPS = 24
_LENGTHS = {"short": 0.5, "exact": 1.0, "long": 2.4}  # of recordings, in windows
_SEED = 5  # of the synthetic recordings


def make_cases(graph: Graph, assembly: Assembly, recordings: Sequence[Path]) -> tuple[list[Case], list[str]]:
    """The cases, and what could not be among them with the reason.

    Args:
        graph: the eager module.
        assembly: what was exported.
        recordings: real audio; none: synthetic sounds.

    Raises:
        AudioError: a recording that can't be read.
        NotFoundError: a recording that is not there.
    """
    oracle = _Oracle(graph, assembly)
    tokens, skipped = _tokens(assembly), []
    batches = sorted({1, 3, *([tokens] if tokens <= _LARGEST_BATCH else [])})
    if tokens > _LARGEST_BATCH:
        skipped.append(
            f"not compared: a batch of {tokens} clips, one for each token of a clip: too large at this clip length"
        )
    cases = [
        oracle.clips(name, clips, tuple(batches) if len(clips) > 1 else (1,))
        for name, clips in bar(list(_clips(assembly)), "compute clips")
    ]
    others = [*_lengths(assembly), *_padded(assembly)]
    cases += [oracle.clips(name, clips, (1, 3), mask) for name, clips, mask in bar(others, "compute other lengths")]
    if assembly.clip_samples is not None and assembly.sample_rate is not None:
        waves = _waves(assembly.clip_samples / assembly.sample_rate, assembly.sample_rate, recordings)
        for name, wave, rate in bar(list(waves), "compute recordings"):
            cases.append(oracle.recording(name, wave, rate, assembly.sample_rate))
    if oracle.why_not_exact is not None:
        skipped.append(f"not compared with float64: the module doesn't compute in it ({oracle.why_not_exact})")
    return cases, skipped


def example_batch(assembly: Assembly, rows: int) -> Tensor:
    """Noise of the input's shape, (rows, …)."""
    return torch.from_numpy(_noise(assembly, rows))


def example_inputs(assembly: Assembly, rows: int) -> tuple[Tensor, ...]:
    """What a graph takes: `example_batch` and, if it takes a padding mask, one that spares the first clip alone."""
    batch = example_batch(assembly, rows)
    if not assembly.masked:
        return (batch,)
    lengths = np.linspace(1, 0.5, rows) * batch.shape[1]
    return batch, torch.from_numpy(_mask(batch.shape[1], lengths))


class _Oracle:
    """The eager module, one clip at a time so that clips can't influence each other, and its copy in float64."""

    def __init__(self, graph: Graph, assembly: Assembly) -> None:
        self._graph, self._window, self._masked = graph, assembly.clip_samples, assembly.masked
        self._shortest = assembly.clip_samples if assembly.shortest_samples is None else assembly.shortest_samples
        self._exact: Graph | None = copy.deepcopy(graph).double()
        self.why_not_exact: str | None = None

    def clips(self, name: str, clips: np.ndarray, batches: tuple[int, ...], mask: np.ndarray | None = None) -> Case:
        """Of clips (K, …) float32, with their padding if there is any."""
        masks = [None] * len(clips) if mask is None else list(torch.from_numpy(mask))
        rows = list(zip(torch.from_numpy(clips), masks, strict=True))
        return Case(name, clips, None, batches, None, *self._answers(rows), mask)

    def recording(self, name: str, wave: np.ndarray, rate: int, model_rate: int) -> Case:
        """Of a recording (S,) float32 at a rate in Hz; what the run time does to it is done here by other code."""
        assert self._window is not None
        assert self._shortest is not None
        resampled = wave if rate == model_rate else soxr.resample(wave, rate, model_rate, quality="HQ")
        pieces = torch.split(torch.from_numpy(resampled), self._window)
        lengths = np.array([len(piece) for piece in pieces])
        starts = np.arange(len(pieces)) * self._window
        spans = np.stack([starts, starts + lengths], axis=1) / model_rate
        rows: list[_Row] = []
        for piece in pieces:
            lacking = max(0, self._shortest - len(piece))
            padded = torch.nn.functional.pad(piece, (0, lacking))
            mask = torch.cat([torch.zeros(len(piece)), torch.ones(lacking)]).bool()
            rows.append((padded, mask if self._masked else None))
        return Case(name, wave, rate, (), spans, *self._answers(rows))

    @torch.no_grad()
    def _answers(self, rows: list["_Row"]) -> tuple[Outputs, Outputs | None]:
        eager = _run(self._graph, rows)
        if self._exact is None:
            return eager, None
        try:
            exact = _run(self._exact, [(clip.double(), mask) for clip, mask in rows])
            if all(value.dtype == np.float64 for value in exact.values()):
                return eager, exact
            self.why_not_exact = "its outputs are float32 all the same"
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # a backbone of the user's own
            self.why_not_exact = str(error).strip().splitlines()[0]
        self._exact = None
        return eager, None


_Row = tuple[Tensor, Tensor | None]  # a clip or embedding, and its padding


def _run(graph: Graph, rows: list[_Row]) -> Outputs:
    answers = [graph(clip[None]) if mask is None else graph(clip[None], mask[None]) for clip, mask in rows]
    return {name: torch.cat(outputs).numpy() for name, *outputs in zip(graph.outputs, *answers, strict=True)}


# -- inputs -------------------------------------------------------------------------------------------------------


def _clips(assembly: Assembly) -> Iterator[tuple[str, np.ndarray]]:
    """Clips or embeddings (K, …) by name."""
    samples, rate = assembly.clip_samples, assembly.sample_rate
    if samples is None or rate is None:
        yield "noise", _noise(assembly, 3)
        yield "zeros", np.zeros_like(_noise(assembly, 1))
        return
    random = np.random.default_rng(1)
    chirp = _chirp(samples, rate)
    yield "noise", _sixteen_bit(_noise(assembly, 3))
    yield "digital silence", np.zeros((1, samples), np.float32)
    yield "noise of one bit", _sixteen_bit(random.integers(-1, 2, (1, samples)) / INT16_SCALE)
    yield "full scale, clipped", _sixteen_bit(10 * chirp[None])
    yield "chirp in noise", _sixteen_bit(0.5 * chirp + 0.01 * random.standard_normal((1, samples)))


def _lengths(assembly: Assembly) -> Iterator[tuple[str, np.ndarray, None]]:
    """Clips (3, S) of other lengths by name, if the graph takes any."""
    window, shortest = assembly.clip_samples, assembly.shortest_samples
    if window is None or shortest is None:
        return
    for name, samples in (
        ("the shortest clips", shortest),
        ("shorter clips", (shortest + 2 * window) // 3),
        ("longer clips", round(1.7 * window) + 1),
    ):
        yield name, _sixteen_bit(_noise(replace(assembly, clip_samples=samples), 3)), None


def _padded(assembly: Assembly) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Clips (3, S) of several lengths, padded with zeros to one, and their masks by name, if the graph takes any."""
    if not assembly.masked:
        return
    clips = _sixteen_bit(_noise(assembly, 3))
    mask = _mask(clips.shape[1], np.array([0.8, 0.45, 0.1]) * clips.shape[1])
    yield "padded clips", np.where(mask, np.float32(0), clips), mask


def _mask(samples: int, lengths: np.ndarray) -> np.ndarray:
    """Padding masks (K, samples) of clips of some lengths (K,)."""
    return np.arange(samples) >= lengths[:, None]


def _waves(window: float, rate: int, recordings: Sequence[Path]) -> Iterator[tuple[str, np.ndarray, int]]:
    """Recordings (S,) float32 with names and rates, that fill a window in part, just so, and more than one.

    Args:
        window: in seconds.
        rate: of the model, in Hz.
        recordings: the first is cut or repeated for each length, of the others the beginning is taken; none:
            synthetic sounds.
    """
    for i, path in enumerate(recordings):
        wave, own_rate = audio.decode(path)
        wave = _sixteen_bit(wave)
        if i > 0:
            yield path.name, wave[: round(_LENGTHS["long"] * window * own_rate)], own_rate
            continue
        for name, part in _LENGTHS.items():
            yield f"{name}: {path.name}", np.resize(wave, max(1, round(part * window * own_rate))), own_rate
    if recordings:
        return
    low = max(rate, LOWEST_SAMPLE_RATE)
    lengths = [(name, part, low) for name, part in _LENGTHS.items()]
    for name, part, own_rate in (*lengths, ("another rate", 1.2, 44100 if low != 44100 else 48000)):
        wave, _ = make_recording(_SEED, seconds=part * window, sample_rate=own_rate)
        yield f"{name}: synthetic", _sixteen_bit(wave), own_rate


def _sixteen_bit(wave: np.ndarray) -> np.ndarray:
    """As a 16-bit file holds it, float32."""
    levels = np.clip(np.rint(wave * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
    return (levels / INT16_SCALE).astype(np.float32)


def _noise(assembly: Assembly, rows: int) -> np.ndarray:
    random = np.random.default_rng(rows)
    if assembly.clip_samples is not None:
        return (0.1 * random.standard_normal((rows, assembly.clip_samples))).astype(np.float32)
    (shape,) = assembly.probe.input_dim
    if assembly.probe.takes_sequence:
        shape = (_SEQUENCE_STEPS, shape[-1])
    return random.standard_normal((rows, *shape)).astype(np.float32)


def _chirp(samples: int, rate: int) -> np.ndarray:
    time = np.arange(samples) / rate
    duration = samples / rate
    low, high = 500.0, 0.4 * rate  # Hz
    return np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * duration)))


def _tokens(assembly: Assembly) -> int:
    """Time steps of the shortest layer that a head taps, or of the embedding that it takes."""
    if assembly.clip_samples is None:
        return _SEQUENCE_STEPS if assembly.probe.takes_sequence else assembly.probe.input_dim[0][0]
    target = Target(assembly.probes, assembly.clip_samples)
    with torch.no_grad():
        tapped = target.model.taps(example_batch(assembly, 1), target.layers)
    return min(time_steps(embedding) for embedding in tapped.values())
