"""Int8: a graph whose products are in 8-bit integers, about twice as fast on a CPU and a third of the size.

`products` rounds them, `clips` finds the audio to calibrate and to judge on, and `gates` decides whether the result
may be shipped. The recipe and its reasons: docs/decisions/int8.md.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from avex_export.architectures import architecture_of, names
from avex_export.cases import example_inputs
from avex_export.formats import write_onnx
from avex_export.graph import Assembly, AudioGraph, export_graph
from avex_export.int8 import gates
from avex_export.int8.clips import Clips, built_in, from_recordings
from avex_export.int8.products import quantise
from avex_serve.bundles.manifest import Manifest, Quantisation
from avex_serve.errors import ExportError
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend


def refuse_unfit(assembly: Assembly, formats: Collection[str]) -> None:
    """Raise ExportError if there is no int8 graph for what was assembled."""
    model = assembly.probe.base_model
    if assembly.clip_samples is None or model is None:
        raise ExportError("--quantize is for audio: a head alone is too small to gain; leave out --quantize")
    architecture = architecture_of(model)
    if architecture.blocks is None:
        usual = f"--quantize int8 is for {names(lambda each: each.blocks)}, not {type(model).__name__}"
        raise ExportError(f"{architecture.refusals.get('--quantize', usual)}; leave out --quantize")
    if assembly.masked:
        raise ExportError("--quantize int8 is not calibrated for padded clips; leave out --padding-mask")
    if "onnx" not in formats:
        raise ExportError(
            "--quantize int8 makes a graph for onnxruntime and compares it with the float32 one; export "
            "--format onnx as well"
        )


def find_clips(assembly: Assembly, recordings: Path | None) -> Clips:
    """Clips of a folder's recordings; for None, clips of built-in sounds.

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
    """Write the int8 graph and compare it with the float32 one.

    Args:
        assembly: one that `refuse_unfit` accepts.
        path: of the graph.
        metadata: of the graph.
        exact: runs the float32 graph.
        manifest: of the bundle that is being made.
        clips: what to calibrate and to judge it on.
        without: passes to leave out, see `avex_export.passes`.

    Returns:
        What runs the graph, and its description for the manifest.

    Raises:
        ExportError: the graph is too far from the float32 one.
    """
    graph = export_graph(assembly, without)
    assert isinstance(graph, AudioGraph)
    products = quantise(graph, torch.from_numpy(clips.calibration))
    example = example_inputs(assembly, 2)
    write_onnx(graph, example, path, ["waveform"], metadata, without)
    rounded = OnnxBackend(path, ["waveform"], list(graph.outputs), int8=True)
    agreement = gates.compare(exact, rounded, clips.held_out, manifest)
    gates.check(agreement)
    return rounded, Quantisation(
        kind="int8",
        file=path.name,
        weight_bits=7,
        products=products,
        calibration=clips.source,
        agreement=agreement,
    )


__all__ = ["add_int8", "find_clips", "gates", "refuse_unfit"]
