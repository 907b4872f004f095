"""The export: assemble, write each format, verify, seal the bundle."""

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from avex_export.assemble import assemble
from avex_export.card import model_card
from avex_export.cases import example_inputs
from avex_export.formats import Pt2Backend, write_onnx, write_pt2, write_torchscript
from avex_export.graph import MASK, Assembly, Head, Output, export_graph
from avex_export.int8 import add_int8, agreement_text, find_clips, refuse_unfit
from avex_export.measured import Measured, measured
from avex_export.request import ExportRequest, bundle_name, read_probes
from avex_export.verify import compare, gains_table, profile, verify
from avex_serve.audio.reader import decode, resample
from avex_serve.bundles.manifest import (
    CARD,
    LABELS,
    MANIFEST,
    ONNX,
    ONNX_INT8,
    PT2,
    TORCHSCRIPT,
    TRAINED_ON,
    EmbeddingInfo,
    Manifest,
    ProbeInfo,
    TensorSpec,
)
from avex_serve.bundles.reading import Bundle
from avex_serve.bundles.sealing import seal_bundle
from avex_serve.bundles.trained import write_trained_on
from avex_serve.errors import AudioError, ExportError, InputError
from avex_serve.evidence.cases import write_evidence
from avex_serve.evidence.verify import TOLERANCE, table
from avex_serve.inference.backend import Backend
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.inference.torch import TorchBackend
from avex_serve.writing import atomic_directory

_BUNDLES = Path("export") / "bundles"


def export_bundle(
    request: ExportRequest, say: Callable[[str], None] = print, warn: Callable[[str], None] | None = None
) -> Bundle:
    """Export one probe or several into a bundle: complete and verified, or not at all.

    Args:
        request: what to export; a bundle in its output folder is replaced.
        say: is called with each line about the progress.
        warn: is called with what makes scores wrong if it was not meant, which is in the progress too.

    Raises:
        ExportError: it can't be assembled, or a format differs from the eager module. If int8 is too inaccurate, the
            bundle is written without it first.
        InputError: a probe, its labels or all of the recordings can't be used.
        NotFoundError: a file that doesn't exist.
        FileExistsError: the output folder holds something else.
    """
    started = time.monotonic()

    def progress(step: str) -> None:
        say(f"[{time.monotonic() - started:5.1f} s] {step}")

    sources = read_probes(request)
    for source in sources:
        trained = None if source.saved is None or request.embeddings else source.saved.activation
        if trained not in (None, source.activation):
            unlike = f"--activation {source.activation}: {source.name} was trained for {trained} scores"
            progress(unlike)
            if warn is not None:
                warn(unlike)
    name = bundle_name(request, sources)
    output = request.output or _BUNDLES / name
    with atomic_directory(output, marker=MANIFEST) as folder:
        progress(f"assemble {', '.join(source.name for source in sources)}")
        assembly = assemble(request, sources)
        progress(_summary(assembly))
        worth = [
            measured(source, assembly, head, progress) for source, head in zip(sources, assembly.heads, strict=True)
        ]
        clips = None
        if request.quantize is not None:
            refuse_unfit(assembly, request.format)
            assert assembly.audio is not None
            audio = assembly.audio
            clips = find_clips(audio.window_samples, audio.sample_rate, request.calibration, progress)
        recordings = _usable(request.verify_audio, assembly, progress)  # before the work begins
        metadata = _onnx_metadata(assembly)
        backends = _write_formats(request, assembly, folder, metadata, progress)
        progress("verify against the eager module")
        labels = {} if assembly.headless else {head.name: head.labels for head in assembly.heads}
        draft = Bundle(folder, _manifest(request, name, assembly, worth), labels, digest="0" * 64)
        record, cases = verify(assembly, draft, list(backends.values()), recordings)
        say(table(record.checks, record.skipped))
        if not record.passed:
            raise ExportError(
                f"a format differs from the eager module by more than {TOLERANCE:g} (✗ above); nothing was written"
            )
        if request.profile:
            record = msgspec.structs.replace(record, passes=tuple(profile(assembly, request.without, progress)))
            say(gains_table(record.passes))
        refusal = None
        if clips is not None:
            progress("round to int8, and compare on clips held out")
            path, exact = folder / ONNX_INT8, backends["onnx"]
            try:
                int8, quantisation = add_int8(
                    assembly, path, metadata, exact, draft.manifest, clips, request.without
                )
            except ExportError as error:
                refusal = error
                for part in folder.glob(f"{ONNX_INT8}*"):
                    part.unlink()
            else:
                say(agreement_text(quantisation.agreement))
                checks = compare(cases, draft, [int8])
                say(table(checks))
                passed = all(check.passed for check in checks)
                record = msgspec.structs.replace(record, checks=(*record.checks, *checks), passed=passed)
                draft = draft._replace(manifest=msgspec.structs.replace(draft.manifest, quantisation=quantisation))
        write_evidence(folder, record, cases)
        for probe, known in zip(draft.manifest.probes, worth, strict=False):  # none if the bundle is headless
            if probe.trained_on is not None and known.trained_on is not None:
                write_trained_on(known.trained_on, folder / probe.trained_on)
        made = {output.name: _made(assembly.heads[output.head]) for output in assembly.outputs}
        (folder / CARD).write_text(model_card(draft, record, made), "utf-8")
        sealed = seal_bundle(folder, labels, draft.manifest)
    progress(f"wrote {output}")
    if refusal is not None:
        raise ExportError(f"{refusal}. {output} was written without an int8 graph")
    return sealed._replace(directory=output)


def _summary(assembly: Assembly) -> str:
    taps = len({layer for probe in assembly.probes for layer in probe.layers})
    heads = [] if assembly.headless else [f"{len(head.labels)} labels" for head in assembly.heads]
    return ", ".join([f"{assembly.model}: {taps} layers tapped", *heads])


def _usable(paths: Sequence[Path], assembly: Assembly, progress: Callable[[str], None]) -> list[Path]:
    """The recordings that can be used; one that can't is reported. InputError if none of them can."""
    usable, reasons = [], []
    for path in paths:
        assert assembly.audio is not None
        try:
            wave, rate = decode(path)
            resample(wave, rate, assembly.audio.sample_rate)
        except AudioError as error:
            reasons.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        else:
            usable.append(path)
    if paths and not usable:
        raise InputError(f"--verify-audio: none of the recordings can be used: {'; '.join(reasons)}")
    for reason in reasons:
        progress(f"left out {reason}")
    return usable


def _write_formats(
    request: ExportRequest,
    assembly: Assembly,
    folder: Path,
    metadata: dict[str, str],
    progress: Callable[[str], None],
) -> dict[str, Backend]:
    """Write each format, and return the backend that runs it."""
    without = request.without
    graph, example = export_graph(assembly, without), example_inputs(assembly, 2)
    outputs = list(graph.outputs)
    backends: dict[str, Backend] = {}
    if "onnx" in request.format:
        progress("write ONNX")
        write_onnx(graph, example, folder / ONNX, assembly.input_names, metadata, without)
        backends["onnx"] = OnnxBackend(folder / ONNX, assembly.input_names, outputs)
    if "torchscript" in request.format:
        progress("write TorchScript")
        traced = export_graph(assembly, without, half=True) if request.half else graph
        write_torchscript(traced, example, folder / TORCHSCRIPT)
        backends["torchscript"] = TorchBackend(folder / TORCHSCRIPT, outputs, "cpu", half=request.half)
    if "pt2" in request.format:
        progress("write PT2")
        write_pt2(graph, example, folder / PT2)
        backends["pt2"] = Pt2Backend(folder / PT2, outputs)
    return backends


def _made(head: Head) -> str:
    """How the head's input is computed from the layers, for the card."""
    how = head.probe.aggregation
    made = "as sequences" if how == "none" else f"aggregated by {how}"
    return made if head.trained else f"{made}, merged by weights that are not trained but random"


# -- the manifest -------------------------------------------------------------------------------------------------


def _manifest(request: ExportRequest, name: str, assembly: Assembly, worth: Sequence[Measured]) -> Manifest:
    heads = range(0 if assembly.headless else len(assembly.heads))
    return Manifest(
        name=name,
        version=request.bundle_version,
        kind="embedding" if assembly.audio is None else "audio",
        model=assembly.model,
        checkpoint=assembly.checkpoint,
        probes=tuple(_probe(assembly, index, worth[index]) for index in heads),
        embeddings=tuple(_embedding(assembly, output) for output in assembly.outputs if output.what != "logits"),
        audio=assembly.audio,
        inputs=tuple(
            TensorSpec(name=name, dtype="bool" if name == MASK else "float32", shape=_input_shape(assembly))
            for name in assembly.input_names
        ),
        outputs=tuple(TensorSpec(name=o.name, shape=_output_shape(assembly, o)) for o in assembly.outputs),
        half=request.half,
        licence=assembly.licence,
        tools={name: version(name) for name in ("avex-serve", "onnx", "onnxruntime", "torch")},
        files={},
    )


def _probe(assembly: Assembly, index: int, worth: Measured) -> ProbeInfo:
    head = assembly.heads[index]
    config = head.probe.config
    assert config is not None
    return ProbeInfo(
        name=head.name,
        config=config.model_dump(mode="json", exclude_unset=True),
        trained=head.trained,
        activation=head.activation,
        labels=_own(LABELS, assembly, head),
        classes=len(head.labels),
        logits=next(o.name for o in assembly.outputs if o.head == index and o.what == "logits"),
        embedding=None if assembly.audio is None else assembly.embedding_of(index).name,
        input_fingerprint=head.input_fingerprint,
        calibration=worth.calibration,
        evaluation=worth.evaluation,
        trained_on=None if worth.trained_on is None else _own(TRAINED_ON, assembly, head),
    )


def _own(name: str, assembly: Assembly, head: Head) -> str:
    """The name of a file about one head."""
    return name if len(assembly.heads) == 1 else f"{head.name}.{name}"


def _embedding(assembly: Assembly, output: Output) -> EmbeddingInfo:
    head = assembly.heads[output.head]
    fingerprint = head.input_fingerprint if output.what == "features" else head.pooled_fingerprint
    return EmbeddingInfo(output=output.name, layers=tuple(head.probe.layers), fingerprint=fingerprint)


def _input_shape(assembly: Assembly) -> tuple[int, ...]:
    if assembly.audio is not None:
        return (-1, -1 if assembly.audio.shortest_samples else assembly.audio.window_samples)
    (shape,) = assembly.probe.input_dim
    return (-1, -1, shape[-1]) if assembly.probe.takes_sequence else (-1, *shape)


def _output_shape(assembly: Assembly, output: Output) -> tuple[int, ...]:
    head = assembly.heads[output.head]
    if output.what == "logits":
        return (-1, len(head.labels))
    if output.what == "pooled" or not head.probe.takes_sequence:
        return (-1, head.probe.input_width)
    with torch.no_grad():
        features, _ = head.probe.combine(example_inputs(assembly, 1)[0])  # (1, T, D)
    return (-1, features.shape[1], head.probe.input_width)


def _onnx_metadata(assembly: Assembly) -> dict[str, str]:
    """The properties of the ONNX file: the keys that OpenSoundscape's ONNXModel reads, and ours with a prefix."""
    metadata = {
        "avex_serve.model": assembly.model,
        "avex_serve.licence": assembly.licence,
        "avex_serve.trained": json.dumps(assembly.trained),
    }
    if not assembly.headless:  # OpenSoundscape reads one head: the first
        metadata |= {
            "classes": json.dumps(list(assembly.heads[0].labels), ensure_ascii=False),
            "class_outputs_key": assembly.outputs[0].name,
        }
    if (audio := assembly.audio) is not None:
        seconds = audio.window_samples / audio.sample_rate
        if seconds * audio.sample_rate < audio.window_samples:  # OpenSoundscape rounds this product down
            seconds = math.nextafter(seconds, math.inf)
        metadata |= {
            "sample_rate": str(audio.sample_rate),
            "sample_duration": str(seconds),
            "embedding_outputs_key": assembly.embedding_of(0).name,
        }
    return metadata
