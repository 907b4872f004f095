"""The entry of every prediction: from a recording or embeddings and a `Query` to an answer.

    recording ── blocks ── resampled ── windows ── batches ──▶ engine ──▶ rows of windows ──▶ scores ──▶ answer

A recording is processed as a stream: a request keeps a few windows of it, and the rows of its answer.

A head gets embeddings from the client, or from an audio bundle that is served too. A head and an audio bundle match
when the head's input fingerprint equals one of the bundle's embedding fingerprints and the shapes agree. The
recording is opened last, after model, head and options have been checked.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from avex_serve.audio.reader import AudioStream, Channel, Wave, resample_blocks, resampled_size
from avex_serve.audio.windows import FinalClip, batch_windows, cut_windows, hop_samples, plan_windows
from avex_serve.bundles.manifest import Manifest, ProbeInfo
from avex_serve.errors import AudioError, UnsupportedError
from avex_serve.inference.results import (
    NUMBER_BYTES,
    Classification,
    Embedding,
    Prediction,
    Predictions,
    detect,
    rank,
)
from avex_serve.inference.scores import Selection, Threshold, activate, check_labels, score_scale
from avex_serve.scheduling.request import current

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine

# Memory for each value of an output: twice while rows are put together, twice while the answer is written.
OUTPUT_BYTES: Final = 16
# Sound is in [-1, 1]. Decoders of lossy files and recorders with 32-bit floats go a little beyond. Integers that
# nobody divided go a hundred times beyond and more.
LOUD: Final = 2.0  # samples beyond are answered with a warning
LOUDEST: Final = 100.0  # samples beyond are refused

Audio = Callable[[Channel], AbstractContextManager[AudioStream]]  # opens the recording


@dataclass(frozen=True, slots=True)
class Query:
    """What a client asks about a recording or embeddings. Each question reads the fields that apply to it."""

    model: str | None = None  # name of the bundle; None: the only one that fits
    version: str | None = None  # of the bundle; None: the newest one
    overlap: float = 0.0  # of neighbouring windows, in seconds
    final_clip: FinalClip = "remainder"  # how the end of a recording is answered; see `avex_serve.audio.windows`
    channel: Channel = "mix"  # of the recording, from 1; mix: the mean of all
    # Lowest score to report, of every label or by label; see `avex_serve.inference.scores.Selection`.
    threshold: Threshold = None
    top_k: int | None = None  # most labels to report for a window
    probe: str | None = None  # name of the head; None: the first one of the bundle
    output: str | None = None  # name of the embedding; None: the first one of the bundle


class Models(Protocol):
    """Where the pipeline finds engines: a repository of bundles, or a single engine."""

    def lease(self, name: str | None, version: str | None) -> "AbstractContextManager[Engine]":
        """The engine of a model; None: the only one, the newest one."""
        ...

    def lease_those(self, wanted: Callable[[Manifest], bool]) -> "AbstractContextManager[list[Engine]]":
        """All engines whose manifest is wanted, by name and the newest version first."""
        ...


class WindowOutputs(NamedTuple):
    """The outputs of a graph for the windows of a recording."""

    duration: float  # of the recording, in seconds
    window_seconds: float
    spans: np.ndarray  # (N, 2) float64, start and end of each window in seconds
    outputs: dict[str, np.ndarray]  # by name, each (N, …) float32 with one row for each window
    warnings: tuple[str, ...]  # about the recording, a sentence each


# -- questions ------------------------------------------------------------------------------------------------------


def predict(models: Models, audio: Audio, query: Query) -> Prediction:
    """Name the sounds in a recording, with a bundle of either kind.

    Raises:
        AvexServeError: as of `Repository.lease` and `Engine.predict`.
        UnsupportedError: the bundle takes embeddings that no audio bundle here makes.
    """
    with models.lease(query.model, query.version) as engine:
        head = engine.probe(query.probe)
        selection = select(engine, head, query.threshold, query.top_k)
        windows = _run_either(models, engine, audio, query, [head.logits])
        return _prediction(engine, head, windows, windows.outputs[head.logits], selection, query)


def predict_all(models: Models, audio: Audio, query: Query) -> Predictions:
    """Run the heads of an audio bundle, and those that read its embeddings, in one pass of its backbone.

    Of a model that takes embeddings, the newest version that matches runs. If the query names no model, the only
    one that takes audio runs. Errors as of `predict`.
    """
    name = query.model
    if not name:
        with models.lease_those(lambda manifest: manifest.kind == "audio") as engines:
            names = {engine.manifest.name for engine in engines}
        name = names.pop() if len(names) == 1 else None
    with (
        models.lease(name, query.version) as source,
        models.lease_those(lambda reader: bool(links(source.manifest, reader))) as readers,
    ):
        newest: dict[str, Engine] = {}
        for reader in readers:
            newest.setdefault(reader.manifest.name, reader)
        # Each head with its engine, and the output of the audio bundle that holds its logits or its input.
        heads = [(source, head, head.logits) for head in source.manifest.probes]
        for reader in newest.values():
            heads += [(reader, head, output) for head, output in links(source.manifest, reader.manifest)]
        if not heads:
            source.probe(None)  # raises, with the reason
        selections = _select_each([(engine, head) for engine, head, _ in heads], query.threshold, query.top_k)
        windows = run_recording(source, audio, query, list(dict.fromkeys(output for _, _, output in heads)))
        predictions = []
        for (engine, head, output), selection in zip(heads, selections, strict=True):
            logits = windows.outputs[output]
            if engine is not source:
                logits = engine.infer(logits)[head.logits]
            predictions.append(_prediction(engine, head, windows, logits, selection, query))
        return Predictions(predictions=predictions)


def embed(models: Models, audio: Audio, query: Query) -> Embedding:
    """The embeddings of a recording from an audio bundle; errors as of `predict`."""
    with models.lease(query.model, query.version) as engine:
        name = engine.embedding(query.output).output
        windows = run_recording(engine, audio, query, [name], OUTPUT_BYTES + NUMBER_BYTES)
        return Embedding(
            bundle=engine.manifest.name,
            version=engine.manifest.version,
            output=name,
            duration=windows.duration,
            window=windows.window_seconds,
            overlap=float(query.overlap),
            warnings=windows.warnings,
            spans=[(start, end) for start, end in windows.spans.tolist()],
            embeddings=windows.outputs[name].tolist(),
        )


def classify(models: Models, embeddings: np.ndarray, query: Query) -> Classification:
    """Run a head on embeddings from the client, (B, D) or (B, T, D) as the manifest says.

    Raises:
        InputError: embeddings, threshold or top_k that can't be used.
        NotFoundError: no such probe.
        UnsupportedError: the bundle takes audio, not embeddings.
    """
    with models.lease(query.model, query.version) as engine:
        if engine.manifest.kind != "embedding":
            raise UnsupportedError(
                f"bundle {engine.manifest.name} takes audio, not embeddings; use predict, or export with --offline"
            )
        head = engine.probe(query.probe)
        selection = select(engine, head, query.threshold, query.top_k)
        scores = activate(engine.infer(embeddings)[head.logits], head.activation)
        return Classification(
            bundle=engine.manifest.name,
            version=engine.manifest.version,
            probe=head.name,
            trained=head.trained,
            score_scale=score_scale(head.activation),
            warnings=selection.warnings,
            results=rank(scores, engine.labels(head.name), selection, engine.calibrator(head.name)),
        )


def infer_recording(models: Models, engine: "Engine", audio: Audio, query: Query) -> WindowOutputs:
    """All outputs of a bundle of either kind for a recording."""
    return _run_either(models, engine, audio, query, [spec.name for spec in engine.manifest.outputs])


def _prediction(
    engine: "Engine", head: ProbeInfo, windows: WindowOutputs, logits: np.ndarray, selection: Selection, query: Query
) -> Prediction:
    """The answer of a head from its logits (N, C) for the windows, which another engine may have run."""
    scores = activate(logits, head.activation)
    return Prediction(
        bundle=engine.manifest.name,
        version=engine.manifest.version,
        probe=head.name,
        trained=head.trained,
        duration=windows.duration,
        window=windows.window_seconds,
        overlap=float(query.overlap),
        score_scale=score_scale(head.activation),
        warnings=(*selection.warnings, *windows.warnings),
        detections=detect(windows.spans, scores, engine.labels(head.name), selection, engine.calibrator(head.name)),
    )


def select(engine: "Engine", head: ProbeInfo, threshold: Threshold = None, top_k: int | None = None) -> Selection:
    """Which scores of a head are reported; errors as of `Selection.of`."""
    labels, calibrator = engine.labels(head.name), engine.calibrator(head.name)
    return Selection.of(head.activation, threshold, top_k, labels, calibrator)


def select_all(engine: "Engine", threshold: Threshold) -> list[tuple[ProbeInfo, Selection]]:
    """The same for all heads of a bundle; a threshold by label is for the heads that have the label."""
    heads = engine.manifest.probes
    return list(zip(heads, _select_each([(engine, head) for head in heads], threshold, None), strict=True))


def _select_each(
    heads: Sequence[tuple["Engine", ProbeInfo]], threshold: Threshold, top_k: int | None
) -> list[Selection]:
    if not isinstance(threshold, Mapping):
        return [select(engine, head, threshold, top_k) for engine, head in heads]
    labels = [engine.labels(head.name) for engine, head in heads]
    check_labels(threshold, sorted(set().union(*labels)))
    own = [{name: value for name, value in threshold.items() if name in names} for names in labels]
    return [select(engine, head, each, top_k) for (engine, head), each in zip(heads, own, strict=True)]


# -- the stream -----------------------------------------------------------------------------------------------------


def run_recording(
    engine: "Engine", audio: Audio, query: Query, names: Sequence[str], value_bytes: int = OUTPUT_BYTES
) -> WindowOutputs:
    """The outputs of these names for all windows of a recording; errors as of `stream_windows`.

    Each value will take `value_bytes` of memory until the answer is sent.
    """
    spec = engine.audio_spec
    hop_samples(spec.window_samples, spec.sample_rate, query.overlap)  # raises before the recording is opened
    spans: list[np.ndarray] = []

    def rows(stream: AudioStream) -> Iterator[dict[str, np.ndarray]]:
        for span, outputs in stream_windows(engine, stream, query, names):
            spans.append(span)
            yield outputs

    with audio(query.channel) as stream:
        outputs = collect(rows(stream), value_bytes)
    samples = resampled_size(stream.samples, stream.sample_rate, spec.sample_rate)
    return WindowOutputs(
        duration=samples / spec.sample_rate,
        window_seconds=spec.window_samples / spec.sample_rate,
        spans=np.concatenate(spans),
        outputs=outputs,
        warnings=(*engine.warnings, *stream.warnings),
    )


def stream_windows(
    engine: "Engine", stream: AudioStream, query: Query, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Run an audio bundle on an open recording while it is read.

    Yields:
        Batch by batch: (B, 2) float64, start and end of each window in seconds, and the outputs of these names,
        each (B, …) float32.

    Raises:
        AudioError: the recording can't be used, or its samples are far from [-1, 1].
        InputError: an overlap that windows of this bundle can't have.
        TensorError: results that are not finite.
        TooLargeError: more windows, or a larger answer, than the current request may ask for.
    """
    spec = engine.audio_spec
    length, rate = spec.window_samples, spec.sample_rate
    hop = hop_samples(length, rate, query.overlap)
    limits = current().limits
    bounds: deque[np.ndarray] = deque()  # of the windows of each batch whose outputs are still to come
    peak = 0.0
    if stream.frames:  # a header that promises too much is refused before the work begins
        total = resampled_size(stream.frames, stream.sample_rate, rate)
        limits.check_windows(plan_windows(total, length, rate, query.overlap, final_clip=query.final_clip).count)

    def levelled() -> Iterator[Wave]:
        nonlocal peak
        for block in stream:
            peak = max(peak, find_peak(block))
            yield block

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        wave = resample_blocks(levelled(), stream.sample_rate, rate)
        windows = cut_windows(wave, length, hop, spec.shortest_samples or length, query.final_clip)
        count, mask = 0, engine.manifest.takes_padding_mask
        for neighbours, inputs in batch_windows(windows, engine.backend.max_batch, padding_mask=mask):
            count += len(neighbours)
            limits.check_windows(count)
            bounds.append(neighbours)
            yield inputs

    for outputs in engine.run(batches(), names):
        span = bounds.popleft() / float(rate)
        yield span, outputs
    current().timings.audio.append((engine.model, float(span[-1, 1])))
    stream.warnings.extend(level_warnings(peak))


def find_peak(samples: np.ndarray) -> float:
    """The largest magnitude of samples; AudioError if they can't be sound in [-1, 1]."""
    peak = float(max(samples.max(initial=0), -samples.min(initial=0)))
    if peak > LOUDEST:
        raise AudioError(
            f"the samples reach {peak:.4g}; expected sound in [-1, 1]: divide 16-bit integers by 32768, and others "
            "by the largest that their type holds"
        )
    return peak


def level_warnings(peak: float) -> tuple[str, ...]:
    """The warning about sound of this peak, if there is one."""
    if peak <= LOUD:
        return ()
    return (f"the samples reach {peak:.3g}, and sound is in [-1, 1]: their scale may be wrong",)


def collect(rows: Iterable[dict[str, np.ndarray]], value_bytes: int = OUTPUT_BYTES) -> dict[str, np.ndarray]:
    """Put the outputs of batches together; TooLargeError if the answer takes too much memory."""
    request, kept = current(), []
    for row in rows:
        values = sum(output.size for output in row.values())
        request.extend_answer(value_bytes * values, "send the recording in pieces, or fewer rows at once")
        kept.append(row)
    return {name: np.concatenate([row[name] for row in kept]) for name in kept[0]}


# -- heads that read embeddings of another bundle -------------------------------------------------------------------


def _run_either(models: Models, engine: "Engine", audio: Audio, query: Query, names: Sequence[str]) -> WindowOutputs:
    """The outputs of a bundle of either kind; one that takes embeddings gets them from an audio bundle."""
    reader = engine.manifest
    if reader.kind == "audio":
        return run_recording(engine, audio, query, names)
    head = engine.probe(query.probe)
    with models.lease_those(lambda source: _link(source, reader, head) is not None) as sources:
        if not sources:
            raise UnsupportedError(_why_none(models, reader, head))
        output = _link(sources[0].manifest, reader, head)
        assert output is not None
        windows = run_recording(sources[0], audio, query, [output])
    return windows._replace(outputs=engine.infer(windows.outputs[output]))


def links(source: Manifest, reader: Manifest) -> list[tuple[ProbeInfo, str]]:
    """The heads that read an embedding of the audio bundle, each with the name of that output."""
    pairs = [(head, _link(source, reader, head)) for head in reader.probes]
    return [(head, output) for head, output in pairs if output is not None]


def _link(source: Manifest, reader: Manifest, head: ProbeInfo) -> str | None:
    """The output of the audio bundle `source` that a head of the bundle `reader` reads; None: there is none."""
    if reader.kind == "embedding" and head.input_fingerprint is not None:
        for info in source.embeddings:
            shape = source.output(info.output).shape
            if info.fingerprint == head.input_fingerprint and reader.inputs[0].fits(shape):
                return info.output
    return None


def _why_none(models: Models, reader: Manifest, head: ProbeInfo) -> str:
    takes = f"bundle {reader.name} takes embeddings, not audio"
    if head.input_fingerprint is None:
        return (
            f"{takes}, and does not say which backbone makes the embeddings that its probe {head.name} reads; use "
            "classify, or export the probe with its backbone"
        )
    with models.lease_those(lambda source: bool(source.embeddings)) as engines:
        made = [
            f"{source.name} makes {(info.fingerprint or 'unknown')[:12]} {list(source.output(info.output).shape)}"
            for source in [engine.manifest for engine in engines]
            for info in source.embeddings
        ]
    return (
        f"{takes}, and no audio bundle here makes the embeddings that its probe {head.name} reads, with the "
        f"fingerprint {head.input_fingerprint[:12]} {list(reader.inputs[0].shape)}: "
        f"{', '.join(made) or 'there is none'}; "
        "use classify, or serve an audio bundle of the same backbone and layers"
    )
