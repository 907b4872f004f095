"""The export itself: assemble, write each format, verify, seal the bundle."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from avex_export.assemble import assemble
from avex_export.card import model_card
from avex_export.cases import example_batch, example_inputs
from avex_export.formats import Pt2Backend, write_onnx, write_pt2, write_torchscript
from avex_export.graph import Assembly, Output, eager_graph, export_graph, half_graph
from avex_export.int8 import add_int8, find_clips, gates, refuse_unfit
from avex_export.output import parents_taken_back
from avex_export.profile import gains_table, profile
from avex_export.progress import Progress
from avex_export.sources import Request
from avex_export.verify import Verification, compare, verify
from avex_serve.audio import reader as audio
from avex_serve.audio import waveform
from avex_serve.bundles.manifest import (
    CARD,
    LABELS,
    MANIFEST,
    ONNX,
    ONNX_INT8,
    PT2,
    TORCHSCRIPT,
    Activation,
    Manifest,
)
from avex_serve.bundles.sealing import atomic_directory, draft_manifest, seal_bundle
from avex_serve.errors import AudioError, ExportError
from avex_serve.evidence.verify import TOLERANCE, table
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.inference.torch import TorchBackend

USUAL_FORMATS = ("onnx", "torchscript")


def export_bundle(
    request: Request,
    output: Path,
    formats: Sequence[str] = USUAL_FORMATS,
    activation: Activation = "sigmoid",
    recordings: Sequence[Path] = (),
    say: Callable[[str], None] = print,
    *,
    without: Collection[str] = (),
    profiled: bool = False,
) -> Manifest:
    """Export one probe or several into a bundle: whole, verified, or not at all.

    Args:
        request: what to export.
        output: the bundle's folder; a bundle that is there is replaced.
        formats: among ``onnx``, ``torchscript`` and ``pt2``.
        activation: what turns the logits into scores.
        recordings: real audio to verify on, in place of synthetic sounds.
        say: where progress goes.
        without: passes to leave out, see `avex_export.passes`.
        profiled: whether to measure what each pass buys.

    Raises:
        ExportError: it can't be assembled, a format doesn't answer as the eager module does, or int8 is too far off.
        InputError: too few recordings to calibrate on, or a file where a folder above the output should be.
        AudioError: a recording that can't be read.
        NotFoundError: a recording that is not there.
        FileExistsError: the output folder holds something else.
    """
    progress = Progress(say)
    with parents_taken_back(output), atomic_directory(output, marker=MANIFEST) as folder:
        progress(f"assemble {', '.join(recipe.name for recipe in request.recipes)}")
        assembly = assemble(request)
        progress(_summary(assembly))
        clips = None
        if request.int8:
            refuse_unfit(assembly, formats)
            clips = find_clips(assembly, request.calibration)
        for path in recordings:  # a bad one is told before the work begins
            _check_recording(path, assembly)
        backends = _write_formats(assembly, folder, formats, without, progress)
        progress("verify against the eager module")
        fields = _fields(assembly, activation)
        draft = draft_manifest(fields)
        verification = verify(eager_graph(assembly), assembly, draft, folder, backends, recordings)
        say(verification.table())
        if not verification.passed:
            raise ExportError(
                f"a format differs from the eager module by more than {TOLERANCE:g} (✗ above); nothing was written"
            )
        if profiled:
            verification = replace(verification, gains=tuple(profile(assembly, without, progress)))
            say(gains_table(verification.gains))
        if clips is not None:
            progress("round to int8, and compare on clips held out")
            path, metadata, exact = folder / ONNX_INT8, _onnx_metadata(assembly), backends["onnx"]
            backend, rounded = add_int8(assembly, path, metadata, exact, draft, clips, without)
            say(gates.text(rounded.agreement))
            fields["quantisation"] = msgspec.to_builtins(rounded)
            checks = compare(verification.cases, assembly, draft, folder, [backend])
            say(table(checks))
            verification = replace(verification, checks=(*verification.checks, *checks))
        manifest = _seal(assembly, folder, verification, fields)
    progress(f"wrote {output}")
    return manifest


def _check_recording(path: Path, assembly: Assembly) -> None:
    assert assembly.sample_rate is not None
    wave, rate = audio.decode(path)
    try:
        waveform.resample(wave, rate, assembly.sample_rate)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from None


def _write_formats(
    assembly: Assembly, folder: Path, formats: Sequence[str], without: Collection[str], progress: Progress
) -> dict[str, Backend]:
    graph, example = export_graph(assembly, without), example_inputs(assembly, 2)
    names = list(graph.outputs)
    backends: dict[str, Backend] = {}
    if "onnx" in formats:
        progress("write ONNX")
        write_onnx(graph, example, folder / ONNX, _input_names(assembly), _onnx_metadata(assembly), without)
        backends["onnx"] = OnnxBackend(folder / ONNX, _input_names(assembly), names)
    if "torchscript" in formats:
        progress("write TorchScript")
        traced = half_graph(assembly, without) if assembly.half else graph
        write_torchscript(traced, example, folder / TORCHSCRIPT)
        backends["torchscript"] = TorchBackend(folder / TORCHSCRIPT, names, "cpu", half=assembly.half)
    if "pt2" in formats:
        progress("write PT2")
        write_pt2(graph, example, folder / PT2)
        backends["pt2"] = Pt2Backend(folder / PT2, names)
    return backends


def _seal(assembly: Assembly, folder: Path, verification: Verification, fields: Mapping[str, Any]) -> Manifest:
    verification.write(folder)
    (folder / CARD).write_text(model_card(assembly, verification, draft_manifest(fields)), "utf-8")
    return seal_bundle(folder, {head.name: head.labels for head in assembly.heads}, fields)


def _summary(assembly: Assembly) -> str:
    taps = len({layer for probe in assembly.probes for layer in probe.layers})
    heads = [] if assembly.headless else [f"{len(head.labels)} labels" for head in assembly.heads]
    return ", ".join([f"{assembly.model}: {taps} layers tapped", *heads])


def _fields(assembly: Assembly, activation: Activation) -> dict[str, Any]:
    """What the manifest says of the bundle."""
    audio = None
    if assembly.clip_samples is not None:
        audio = {
            "sample_rate": assembly.sample_rate,
            "window_samples": assembly.clip_samples,
            "shortest_samples": assembly.shortest_samples,
        }
    return {
        "name": assembly.name,
        "version": assembly.version,
        "kind": "embedding" if audio is None else "audio",
        "model": assembly.model,
        "checkpoint": assembly.checkpoint,
        "probes": [] if assembly.headless else [_probe(assembly, i, activation) for i in range(len(assembly.heads))],
        "embeddings": [_embedding(assembly, output) for output in assembly.outputs if output.what != "logits"],
        "audio": audio,
        "inputs": [
            {"name": name, "dtype": dtype, "shape": _input_shape(assembly)}
            for name, dtype in zip(_input_names(assembly), ("float32", "bool"), strict=False)
        ],
        "outputs": [_output(assembly, output) for output in assembly.outputs],
        "half": assembly.half,
        "licence": assembly.licence,
        "tools": {name: version(name) for name in ("avex-serve", "onnx", "onnxruntime", "torch")},
    }


def _probe(assembly: Assembly, index: int, activation: Activation) -> dict[str, Any]:
    head = assembly.heads[index]
    config = head.probe.config
    assert config is not None
    alone = len(assembly.heads) == 1
    return {
        "name": head.name,
        "config": config.model_dump(mode="json", exclude_unset=True),
        "trained": head.trained,
        "activation": activation,
        "labels": LABELS if alone else f"{head.name}.{LABELS}",
        "classes": len(head.labels),
        "logits": next(o.name for o in assembly.outputs if o.head == index and o.what == "logits"),
        "embedding": None if assembly.clip_samples is None else assembly.embedding_of(index).name,
        "reads": head.reads,
    }


def _embedding(assembly: Assembly, output: Output) -> dict[str, Any]:
    head = assembly.heads[output.head]
    fingerprint = head.reads if output.what == "features" else head.pooled
    return {"output": output.name, "layers": head.probe.layers, "fingerprint": fingerprint}


def _output(assembly: Assembly, output: Output) -> dict[str, Any]:
    head = assembly.heads[output.head]
    if output.what == "logits":
        return {"name": output.name, "shape": (-1, len(head.labels))}
    steps = [_steps(assembly, output)] if output.what == "features" and head.probe.takes_sequence else []
    return {"name": output.name, "shape": (-1, *steps, head.probe.input_width)}


def _steps(assembly: Assembly, output: Output) -> int:
    """Steps of the sequence that a head reads."""
    with torch.no_grad():
        features, _ = assembly.heads[output.head].probe.combine(example_batch(assembly, 1))
    return features.shape[1]


def _input_names(assembly: Assembly) -> list[str]:
    if assembly.clip_samples is None:
        return ["embedding"]
    return ["waveform", "padding_mask"] if assembly.masked else ["waveform"]


def _input_shape(assembly: Assembly) -> tuple[int, ...]:
    if assembly.clip_samples is not None:
        return (-1, -1 if assembly.any_length else assembly.clip_samples)
    (shape,) = assembly.probe.input_dim
    return (-1, -1, shape[-1]) if assembly.probe.takes_sequence else (-1, *shape)


def _onnx_metadata(assembly: Assembly) -> dict[str, str]:
    """The keys that OpenSoundscape's ONNXModel reads, and ours under a prefix."""
    metadata = {
        "avex_serve.model": assembly.model,
        "avex_serve.licence": assembly.licence,
        "avex_serve.trained": json.dumps(assembly.trained),
    }
    if not assembly.headless:  # those readers know one head: the first
        metadata |= {
            "classes": json.dumps(list(assembly.heads[0].labels), ensure_ascii=False),
            "class_outputs_key": assembly.outputs[0].name,
        }
    if assembly.clip_samples is not None and assembly.sample_rate is not None:
        metadata |= {
            "sample_rate": str(assembly.sample_rate),
            "sample_duration": str(_seconds(assembly.clip_samples, assembly.sample_rate)),
            "embedding_outputs_key": assembly.embedding_of(0).name,
        }
    return metadata


def _seconds(samples: int, rate: int) -> float:
    """Seconds whose product with the rate is no less than the samples, since OpenSoundscape rounds it down."""
    seconds = samples / rate
    return seconds if seconds * rate >= samples else math.nextafter(seconds, math.inf)
