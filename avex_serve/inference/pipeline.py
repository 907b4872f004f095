"""The entry of every prediction: from a recording or embeddings and a `Query` to an answer.

    recording ── blocks ── resampled ── windows ── batches ──▶ engine ──▶ rows of windows ──▶ scores ──▶ answer

A recording passes through as a stream. A request keeps a few windows of it, and the rows that its answer is made of.

Embeddings for a head come from the client, or from an audio bundle that is served too. A head and an audio bundle
match when the head's input fingerprint equals one of the bundle's embedding fingerprints and the shapes agree. The
recording is opened last, when model, head and options are known to be right.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypedDict

import numpy as np

from avex_serve.audio.reader import AudioStream, resample_blocks, resampled_size
from avex_serve.audio.windows import batch_windows, cut_windows, hop_samples, plan_windows
from avex_serve.bundles.manifest import Manifest, ProbeInfo
from avex_serve.errors import UnsupportedError
from avex_serve.inference.query import Query
from avex_serve.inference.results import (
    NUMBER_BYTES,
    Classification,
    Embedding,
    Prediction,
    Predictions,
    detect,
    rank,
)
from avex_serve.inference.scores import Selection, activate, score_scale
from avex_serve.scheduling.request import current

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine

# Memory for each value of an output: twice while rows are put together, twice while the answer is written.
OUTPUT_BYTES: Final = 16

Audio = Callable[[], AbstractContextManager[AudioStream]]  # opens the recording


class Models(Protocol):
    """Where the pipeline finds engines: a repository of bundles, or a single engine."""

    def lease(self, name: str | None, version: str | None) -> "AbstractContextManager[Engine]":
        """The engine of a model; None: the only one, the newest one."""
        ...

    def lease_those(self, wanted: Callable[[Manifest], bool]) -> "AbstractContextManager[list[Engine]]":
        """All engines that are wanted, by name and the newest version first."""
        ...

    def manifests(self) -> list[Manifest]:
        """What is served, by name and the newest version first."""
        ...


class WindowOutputs(NamedTuple):
    """The outputs of a graph for neighbouring windows of a recording."""

    window_seconds: float
    spans: np.ndarray  # (N, 2) float64, start and end of each window in seconds
    outputs: dict[str, np.ndarray]  # by name, each (N, …) float32 with one row for each window


# -- questions ------------------------------------------------------------------------------------------------------


def predict(models: Models, audio: Audio, query: Query) -> Prediction:
    """Name the sounds in a recording, with a bundle of either kind.

    Raises:
        AvexServeError: as of `Repository.lease` and `Engine.predict`.
        UnsupportedError: the bundle takes embeddings that no audio bundle here makes.
    """
    with models.lease(query.model, query.version) as engine:
        head = engine.probe(query.probe)
        selection = _selection(head, query)
        if engine.manifest.kind == "audio":
            windows = run_recording(engine, audio, query, [head.logits])
            logits = windows.outputs[head.logits]
        else:
            windows, embeddings = _embeddings_for(models, engine.manifest, head, audio, query)
            logits = engine.infer(embeddings)[head.logits]
        return _prediction(engine, head, windows, logits, selection, query)


def predict_all(models: Models, audio: Audio, query: Query) -> Predictions:
    """Ask the heads of an audio bundle, and those that read its embeddings, in one pass of its backbone.

    Of a model that takes embeddings, the newest version that matches is asked. If the query names no model, the only
    one that takes audio is asked. Errors as of `predict`.
    """
    name = query.model
    audio_names = {manifest.name for manifest in models.manifests() if manifest.kind == "audio"}
    if not name and len(audio_names) == 1:
        (name,) = audio_names
    with (
        models.lease(name, query.version) as source,
        models.lease_those(lambda reader: bool(_links(source.manifest, reader))) as readers,
    ):
        newest: dict[str, Engine] = {}
        for reader in readers:
            newest.setdefault(reader.manifest.name, reader)
        links = [
            (reader, head, output)
            for _, reader in sorted(newest.items())
            for head, output in _links(source.manifest, reader.manifest)
        ]
        own = source.manifest.probes
        if not own and not links:
            source.probe(None)  # raises, with the reason
        selections = [_selection(head, query) for head in (*own, *(head for _, head, _ in links))]
        wanted = dict.fromkeys([head.logits for head in own] + [output for _, _, output in links])
        windows = run_recording(source, audio, query, list(wanted))
        answers = [(source, head, windows.outputs[head.logits]) for head in own]
        answers += [
            (reader, head, reader.infer(windows.outputs[output])[head.logits]) for reader, head, output in links
        ]
        return Predictions(
            predictions=[
                _prediction(engine, head, windows, logits, selection, query)
                for (engine, head, logits), selection in zip(answers, selections, strict=True)
            ]
        )


def score(engine: "Engine", audio: Audio, query: Query) -> WindowOutputs:
    """All scores of a head for a recording: its windows, and (N, C) float32 under the name of its scores."""
    head = engine.probe(query.probe)
    windows = run_recording(engine, audio, query, [head.logits])
    scores = activate(windows.outputs[head.logits], head.activation)
    return windows._replace(outputs={head.scores: scores})


def embed(models: Models, audio: Audio, query: Query) -> Embedding:
    """The embeddings of a recording from an audio bundle; errors as of `predict`."""
    with models.lease(query.model, query.version) as engine:
        name = engine.embedding(query.output).output
        windows = run_recording(engine, audio, query, [name], OUTPUT_BYTES + NUMBER_BYTES)
        return Embedding(
            bundle=engine.manifest.name,
            version=engine.manifest.version,
            output=name,
            **_timing(windows, query),
            spans=[(start, end) for start, end in windows.spans.tolist()],
            embeddings=windows.outputs[name].tolist(),
        )


def classify(models: Models, embeddings: np.ndarray, query: Query) -> Classification:
    """Ask a head about embeddings that the client sends, (B, D) or (B, T, D) as the manifest says.

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
        selection = _selection(head, query)
        scores = activate(engine.infer(embeddings)[head.logits], head.activation)
        return Classification(
            **_origin(engine, head),
            score_scale=score_scale(head.activation),
            results=rank(scores, engine.labels(head.name), selection),
        )


def infer_recording(models: Models, engine: "Engine", audio: Audio, query: Query) -> dict[str, np.ndarray]:
    """All outputs of a bundle of either kind for a recording, each (N, …) with one row for each window."""
    if engine.manifest.kind == "audio":
        return run_recording(engine, audio, query, [spec.name for spec in engine.manifest.outputs]).outputs
    _, embeddings = _embeddings_for(models, engine.manifest, engine.probe(query.probe), audio, query)
    return engine.infer(embeddings)


# -- the stream -----------------------------------------------------------------------------------------------------


def stream_recording(
    engine: "Engine", audio: AudioStream, query: Query, names: Sequence[str]
) -> Iterator[WindowOutputs]:
    """Run an audio bundle on a recording while it is read; yields the rows of a few windows at a time.

    Raises:
        AudioError: the recording can't be used.
        InputError: an overlap that windows of this bundle can't have.
        TensorError: results that are not finite.
        TooLargeError: more windows than the current request may ask for.
    """
    spec = engine.audio_spec
    shortest = spec.shortest_samples or spec.window_samples
    hop = hop_samples(spec.window_samples, spec.sample_rate, query.overlap)
    limits = current().limits
    if audio.frames:  # a header that promises too much is refused before the work begins
        total = resampled_size(audio.frames, audio.sample_rate, spec.sample_rate)
        limits.check_windows(len(plan_windows(total, spec.window_samples, spec.sample_rate, query.overlap).starts))
    wave = resample_blocks(audio.blocks, audio.sample_rate, spec.sample_rate)
    windows = cut_windows(wave, spec.window_samples, hop, shortest)
    bounds: deque[np.ndarray] = deque()  # of the batches on their way through the engine

    def inputs() -> Iterator[tuple[np.ndarray, ...]]:
        count = 0
        for batch in batch_windows(windows, engine.backend.max_batch, masked=engine.manifest.takes_padding_mask):
            count += len(batch.bounds)
            limits.check_windows(count)
            bounds.append(batch.bounds)
            yield batch.inputs

    for outputs in engine.run(inputs(), names):
        spans = bounds.popleft() / float(spec.sample_rate)
        yield WindowOutputs(spec.window_samples / spec.sample_rate, spans, outputs)


def run_recording(
    engine: "Engine", audio: Audio, query: Query, names: Sequence[str], value_bytes: int = OUTPUT_BYTES
) -> WindowOutputs:
    """The outputs of these names for a whole recording; errors as of `stream_recording`.

    Each value will take `value_bytes` of memory until the answer is sent.
    """
    spec = engine.audio_spec
    hop_samples(spec.window_samples, spec.sample_rate, query.overlap)  # raises before the recording is opened
    with audio() as stream:
        rows = []
        for row in stream_recording(engine, stream, query, names):
            count_outputs(row.outputs, value_bytes)
            rows.append(row)
    return WindowOutputs(
        rows[0].window_seconds,
        np.concatenate([row.spans for row in rows]),
        {name: np.concatenate([row.outputs[name] for row in rows]) for name in names},
    )


def count_outputs(outputs: dict[str, np.ndarray], value_bytes: int = OUTPUT_BYTES) -> None:
    """Count the memory that these rows take in the answer; TooLargeError if it becomes too large."""
    values = sum(output.size for output in outputs.values())
    current().extend_answer(value_bytes * values, "send the recording in pieces, or fewer rows at once")


def _embeddings_for(
    models: Models, reader: Manifest, head: ProbeInfo, audio: Audio, query: Query
) -> tuple[WindowOutputs, np.ndarray]:
    """The embeddings (N, …) that a head reads, from an audio bundle that makes them of the recording."""
    with models.lease_those(lambda source: _link(source, reader, head) is not None) as sources:
        if not sources:
            raise UnsupportedError(_why_none(models, reader, head))
        output = _link(sources[0].manifest, reader, head)
        assert output is not None
        windows = run_recording(sources[0], audio, query, [output])
    return windows, windows.outputs[output]


# -- heads that read embeddings of another bundle -------------------------------------------------------------------


def _links(source: Manifest, reader: Manifest) -> list[tuple[ProbeInfo, str]]:
    """The heads that read an embedding of the audio bundle, each with the name of that output."""
    pairs = [(head, _link(source, reader, head)) for head in reader.probes]
    return [(head, output) for head, output in pairs if output is not None]


def _link(source: Manifest, reader: Manifest, head: ProbeInfo) -> str | None:
    """The output of the audio bundle `source` that a head of the bundle `reader` reads; None: there is none."""
    if reader.kind == "embedding" and head.input_fingerprint is not None:
        for info in source.embeddings:
            shape = source.output(info.output).shape
            if info.fingerprint == head.input_fingerprint and _fits(shape, reader.inputs[0].shape):
                return info.output
    return None


def _fits(made: tuple[int, ...], taken: tuple[int, ...]) -> bool:
    return len(made) == len(taken) and all(size in (-1, got) for got, size in zip(made, taken, strict=True))


def _why_none(models: Models, reader: Manifest, head: ProbeInfo) -> str:
    takes = f"bundle {reader.name} takes embeddings, not audio"
    if head.input_fingerprint is None:
        return (
            f"{takes}, and does not say which backbone makes the embeddings that its probe {head.name} reads; use "
            "classify, or export the probe with its backbone"
        )
    made = [
        f"{source.name} makes {(info.fingerprint or 'unknown')[:12]} {list(source.output(info.output).shape)}"
        for source in models.manifests()
        for info in source.embeddings
    ]
    return (
        f"{takes}, and no audio bundle here makes the embeddings that its probe {head.name} reads, with the "
        f"fingerprint {head.input_fingerprint[:12]} {list(reader.inputs[0].shape)}: "
        f"{', '.join(made) or 'there is none'}; "
        "use classify, or serve an audio bundle of the same backbone and layers"
    )


# -- answers --------------------------------------------------------------------------------------------------------


def _selection(head: ProbeInfo, query: Query) -> Selection:
    return Selection.of(score_scale(head.activation), query.threshold, query.top_k)


def _prediction(
    engine: "Engine", head: ProbeInfo, windows: WindowOutputs, logits: np.ndarray, selection: Selection, query: Query
) -> Prediction:
    """The answer of a head by its logits (N, C) for the windows, which another engine may have run."""
    scores = activate(logits, head.activation)
    return Prediction(
        **_origin(engine, head),
        **_timing(windows, query),
        score_scale=score_scale(head.activation),
        detections=detect(windows.spans, scores, engine.labels(head.name), selection),
    )


class _Origin(TypedDict):
    bundle: str
    version: str
    probe: str
    trained: bool


def _origin(engine: "Engine", head: ProbeInfo) -> _Origin:
    manifest = engine.manifest
    return {"bundle": manifest.name, "version": manifest.version, "probe": head.name, "trained": head.trained}


class _Timing(TypedDict):
    duration: float
    window: float
    overlap: float


def _timing(windows: WindowOutputs, query: Query) -> _Timing:
    end = float(windows.spans[-1, 1])  # of the last window, which reaches the end of the recording
    return {"duration": end, "window": windows.window_seconds, "overlap": float(query.overlap)}
