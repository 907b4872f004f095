"""The cases of a verification: inputs of many kinds, with the eager module's answers in float32 and in float64."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from avex_export.architectures.base import Target
from avex_export.graph import Assembly, Graph, eager_graph
from avex_serve.audio.reader import decode
from avex_serve.bundles.manifest import AudioSpec
from avex_serve.evidence.cases import INT16_SCALE, Case, Outputs
from avex_serve.models.aggregation import time_steps
from avex_serve.synthetic import LOWEST_SAMPLE_RATE, make_recording

# A batch with as many clips as a clip has tokens shows whether batch and time were mixed up. A batch larger than
# this would take minutes and gigabytes.
_LARGEST_BATCH = 128
_SEQUENCE_STEPS = 24  # of the input of a head that takes sequences of any length
_LENGTHS = {"short": 0.5, "exact": 1.0, "long": 2.4}  # of recordings, in windows
_SEED = 5  # of the synthetic recordings


def make_cases(assembly: Assembly, recordings: Sequence[Path]) -> tuple[list[Case], list[str]]:
    """The cases, and what is missing from them with the reason.

    Args:
        assembly: what is exported.
        recordings: files to verify on; none: synthetic sounds.

    Raises:
        AudioError: a recording that can't be read.
        NotFoundError: a recording that doesn't exist.
    """
    oracle = _Oracle(assembly)
    tokens, skipped = _tokens(assembly), []
    batches = sorted({1, 3, *([tokens] if tokens <= _LARGEST_BATCH else [])})
    if tokens > _LARGEST_BATCH:
        skipped.append(
            f"not compared: a batch of {tokens} clips, one for each token of a clip; it would take minutes"
        )
    inputs = list(_clips(assembly, tuple(batches)))
    cases = [oracle.clips(*each) for each in tqdm(inputs, "compute clips", leave=False, disable=None)]
    if assembly.audio is not None:
        waves = list(_waves(assembly.audio, recordings))
        shown = tqdm(waves, "compute recordings", leave=False, disable=None)
        cases += [oracle.recording(assembly.audio, *each) for each in shown]
    if oracle.why_not_exact is not None:
        skipped.append(f"not compared with float64: the module doesn't compute in it ({oracle.why_not_exact})")
    return cases, skipped


def example_inputs(assembly: Assembly, rows: int) -> tuple[Tensor, ...]:
    """Noise (rows, …) and, if the graph takes one, a padding mask, in which the first clip isn't padded."""
    batch = _noise(assembly, rows)
    if not assembly.takes_padding_mask:
        return (torch.from_numpy(batch),)
    lengths = np.linspace(1, 0.5, rows) * batch.shape[1]
    return torch.from_numpy(batch), torch.from_numpy(_mask(batch.shape[1], lengths))


class _Oracle:
    """The eager module and a copy in float64, run on one clip at a time so that clips can't influence each other."""

    def __init__(self, assembly: Assembly) -> None:
        self._graph, self._masked = eager_graph(assembly), assembly.takes_padding_mask
        self._exact: Graph | None = copy.deepcopy(self._graph).double()
        self.why_not_exact: str | None = None

    def clips(self, name: str, clips: np.ndarray, batches: tuple[int, ...], mask: np.ndarray | None = None) -> Case:
        """The case of clips (K, …) float32, with their padding mask (K, S) if they are padded."""
        masks = [None] * len(clips) if mask is None else list(torch.from_numpy(mask))
        rows = list(zip(torch.from_numpy(clips), masks, strict=True))
        return Case(name, clips, None, batches, None, *self._answers(rows), mask)

    def recording(self, audio: AudioSpec, name: str, wave: np.ndarray, rate: int) -> Case:
        """The case of a recording (S,) float32 at a rate in Hz, cut and padded by other code than the service's."""
        model_rate, window = audio.sample_rate, audio.window_samples
        resampled = wave if rate == model_rate else soxr.resample(wave, rate, model_rate, quality="HQ")
        pieces = torch.split(torch.from_numpy(resampled), window)
        lengths = np.array([len(piece) for piece in pieces])
        starts = np.arange(len(pieces)) * window
        spans = np.stack([starts, starts + lengths], axis=1) / model_rate
        rows: list[_Row] = []
        for piece in pieces:
            lacking = max(0, (audio.shortest_samples or window) - len(piece))
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
            self.why_not_exact = "its outputs are float32"
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # from a backbone of the user's
            self.why_not_exact = str(error).strip().splitlines()[0]
        self._exact = None
        return eager, None


_Row = tuple[Tensor, Tensor | None]  # a clip or embedding, and its padding


def _run(graph: Graph, rows: list[_Row]) -> Outputs:
    answers = [graph(clip[None]) if mask is None else graph(clip[None], mask[None]) for clip, mask in rows]
    return {name: torch.cat(outputs).numpy() for name, *outputs in zip(graph.outputs, *answers, strict=True)}


# -- inputs -------------------------------------------------------------------------------------------------------


def _clips(assembly: Assembly, batches: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Names, clips or embeddings (K, …), the batch sizes to run them in, and the mask of padded clips."""
    audio = assembly.audio
    if audio is None:
        yield "noise", _noise(assembly, 3), batches
        yield "zeros", np.zeros((1, *_shape(assembly)), np.float32), (1,)
        return
    random = np.random.default_rng(1)
    window, chirp = audio.window_samples, _chirp(audio.window_samples, audio.sample_rate)
    noise = _sixteen_bit(_noise(assembly, 3))
    yield "noise", noise, batches
    yield "digital silence", np.zeros((1, window), np.float32), (1,)
    yield "noise of one bit", _sixteen_bit(random.integers(-1, 2, (1, window)) / INT16_SCALE), (1,)
    yield "full scale, clipped", _sixteen_bit(10 * chirp[None]), (1,)
    yield "chirp in noise", _sixteen_bit(0.5 * chirp + 0.01 * random.standard_normal((1, window))), (1,)
    if (shortest := audio.shortest_samples) is not None:
        for name, samples in (
            ("the shortest clips", shortest),
            ("shorter clips", (shortest + 2 * window) // 3),
            ("longer clips", round(1.7 * window) + 1),
        ):
            yield name, _sixteen_bit(_noise(assembly, 3, samples)), (1, 3)
    if assembly.takes_padding_mask:
        mask = _mask(window, np.array([0.8, 0.45, 0.1]) * window)
        yield "padded clips", np.where(mask, np.float32(0), noise), (1, 3), mask


def _mask(samples: int, lengths: np.ndarray) -> np.ndarray:
    """Padding masks (K, samples) for clips of these lengths (K,)."""
    return np.arange(samples) >= lengths[:, None]


def _waves(audio: AudioSpec, recordings: Sequence[Path]) -> Iterator[tuple[str, np.ndarray, int]]:
    """Names, recordings (S,) float32 and their rates: shorter than a window, exactly one window, and longer.

    The first recording is cut or repeated to each length, the others are cut to the longest.
    """
    window, rate = audio.window_samples / audio.sample_rate, audio.sample_rate  # seconds, Hz
    for i, path in enumerate(recordings):
        wave, own_rate = decode(path)
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
    """The wave as float32, rounded to the values of a 16-bit file."""
    levels = np.clip(np.rint(wave * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1)
    return (levels / INT16_SCALE).astype(np.float32)


def _shape(assembly: Assembly) -> tuple[int, ...]:
    """The shape of an input, without the batch."""
    if assembly.audio is not None:
        return (assembly.audio.window_samples,)
    (shape,) = assembly.probe.input_dim
    return (_SEQUENCE_STEPS, shape[-1]) if assembly.probe.takes_sequence else shape


def _noise(assembly: Assembly, rows: int, samples: int | None = None) -> np.ndarray:
    """Embeddings, or clips of this many samples or a window: (rows, …)."""
    shape = _shape(assembly) if samples is None else (samples,)
    level = 1.0 if assembly.audio is None else 0.1
    return (level * np.random.default_rng(rows).standard_normal((rows, *shape))).astype(np.float32)


def _chirp(samples: int, rate: int) -> np.ndarray:
    time = np.arange(samples) / rate
    duration = samples / rate
    low, high = 500.0, 0.4 * rate  # Hz
    return np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * duration)))


def _tokens(assembly: Assembly) -> int:
    """Time steps of the shortest layer that a head taps, or of the embedding that it takes."""
    if assembly.audio is None:
        return _shape(assembly)[0]
    target = Target(assembly.probes, assembly.audio.window_samples)
    with torch.no_grad():
        tapped = target.model.taps(example_inputs(assembly, 1)[0], target.layers)
    return min(time_steps(embedding) for embedding in tapped.values())
