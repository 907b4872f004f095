"""The int8 graph of a bundle: rewritten, calibrated, written, judged."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from avex_export.cases import example_inputs
from avex_export.graph import Assembly, AudioGraph, export_graph
from avex_export.int8.clips import Clips, built_in, from_recordings
from avex_export.int8.gates import check, compare
from avex_export.int8.products import quantise
from avex_export.onnx_graph import write_onnx
from avex_serve.bundles.manifest import Manifest, Quantisation
from avex_serve.errors import ExportError
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.efficientnet import EfficientNetModel


def refuse_unfit(assembly: Assembly, formats: Collection[str]) -> None:
    """Raise ExportError if there is no int8 graph for what was assembled."""
    model = assembly.probe.base_model
    if assembly.clip_samples is None:
        raise ExportError("--quantize is for audio: a head alone is too small to gain; leave out --quantize")
    if isinstance(model, EfficientNetModel):
        raise ExportError(
            "EfficientNet has no int8 graph: on CPUs with AVX2 alone its convolutions are slower in integers than "
            "in float32, and its embeddings broken (cosine 0.6); leave out --quantize"
        )
    if not isinstance(model, BEATsModel | EATModel):
        raise ExportError(f"--quantize int8 is for BEATs and EAT, not {type(model).__name__}; leave out --quantize")
    if assembly.masked:
        raise ExportError("--quantize int8 is not calibrated for padded clips; leave out --padding-mask")
    if "onnx" not in formats:
        raise ExportError(
            "--quantize int8 is a graph for onnxruntime and is judged by the float32 one; export "
            "--format onnx as well"
        )


def find_clips(assembly: Assembly, recordings: Path | None) -> Clips:
    """Clips of a folder's recordings, or of built-in sounds for None.

    Raises:
        InputError: too few recordings.
        AudioError: a recording is damaged.
    """
    samples, rate = assembly.clip_samples, assembly.sample_rate
    assert samples is not None
    assert rate is not None
    return built_in(samples, rate) if recordings is None else from_recordings(recordings, samples, rate)


def add_int8(
    assembly: Assembly,
    path: Path,
    metadata: Mapping[str, str],
    exact: Backend,
    manifest: Manifest,
    clips: Clips,
    without: Collection[str] = (),
) -> tuple[Backend, Quantisation]:
    """Write the int8 graph, compare it with the float32 one, and give what runs it and what it is.

    Args:
        assembly: that `refuse_unfit` lets pass.
        path: of the graph.
        metadata: of the graph.
        exact: runs the float32 graph.
        manifest: of the bundle that is being made.
        clips: what to calibrate and to judge it on.
        without: passes to leave out, see `avex_export.passes`.

    Raises:
        ExportError: the graph is too far from the float32 one.
    """
    graph = export_graph(assembly, without)
    assert isinstance(graph, AudioGraph)
    products = quantise(graph, torch.from_numpy(clips.calibration))
    example = example_inputs(assembly, 2)
    write_onnx(graph, example, path, ["waveform"], metadata, without)
    rounded = OnnxBackend(path, ["waveform"], list(graph.outputs), int8=True)
    agreement = compare(exact, rounded, clips.held_out, manifest)
    check(agreement)
    return rounded, Quantisation(
        kind="int8",
        file=path.name,
        weight_bits=7,
        products=products,
        calibration=clips.source,
        agreement=agreement,
    )
