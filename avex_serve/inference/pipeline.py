"""The entry of every prediction: from a recording or embeddings and a `Query` to an answer.

    recording ── blocks ── resampled ── windows ── batches ──▶ engine ──▶ rows of windows ──▶ scores ──▶ answer

A recording is processed as a stream: a request keeps a few windows of it, and the rows of its answer.

A head gets embeddings from the client, or from an audio bundle that is served too. A head and an audio bundle match
when the head's input fingerprint equals one of the bundle's embedding fingerprints and the shapes agree. The
recording is opened last, after model, head and options have been checked.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from avex_serve.audio.reader import AudioStream, Channel, Wave, resample_blocks, resampled_size
from avex_serve.audio.windows import FinalClip, batch_windows, cut_windows, hop_samples, plan_windows
from avex_serve.bundles.manifest import AudioSpec, Manifest, ProbeInfo
from avex_serve.errors import AudioError, InputError, UnsupportedError
from avex_serve.inference.results import (
    NUMBER_BYTES,
    Classification,
    Detection,
    Embedding,
    Merger,
    MergeScore,
    Prediction,
    Predictions,
    calibrated,
    detect_windows,
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
    hop: float | None = None  # from the start of a window to the start of the next, in place of the overlap
    final_clip: FinalClip = "remainder"  # how the end of a recording is answered; see `avex_serve.audio.windows`
    channel: Channel = "mix"  # of the recording, from 1; mix: the mean of all
    # Lowest score to report, of every label or by label; see `avex_serve.inference.scores.Selection`.
    threshold: Threshold = None
    top_k: int | None = None  # most labels to report for a window
    label: Sequence[str] | None = None  # those to report; None: all
    merge: float | None = None  # seconds between windows of a label that become one detection; None: they stay apart
    merge_score: MergeScore = "max"  # of such a detection
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


# -- questions ------------------------------------------------------------------------------------------------------


def predict(models: Models, audio: Audio, query: Query) -> Prediction:
    """Name the sounds in a recording, with a bundle of either kind; errors as of `open_answer`."""
    with open_answer(models, audio, query) as answer:
        return answer.collect()[0]


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
        runs = [HeadRun(source, head, head.logits, query) for head in source.manifest.probes]
        for reader in newest.values():
            runs += [
                HeadRun(reader, head, output, query) for head, output in links(source.manifest, reader.manifest)
            ]
        if not runs:
            source.probe(None)  # raises, with the reason
        check_labels(named(query), {label for run in runs for label in run.labels})
        with _read(source, runs, audio, query) as answer:
            return Predictions(predictions=answer.collect())


@contextmanager
def open_answer(models: Models, audio: Audio, query: Query) -> "Iterator[Answer]":
    """The answer of a head to a recording, while it is made.

    Raises:
        AvexServeError: as of `Repository.lease` and `stream_windows`.
        NotFoundError: no such probe or label.
        UnsupportedError: the bundle takes embeddings that no audio bundle here makes.
    """
    with models.lease(query.model, query.version) as engine:
        head = engine.probe(query.probe)
        run = HeadRun(engine, head, head.logits, query)
        check_labels(named(query), engine.labels(head.name))
        with source_of(models, engine, head) as (source, run.output), _read(source, [run], audio, query) as answer:
            yield answer


def embed(models: Models, audio: Audio, query: Query) -> Embedding:
    """The embeddings of a recording from an audio bundle; errors as of `predict`."""
    with models.lease(query.model, query.version) as engine:
        name = engine.embedding(query.output).output
        with _open_rows(engine, audio, query, [name]) as rows:
            spans, outputs = rows.collect(OUTPUT_BYTES + NUMBER_BYTES)
            return Embedding(
                bundle=engine.manifest.name,
                version=engine.manifest.version,
                output=name,
                duration=rows.duration,
                window=rows.window_seconds,
                overlap=rows.overlap,
                warnings=rows.warnings,
                spans=[(start, end) for start, end in spans.tolist()],
                embeddings=outputs[name].tolist(),
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
            results=[
                calibrated(row, engine.calibrator(head.name))
                for row in rank(scores, engine.labels(head.name), selection)
            ],
        )


@contextmanager
def open_rows(models: Models, engine: "Engine", audio: Audio, query: Query) -> "Iterator[Rows]":
    """All outputs of a bundle of either kind for a recording, while they are made."""
    reader = engine.manifest
    if reader.kind == "audio":
        with _open_rows(engine, audio, query, [spec.name for spec in reader.outputs]) as rows:
            yield rows
        return
    with (
        source_of(models, engine, engine.probe(query.probe)) as (source, output),
        _open_rows(source, audio, query, [output], engine) as rows,
    ):
        yield rows


# -- heads ----------------------------------------------------------------------------------------------------------


class HeadRun:
    """A head that answers a recording window by window."""

    def __init__(self, engine: "Engine", head: ProbeInfo, output: str, query: Query) -> None:
        """It reads this output of the audio bundle: its logits, or an embedding that `engine` makes logits of.

        Raises:
            InputError: options that can't be.
        """
        self.engine = engine
        self.head = head
        self.output = output
        self.labels = engine.labels(head.name)
        self.calibrator = engine.calibrator(head.name)
        threshold = query.threshold
        if isinstance(threshold, Mapping):  # of several heads, each has those of its labels
            own = set(self.labels)
            threshold = {label: value for label, value in threshold.items() if label in own}
        selection = select(engine, head, threshold, query.top_k)
        self.selection = selection.showing(query.label, self.labels)
        gap = query.merge
        self._merger = None if gap is None else Merger.of_detections(gap, query.merge_score)

    def detect(self, spans: np.ndarray, outputs: dict[str, np.ndarray], *, early: bool) -> Iterator[list[Detection]]:
        """For each window of a batch, the detections that no later window changes; if not early, `rest` has them."""
        logits = outputs[self.output]
        if self.engine.manifest.kind == "embedding":
            logits = self.engine.infer(logits)[self.head.logits]
        yield from self.detect_scores(spans, activate(logits, self.head.activation), early=early)

    def detect_scores(self, spans: np.ndarray, scores: np.ndarray, *, early: bool) -> Iterator[list[Detection]]:
        """The same from scores (B, C)."""
        windows = detect_windows(spans, scores, self.labels, self.selection)
        if self._merger is None:
            yield from (calibrated(found, self.calibrator) for found in windows)
            return
        for start, found in zip(spans[:, 0].tolist(), windows, strict=True):
            over = self._merger.take(start) if early else []
            for one in found:
                self._merger.add(one)
            yield calibrated(over, self.calibrator)

    def rest(self) -> list[Detection]:
        """The detections that are left, in order of their start."""
        return [] if self._merger is None else calibrated(self._merger.take(), self.calibrator)


def select(engine: "Engine", head: ProbeInfo, threshold: Threshold = None, top_k: int | None = None) -> Selection:
    """Which scores of a head are reported; errors as of `Selection.of`."""
    labels, calibrator = engine.labels(head.name), engine.calibrator(head.name)
    return Selection.of(head.activation, threshold, top_k, labels, calibrator)


def named(query: Query) -> list[str]:
    """The labels that a query names."""
    return [*(query.label or ()), *(query.threshold if isinstance(query.threshold, Mapping) else ())]


class AnsweredWindow(NamedTuple):
    """A window, and what is known once it has been run."""

    start: float  # seconds, as `end`
    end: float
    detections: list[list[Detection]]  # for each head, those that no later window changes


class Answer:
    """The answer of heads to a recording. Iterate it once."""

    def __init__(self, rows: "Rows", heads: Sequence[HeadRun], query: Query) -> None:
        """The rows have the outputs that the heads read."""
        self.rows = rows
        self.heads = heads
        self._merges = query.merge is not None

    def __iter__(self) -> Iterator[AnsweredWindow]:
        """Window by window; errors as of `stream_windows`."""
        return self._windows(early=True)

    def _windows(self, *, early: bool) -> Iterator[AnsweredWindow]:
        held: AnsweredWindow | None = None  # the last one, which the rest may have to join
        for spans, outputs in self.rows:
            columns = [head.detect(spans, outputs, early=early) for head in self.heads]
            for (start, end), *found in zip(spans.tolist(), *columns, strict=True):
                if held is not None:
                    yield held
                held = AnsweredWindow(start, end, found)
                if not self._merges:
                    yield held
                    held = None
        if held is not None:
            for kept, head in zip(held.detections, self.heads, strict=True):
                kept += head.rest()
            yield held

    def collect(self) -> list[Prediction]:
        """All of it: a document for each head, with its detections in order of their start."""
        found: list[list[Detection]] = [[] for _ in self.heads]
        for window in self._windows(early=False):
            for kept, new in zip(found, window.detections, strict=True):
                kept += new
        return [self.document(index, detections) for index, detections in enumerate(found)]

    def document(self, index: int, detections: list[Detection]) -> Prediction:
        """The answer of a head with these detections, as it is once all windows have been run."""
        rows, head = self.rows, self.heads[index]
        return Prediction(
            bundle=head.engine.manifest.name,
            version=head.engine.manifest.version,
            probe=head.head.name,
            trained=head.head.trained,
            duration=rows.duration,
            window=rows.window_seconds,
            overlap=rows.overlap,
            score_scale=score_scale(head.head.activation),
            warnings=(*head.selection.warnings, *rows.warnings),
            detections=detections,
        )


@contextmanager
def _read(source: "Engine", heads: Sequence[HeadRun], audio: Audio, query: Query) -> Iterator[Answer]:
    """The answer of heads that read outputs of an audio bundle."""
    names = list(dict.fromkeys(head.output for head in heads))
    with _open_rows(source, audio, query, names) as rows:
        yield Answer(rows, heads, query)


# -- the stream -----------------------------------------------------------------------------------------------------


class Rows:
    """Outputs for the windows of a recording. Iterate it once; duration and warnings are complete at the end."""

    def __init__(
        self, source: "Engine", stream: AudioStream, query: Query, names: Sequence[str], reader: "Engine | None"
    ) -> None:
        """Outputs of these names of an audio bundle, or those that `reader` makes of the only one."""
        spec = source.audio_spec
        self.source = source
        self.stream = stream
        self.window_seconds = spec.window_samples / spec.sample_rate
        self.overlap = float(query.overlap)  # of neighbouring windows, in seconds
        self._query = query
        self._names = names
        self._reader = reader

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Batch by batch, as `stream_windows`."""
        for spans, outputs in stream_windows(self.source, self.stream, self._query, self._names):
            yield spans, outputs if self._reader is None else self._reader.infer(outputs[self._names[0]])

    @property
    def duration(self) -> float:
        """Seconds of the recording that have been read."""
        rate = self.source.audio_spec.sample_rate
        return resampled_size(self.stream.samples, self.stream.sample_rate, rate) / rate

    @property
    def warnings(self) -> tuple[str, ...]:
        """About the recording, a sentence each."""
        return (*self.source.warnings, *self.stream.warnings)

    def collect(self, value_bytes: int = OUTPUT_BYTES) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """All of them as one batch. Each value will take `value_bytes` of memory until the answer is sent."""
        spans: list[np.ndarray] = []

        def rows() -> Iterator[dict[str, np.ndarray]]:
            for span, outputs in self:
                spans.append(span)
                yield outputs

        outputs = collect(rows(), value_bytes)
        return np.concatenate(spans), outputs


def run_recording(
    engine: "Engine", audio: Audio, query: Query, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The outputs of these names for all windows of a recording, as one batch of `stream_windows`."""
    with _open_rows(engine, audio, query, names) as rows:
        return rows.collect()


@contextmanager
def _open_rows(
    source: "Engine", audio: Audio, query: Query, names: Sequence[str], reader: "Engine | None" = None
) -> Iterator[Rows]:
    query = with_overlap(query, source.audio_spec)  # raises before the recording is opened
    with audio(query.channel) as stream:
        yield Rows(source, stream, query, names, reader)


def with_overlap(query: Query, spec: AudioSpec) -> Query:
    """The query with an overlap in place of its hop.

    Raises:
        InputError: both are given, or windows of this bundle can't have them.
    """
    window = spec.window_samples / spec.sample_rate
    if query.hop is not None:
        if query.overlap:
            raise InputError(f"overlap is {query.overlap} s and hop is {query.hop} s; send one of them")
        if not 0 < query.hop <= window:
            raise InputError(f"hop is {query.hop} s; expected more than 0 and at most the window of {window:g} s")
        query = replace(query, overlap=window - query.hop, hop=None)
    hop_samples(spec.window_samples, spec.sample_rate, query.overlap)
    return query


def stream_windows(
    engine: "Engine", stream: AudioStream, query: Query, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Run an audio bundle on an open recording while it is read, by a query that `with_overlap` returned.

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


@contextmanager
def source_of(models: Models, engine: "Engine", head: ProbeInfo) -> "Iterator[tuple[Engine, str]]":
    """The audio bundle that a head is of, or that makes the embeddings which it reads, and which output it reads."""
    reader = engine.manifest
    if reader.kind == "audio":
        yield engine, head.logits
        return
    with models.lease_those(lambda source: _link(source, reader, head) is not None) as sources:
        if not sources:
            raise UnsupportedError(_why_none(models, reader, head))
        output = _link(sources[0].manifest, reader, head)
        assert output is not None
        yield sources[0], output


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
