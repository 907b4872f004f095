"""The export itself: assemble, write each format, verify, seal the bundle."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from avex_export.assemble import Request, assemble
from avex_export.card import model_card
from avex_export.cases import example_inputs
from avex_export.graph import Assembly, eager_graph, export_graph, half_graph
from avex_export.int8 import gates
from avex_export.int8.build import add_int8, refuse_unfit
from avex_export.onnx_graph import write_onnx
from avex_export.passes import EXTERNAL_DATA
from avex_export.profile import gains_table, profile
from avex_export.progress import Progress
from avex_export.pt2 import Pt2Backend, write_pt2
from avex_export.torchscript import write_torchscript
from avex_export.verify import Verification, verify
from avex_serve.bundle import (
    CARD,
    MANIFEST,
    ONNX,
    ONNX_INT8,
    PT2,
    TORCHSCRIPT,
    Activation,
    Manifest,
    atomic_directory,
    seal_bundle,
)
from avex_serve.errors import ExportError
from avex_serve.runtime import audio
from avex_serve.runtime.backend import Backend
from avex_serve.runtime.onnx_backend import OnnxBackend
from avex_serve.runtime.torch_backend import TorchBackend
from avex_serve.runtime.verification import TOLERANCE

FORMATS = ("onnx", "torchscript", "pt2")
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
    """Export a probe into a bundle: whole, verified, or not at all.

    Args:
        request: what to export.
        output: the bundle's folder; a bundle that is there is replaced.
        formats: among `FORMATS`.
        activation: what turns the logits into scores.
        recordings: real audio to verify on, in place of synthetic sounds.
        say: where progress goes.
        without: passes to leave out, see `avex_export.passes`.
        profiled: whether to measure what each pass buys.

    Raises:
        ExportError: it can't be assembled, a format doesn't answer as the eager module does, or int8 is too far off.
        InputError: too few recordings to calibrate on.
        AudioError: a recording that can't be read.
        NotFoundError: a recording that is not there.
        FileExistsError: the output folder holds something else.
    """
    progress = Progress(say)
    with atomic_directory(output, marker=MANIFEST) as folder:
        progress(f"assemble {request.recipe.name}")
        assembly = assemble(request)
        progress(f"{assembly.model}: {len(assembly.probe.layers)} layers tapped, {len(assembly.labels)} labels")
        if request.int8:
            refuse_unfit(assembly, formats)
        for path in recordings:
            audio.decode(path)  # a bad one is told before the work begins
        backends = _write_formats(assembly, folder, formats, without, progress)
        progress("verify against the eager module")
        fields = _fields(assembly, activation)
        draft = Manifest(**fields, labels=len(assembly.labels), files={})
        verification = verify(eager_graph(assembly), assembly, draft, folder, backends, recordings)
        say(verification.table())
        if not verification.passed:
            raise ExportError(
                f"a format differs from the eager module by more than {TOLERANCE:g} (✗ above); nothing was written"
            )
        if profiled:
            verification = replace(verification, gains=tuple(profile(assembly, without, progress)))
            say(gains_table(verification.gains))
        if request.int8:
            progress("round to int8, and compare on clips held out")
            path, metadata, exact = folder / ONNX_INT8, _onnx_metadata(assembly), backends["onnx"]
            rounded = add_int8(assembly, path, metadata, exact, activation, request.calibration, without)
            say(gates.text(rounded.agreement))
            fields["quantisation"] = rounded.model_dump()
        manifest = _seal(assembly, folder, verification, fields)
    progress(f"wrote {output}")
    return manifest


def _write_formats(
    assembly: Assembly, folder: Path, formats: Sequence[str], without: Collection[str], progress: Progress
) -> dict[str, Backend]:
    graph, example = export_graph(assembly, without), example_inputs(assembly, 2)
    names = list(graph.outputs)
    backends: dict[str, Backend] = {}
    if "onnx" in formats:
        progress("write ONNX")
        write_onnx(
            graph,
            example,
            folder / ONNX,
            _input_names(assembly),
            _onnx_metadata(assembly),
            external_data=EXTERNAL_DATA not in without,
        )
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
    (folder / CARD).write_text(model_card(assembly, verification, fields), "utf-8")
    return seal_bundle(folder, assembly.labels, fields)


def _fields(assembly: Assembly, activation: Activation) -> dict[str, Any]:
    """What the manifest says of the bundle."""
    config = assembly.probe.config
    assert config is not None
    probe = {
        "name": assembly.name,
        "config": config.model_dump(mode="json", exclude_unset=True),
        "trained": assembly.trained,
    }
    audio = None
    outputs = [{"name": "logits", "shape": (-1, len(assembly.labels))}]
    if assembly.clip_samples is not None:
        audio = {
            "sample_rate": assembly.sample_rate,
            "window_samples": assembly.clip_samples,
            "shortest_samples": assembly.shortest_samples,
        }
        outputs.append({"name": "embedding", "shape": (-1, assembly.probe.input_width)})
    return {
        "name": assembly.name,
        "kind": "embedding" if audio is None else "audio",
        "model": assembly.model,
        "checkpoint": assembly.checkpoint,
        "probes": [probe],
        "audio": audio,
        "inputs": [
            {"name": name, "dtype": dtype, "shape": _input_shape(assembly)}
            for name, dtype in zip(_input_names(assembly), ("float32", "bool"), strict=False)
        ],
        "outputs": outputs,
        "half": assembly.half,
        "activation": activation,
        "licence": assembly.licence,
        "embedding_fingerprint": assembly.embedding_fingerprint,
        "tools": {name: version(name) for name in ("avex-serve", "onnx", "onnxruntime", "torch")},
    }


def _input_names(assembly: Assembly) -> list[str]:
    if assembly.clip_samples is None:
        return ["embedding"]
    return ["waveform", "padding_mask"] if assembly.masked else ["waveform"]


def _input_shape(assembly: Assembly) -> tuple[int, ...]:
    if assembly.clip_samples is not None:
        return (-1, assembly.clip_samples if assembly.shortest_samples is None else -1)
    (shape,) = assembly.probe.input_dim
    return (-1, -1, shape[-1]) if assembly.probe.takes_sequence else (-1, *shape)


def _onnx_metadata(assembly: Assembly) -> dict[str, str]:
    """The keys that OpenSoundscape's ONNXModel reads, and ours under a prefix."""
    metadata = {
        "classes": json.dumps(list(assembly.labels), ensure_ascii=False),
        "class_outputs_key": "logits",
        "avex_serve.model": assembly.model,
        "avex_serve.licence": assembly.licence,
        "avex_serve.trained": json.dumps(assembly.trained),
    }
    if assembly.clip_samples is not None and assembly.sample_rate is not None:
        metadata |= {
            "sample_rate": str(assembly.sample_rate),
            "sample_duration": str(assembly.clip_samples / assembly.sample_rate),
            "embedding_outputs_key": "embedding",
        }
    return metadata
