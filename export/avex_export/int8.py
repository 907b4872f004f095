"""Int8: a graph whose products are in 8-bit integers, about twice as fast on a CPU and a third of the size.

It is calibrated on one set of clips, compared with the float32 graph on another, and written only if both agree. The
method and its reasons: docs/decisions/int8.md.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from avex_export.architectures import architecture_of, names
from avex_export.cases import example_inputs
from avex_export.formats import write_onnx
from avex_export.graph import Assembly, export_graph
from avex_export.products import quantise
from avex_serve.archive.files import find_recordings
from avex_serve.audio.reader import decode, resample
from avex_serve.audio.windows import plan_windows
from avex_serve.bundles.manifest import Activation, Agreement, Manifest, Quantisation
from avex_serve.errors import AudioError, ExportError, InputError, NotFoundError
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.synthetic import LOWEST_SAMPLE_RATE, make_recording

_T = TypeVar("_T")
Outputs = Mapping[str, np.ndarray]  # of a graph by name, each (1, …)

# Gates: a graph is written only if these means over the held-out clips are not below them. The centred cosine is the
# hard one: a transformer's embeddings have most of their length in common, and clips differ in the rest only.
COSINE = 0.999
CENTRED_COSINE = 0.99
DECISIONS = 0.98
# A share of few decisions says little: of 24, one that differs makes 96%. So the lower end of its confidence
# interval counts too, and more clips are compared until both gates are passed, or can't be.
LEAST_DECISIONS = 0.95
_CONFIDENCE = 1.96  # standard deviations: 95%
# Embeddings are equal if their distances to the mean are at most this part of its length, the precision of float32.
_SAME = 1e-5

# Seconds of audio for a calibration, and limits of the number of its clips. They are one batch, so their number
# determines the memory: 3 GB for BEATs at 10 s.
_SECONDS = 80.0
_FEWEST, _MOST = 8, 24
HELD_OUT_CLIPS = 24
MOST_HELD_OUT = 192  # with 3 decisions of a softmax that differ, the interval begins at 95.5%
# Fewer clips don't show whether the distances between clips are kept; built-in sounds are held out then too.
LEAST_CLIPS = 12
# At most this number of files, spread evenly over a large folder.
_FILES = 200
# Clips of the calibration that are not from the recordings: sounds, and noise at another level.
_BUILT_IN = 3


def refuse_unfit(assembly: Assembly, formats: Collection[str]) -> None:
    """Raise ExportError if there is no int8 graph for these probes."""
    model = assembly.probe.base_model
    if model is None:
        raise ExportError("--quantize is for audio: a head alone would not be faster; leave out --quantize")
    architecture = architecture_of(model)
    if architecture.blocks is None:
        usual = f"--quantize int8 is for {names(lambda each: each.blocks)}, not {type(model).__name__}"
        raise ExportError(f"{architecture.refusals.get('--quantize', usual)}; leave out --quantize")
    if assembly.takes_padding_mask:
        raise ExportError("--quantize int8 is not calibrated for padded clips; leave out --padding-mask")
    if "onnx" not in formats:
        raise ExportError(
            "--quantize int8 makes a graph for onnxruntime and compares it with the float32 one; export "
            "--format onnx as well"
        )


def add_int8(
    assembly: Assembly,
    path: Path,
    metadata: Mapping[str, str],
    exact: Backend,
    manifest: Manifest,
    clips: "Clips",
    without: Collection[str] = (),
) -> tuple[Backend, Quantisation]:
    """Write the int8 graph, and compare it with the float32 graph, which the backend `exact` runs.

    Returns:
        The backend that runs the int8 graph, and its description for the manifest.

    Raises:
        ExportError: the graph differs too much from the float32 one.
    """
    graph = export_graph(assembly, without)
    products = quantise(graph, torch.from_numpy(clips.calibration))
    write_onnx(graph, example_inputs(assembly, 2), path, assembly.input_names, metadata, without)
    rounded = OnnxBackend(path, assembly.input_names, list(graph.outputs), int8=True)
    agreement = measure_agreement(exact, rounded, clips.held_out, manifest, clips.spare)
    check_gates(agreement)
    return rounded, Quantisation(
        kind="int8",
        file=path.name,
        weight_bits=7,
        products=products,
        calibration=clips.source,
        agreement=agreement,
    )


# -- clips ----------------------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    """Clips at the model's rate, and their source."""

    calibration: np.ndarray  # (N, S) float32
    held_out: np.ndarray  # (M, S) float32
    spare: Iterator[np.ndarray]  # each (S,) float32, to compare if those held out don't suffice
    source: str


def find_clips(samples: int, rate: int, folder: Path | None, say: Callable[[str], None] = print) -> Clips:
    """Clips for the calibration, and others for the comparison.

    Args:
        samples: of a clip.
        rate: of the clips, in Hz.
        folder: with recordings, also in its subfolders. Every other clip is held out, and a few built-in sounds join
            the calibration, so that it also covers sounds that no recording has. None: built-in sounds only.
        say: is called with each recording that is left out, and why.

    Raises:
        InputError: no folder, or no recording in it that can be used.
    """
    wanted = max(_FEWEST, min(_MOST, math.ceil(_SECONDS * rate / samples)))
    recorded = [] if folder is None else list(_cut(folder, samples, rate, say))
    if folder is not None and not recorded:
        raise InputError(f"--calibration {folder} holds no recording that can be used; give WAV, FLAC, OGG or MP3")
    sounds = wanted if folder is None else max(_BUILT_IN, wanted - len(recorded[::2]))
    calibration = _spread(recorded[::2], wanted - sounds)
    calibration += [*_sounds(samples, rate, range(sounds - 1)), _noise(samples)]
    source = "built-in sounds" if folder is None else f"{len(recorded)} clips of the recordings"
    held_out = _spread(recorded[1::2], HELD_OUT_CLIPS)
    unused = [clip for clip in recorded[1::2] if not any(clip is held for held in held_out)]
    others = _sounds(
        samples, rate, range(1000, 1000 + MOST_HELD_OUT)
    )  # of other seeds than those of the calibration
    if len(recorded) < LEAST_CLIPS:
        held_out += itertools.islice(others, HELD_OUT_CLIPS - len(held_out))
        source += "" if folder is None else ", and built-in sounds"
    spare = itertools.islice(itertools.chain(unused, others), MOST_HELD_OUT - len(held_out))
    return Clips(np.stack(calibration), np.stack(held_out), spare, source)


def _cut(folder: Path, samples: int, rate: int, say: Callable[[str], None]) -> Iterator[np.ndarray]:
    if not folder.is_dir():
        raise InputError(f"--calibration {folder} is not a folder; give one with recordings")
    found = find_recordings([str(folder)])
    if note := found.note():
        say(note)
    files = list(found.recordings)
    most = -(-2 * MOST_HELD_OUT // max(1, min(len(files), _FILES)))
    for path in _spread(files, _FILES):
        try:
            recording = decode(path)
            wave = resample(recording.wave, recording.sample_rate, rate)
        except (AudioError, NotFoundError) as error:  # not the end of a calibration on a folder
            say(f"left out {error}" if path in str(error) else f"left out {path}: {error}")
            continue
        yield from _spread(list(plan_windows(wave.size, samples, rate, overlap=0.0).cut(wave)), most)


def _spread(things: list[_T], most: int) -> list[_T]:
    """At most `most` of the things, at equal distances."""
    if len(things) <= most:
        return things
    return [things[i * len(things) // most] for i in range(most)]


def _sounds(samples: int, rate: int, seeds: range) -> Iterator[np.ndarray]:
    for seed in seeds:
        # The clip is the start of a recording that is long enough to hold sounds.
        seconds = max(samples / rate, 2.0)
        wave, _ = make_recording(seed, seconds=seconds, sample_rate=max(rate, LOWEST_SAMPLE_RATE))
        yield resample(wave, max(rate, LOWEST_SAMPLE_RATE), rate)[:samples]


def _noise(samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


# -- gates ----------------------------------------------------------------------------------------------------------


def agreement_text(agreement: Agreement) -> str:
    """The figures with their gates, as text."""
    decisions = ""
    if agreement.decisions is not None:
        decisions = f", same decisions {agreement.decisions:.1%} (gate {DECISIONS:.0%})"
        if agreement.decided is not None:
            low, high = _interval(agreement.decisions, agreement.decided)
            decisions += (
                f" of {agreement.decided}, 95% interval {low:.1%} to {high:.1%} (gate {LEAST_DECISIONS:.0%})"
            )
    return (
        f"int8 against float32 on {agreement.clips} clips held out: cosine {agreement.cosine:.4f} (gate {COSINE}), "
        f"centred cosine {agreement.centred_cosine:.4f} (gate {CENTRED_COSINE}), lowest of a clip "
        f"{agreement.lowest_centred_cosine:.4f}{decisions}"
    )


def check_gates(agreement: Agreement) -> None:
    """Raise ExportError with the figures unless all gates are passed."""
    if not (_looks_alike(agreement) and _decides_alike(agreement)):
        raise ExportError(
            f"{agreement_text(agreement)}: this model can't be served in int8. Calibrate on recordings like those "
            "that you will run it on (--calibration DIR), or export without --quantize"
        )


def measure_agreement(
    exact: Backend, rounded: Backend, clips: np.ndarray, manifest: Manifest, spare: Iterable[np.ndarray] = ()
) -> Agreement:
    """Run both graphs on clips, one by one as the service does; the worst output counts.

    Args:
        exact: runs the float32 graph.
        rounded: runs the int8 graph.
        clips: (M, S).
        manifest: of the bundle.
        spare: further clips (S,), which are run while too few decisions are compared to judge their share.

    Raises:
        ExportError: all clips have the same embedding in float32.
    """
    runs: list[tuple[Outputs, Outputs]] = []
    more, spare = list(clips), iter(spare)
    while more:
        shown = tqdm(more, "compare", leave=False, disable=None)
        runs += [(exact.run(clip[None]), rounded.run(clip[None])) for clip in shown]
        agreement = _agreement(runs, manifest)
        more = [] if _is_judged(agreement) else list(itertools.islice(spare, len(runs)))
    return agreement


def _agreement(runs: Sequence[tuple[Outputs, Outputs]], manifest: Manifest) -> Agreement:
    """How closely the answers of both graphs agree, a pair for each clip."""
    expected, found = (
        {name: np.concatenate([run[name] for run in answers]).astype(np.float64) for name in answers[0]}
        for answers in zip(*runs, strict=True)
    )
    cosines, centred = [], []
    for info in manifest.embeddings:
        embeddings = [outputs[info.output].reshape(len(runs), -1) for outputs in (expected, found)]
        mean = embeddings[0].mean(axis=0)
        if np.linalg.norm(embeddings[0] - mean, axis=1).max() <= _SAME * np.linalg.norm(mean):
            raise ExportError(
                f"all {len(runs)} clips held out have the same embedding, so they can't show whether int8 keeps "
                "clips apart. Calibrate on recordings that differ (--calibration DIR)"
            )
        cosines.append(_cosines(*embeddings))
        centred.append(_cosines(*(embedding - mean for embedding in embeddings)))
    alike = [
        _decisions(expected[p.logits], p.activation) == _decisions(found[p.logits], p.activation)
        for p in manifest.probes
    ]
    worst = min(alike, key=np.mean, default=None)
    return Agreement(
        clips=len(runs),
        cosine=float(np.mean(cosines, axis=1).min()),
        centred_cosine=float(np.mean(centred, axis=1).min()),
        lowest_centred_cosine=float(np.min(centred)),
        decisions=None if worst is None else float(worst.mean()),
        decided=None if worst is None else worst.size,
    )


def _interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's confidence interval of a share of this many, https://doi.org/10.1080/01621459.1927.10502953."""
    square = _CONFIDENCE**2 / count
    centre = share + square / 2
    half = _CONFIDENCE * math.sqrt((share * (1 - share) + square / 4) / count)
    return (centre - half) / (1 + square), (centre + half) / (1 + square)


def _looks_alike(agreement: Agreement) -> bool:
    return agreement.cosine >= COSINE and agreement.centred_cosine >= CENTRED_COSINE  # NaN fails


def _decides_alike(agreement: Agreement) -> bool:
    if agreement.decisions is None or agreement.decided is None:
        return agreement.decisions is None
    low, _ = _interval(agreement.decisions, agreement.decided)
    return agreement.decisions >= DECISIONS and low >= LEAST_DECISIONS


def _is_judged(agreement: Agreement) -> bool:
    """Whether more clips would hardly change the judgement."""
    if agreement.decisions is None or agreement.decided is None:
        return True
    if _decides_alike(agreement) or not _looks_alike(agreement):
        return True
    return _interval(agreement.decisions, agreement.decided)[1] < DECISIONS


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.where(norms > 0, (first * second).sum(axis=1) / np.maximum(norms, math.ulp(0.0)), 0.0)


def _decisions(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """The best label of each clip, or whether each label is detected: a score of 0.5, a logit of 0."""
    return logits.argmax(axis=-1) if activation == "softmax" else logits >= 0
