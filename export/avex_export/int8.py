"""Int8: a graph whose products are in 8-bit integers, about twice as fast on a CPU and a third of the size.

It is calibrated on one set of clips, compared with the float32 graph on another, and written only if both agree. The
method and its reasons: docs/decisions/int8.md.
"""

import math
from collections.abc import Collection, Iterator, Mapping
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
from avex_serve.audio.reader import decode, resample
from avex_serve.audio.windows import plan_windows
from avex_serve.bundles.manifest import Activation, Agreement, Manifest, Quantisation
from avex_serve.errors import ExportError, InputError
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.synthetic import LOWEST_SAMPLE_RATE, make_recording

_T = TypeVar("_T")

# Gates: a graph is written only if these means over the held-out clips are not below them. The centred cosine is the
# hard one: a transformer's embeddings have most of their length in common, and clips differ in the rest only.
COSINE = 0.999
CENTRED_COSINE = 0.99
DECISIONS = 0.98
# Embeddings are equal if their distances to the mean are at most this part of its length, the precision of float32.
_SAME = 1e-5

# Seconds of audio for a calibration, and limits of the number of its clips. They are one batch, so their number
# determines the memory: 3 GB for BEATs at 10 s.
_SECONDS = 80.0
_FEWEST, _MOST = 8, 24
HELD_OUT_CLIPS = 24
# Fewer clips don't show whether the distances between clips are kept.
LEAST_CLIPS = 12
# At most this number of files, spread evenly over a large folder.
_FILES = 200
# Clips of the calibration that are not from the recordings: sounds, and noise at another level.
_BUILT_IN = 3

_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"}


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
    agreement = measure_agreement(exact, rounded, clips.held_out, manifest)
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
    source: str


def find_clips(samples: int, rate: int, folder: Path | None) -> Clips:
    """Clips for the calibration, and others for the comparison.

    Args:
        samples: of a clip.
        rate: of the clips, in Hz.
        folder: with recordings, also in its subfolders. Every other clip is held out, and a few built-in sounds join
            the calibration, so that it also covers sounds that no recording has. None: built-in sounds only.

    Raises:
        InputError: no folder, or recordings of fewer than `LEAST_CLIPS` clips.
        AudioError: a recording is damaged.
    """
    wanted = max(_FEWEST, min(_MOST, math.ceil(_SECONDS * rate / samples)))
    recorded = [] if folder is None else list(_cut(folder, samples, rate))
    if folder is not None and len(recorded) < LEAST_CLIPS:
        raise InputError(
            f"--calibration {folder} holds {len(recorded)} clips of {samples / rate:g} s; expected at least "
            f"{LEAST_CLIPS}: half of them are held out for the comparison"
        )
    sounds = wanted if folder is None else _BUILT_IN
    calibration = _spread(recorded[::2], wanted - sounds)
    calibration += [*_sounds(samples, rate, range(sounds - 1)), _noise(samples)]
    if folder is None:  # sounds of other seeds
        held_out, source = list(_sounds(samples, rate, range(1000, 1000 + HELD_OUT_CLIPS))), "built-in sounds"
    else:
        held_out, source = _spread(recorded[1::2], HELD_OUT_CLIPS), f"{len(recorded)} clips of the recordings"
    return Clips(np.stack(calibration), np.stack(held_out), source)


def _cut(folder: Path, samples: int, rate: int) -> Iterator[np.ndarray]:
    if not folder.is_dir():
        raise InputError(f"--calibration {folder} is not a folder; give one with recordings")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    most = -(-4 * HELD_OUT_CLIPS // max(1, min(len(files), _FILES)))
    for path in _spread(files, _FILES):
        recording = decode(path)
        wave = resample(recording.wave, recording.sample_rate, rate)
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
    return (
        f"int8 against float32 on {agreement.clips} clips held out: cosine {agreement.cosine:.4f} (gate {COSINE}), "
        f"centred cosine {agreement.centred_cosine:.4f} (gate {CENTRED_COSINE}), lowest of a clip "
        f"{agreement.lowest_centred_cosine:.4f}{decisions}"
    )


def check_gates(agreement: Agreement) -> None:
    """Raise ExportError with the figures unless all gates are passed."""
    decisions = 1.0 if agreement.decisions is None else agreement.decisions
    # In this form NaN fails.
    if not (agreement.cosine >= COSINE and agreement.centred_cosine >= CENTRED_COSINE and decisions >= DECISIONS):
        raise ExportError(
            f"{agreement_text(agreement)}: this model can't be served in int8. Calibrate on recordings like those "
            "that you will run it on (--calibration DIR), or export without --quantize; nothing was written"
        )


def measure_agreement(exact: Backend, rounded: Backend, clips: np.ndarray, manifest: Manifest) -> Agreement:
    """Run both graphs on clips (M, S), one by one as the service does; the worst output counts.

    Raises:
        ExportError: all clips have the same embedding in float32.
    """
    shown = tqdm(clips, "compare", leave=False, disable=None)
    runs = [(exact.run(clip[None]), rounded.run(clip[None])) for clip in shown]
    expected, found = (
        {name: np.concatenate([run[name] for run in answers]).astype(np.float64) for name in answers[0]}
        for answers in zip(*runs, strict=True)
    )
    cosines, centred = [], []
    for info in manifest.embeddings:
        embeddings = [outputs[info.output].reshape(len(clips), -1) for outputs in (expected, found)]
        mean = embeddings[0].mean(axis=0)
        if np.linalg.norm(embeddings[0] - mean, axis=1).max() <= _SAME * np.linalg.norm(mean):
            raise ExportError(
                f"all {len(clips)} clips held out have the same embedding, so they can't show whether int8 keeps "
                "clips apart. Calibrate on recordings that differ (--calibration DIR); nothing was written"
            )
        cosines.append(_cosines(*embeddings))
        centred.append(_cosines(*(embedding - mean for embedding in embeddings)))
    decided = [
        np.mean(_decisions(expected[p.logits], p.activation) == _decisions(found[p.logits], p.activation))
        for p in manifest.probes
    ]
    return Agreement(
        clips=len(clips),
        cosine=float(np.mean(cosines, axis=1).min()),
        centred_cosine=float(np.mean(centred, axis=1).min()),
        lowest_centred_cosine=float(np.min(centred)),
        decisions=float(min(decided)) if decided else None,
    )


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.where(norms > 0, (first * second).sum(axis=1) / np.maximum(norms, math.ulp(0.0)), 0.0)


def _decisions(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """The best label of each clip, or whether each label is detected: a score of 0.5, a logit of 0."""
    return logits.argmax(axis=-1) if activation == "softmax" else logits >= 0
