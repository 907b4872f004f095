"""The engine: a bundle ready to answer. HTTP, gRPC and the command line all call this one object."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import TracebackType
from typing import Final, NamedTuple, Self, TypedDict

import numpy as np

from avex_serve.audio import waveform
from avex_serve.audio.waveform import Recording
from avex_serve.audio.windows import WindowPlan, plan_windows
from avex_serve.bundles.manifest import AudioSpec, EmbeddingInfo, Manifest, ProbeInfo
from avex_serve.bundles.reading import Bundle
from avex_serve.errors import NotFoundError, TensorError, UnsupportedError
from avex_serve.inference import results
from avex_serve.inference.backend import Backend
from avex_serve.scheduling import allowance
from avex_serve.scheduling.cores import usable_cores
from avex_serve.scheduling.fair import FairSemaphore
from avex_serve.scheduling.stages import Run, in_pool

# Of memory for each value of an output: twice while rows are put together, twice while the answer is written.
OUTPUT_BYTES: Final = 16

# One batch (B, …) of each input of the graph.
Inputs = tuple[np.ndarray, ...]


class WindowScores(NamedTuple):
    """Scores of a recording, window by window."""

    spans: np.ndarray  # (N, 2) float64, seconds
    scores: np.ndarray  # (N, C) float32, after the activation that the manifest declares


class WindowEmbeddings(NamedTuple):
    """Embeddings of a recording, window by window."""

    spans: np.ndarray  # (N, 2) float64, seconds
    embeddings: np.ndarray  # (N, D), or (N, T, D) of a bundle for heads that read sequences; float32


class Heard(NamedTuple):
    """What a graph answers for a recording."""

    plan: WindowPlan
    overlap: float  # of neighbouring windows, seconds
    outputs: dict[str, np.ndarray]  # by name, each (N, …) float32 with a row a window


class Engine:
    """A bundle, its backend and the way from a recording to detections.

    Use it as a context manager, or call `close`. Calls from several threads at once are allowed.
    """

    def __init__(self, bundle: Bundle, backend: Backend, threads: int | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        # One call of the backend uses one core: this is where a recording's windows spread over the cores.
        self.threads = threads or usable_cores()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="avex-infer")
        self._places = FairSemaphore(self.threads)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for running calls and free the threads; later calls raise RuntimeError."""
        self._pool.shutdown()
        for _ in range(self.threads):
            self._places.acquire()
        self._closed = True
        for _ in range(self.threads):
            self._places.release()

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""
        return self.bundle.manifest

    def labels(self, probe: str | None = None) -> tuple[str, ...]:
        """The labels of a head in the order of its logits; see `probe`."""
        return self.bundle.labels[self.probe(probe).name]

    def predict(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
        probe: str | None = None,
    ) -> results.Prediction:
        """Name the sounds in a recording.

        Args:
            wave: (S,) floating point, mono, in [-1, 1].
            sample_rate: of the wave, in Hz; resampled to the model's.
            threshold: lowest score to report.
            top_k: report at most this many labels a window; see `results.Selection` for the defaults.
            overlap: of neighbouring windows, in seconds.
            probe: name of the head to ask; the bundle's first one by default.

        Raises:
            InputError: audio, threshold, top_k or overlap that can't be used, or a result that is not finite.
            NotFoundError: no such probe.
            UnsupportedError: the bundle takes embeddings, not audio, or has no head.
        """
        (prediction,) = self._predict([self.probe(probe)], wave, sample_rate, threshold, top_k, overlap)
        return prediction

    def predict_all(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
    ) -> list[results.Prediction]:
        """Ask all heads in one pass of the backbone; arguments and errors as in `predict`."""
        self.probe(None)
        return self._predict(self.manifest.probes, wave, sample_rate, threshold, top_k, overlap)

    def _predict(
        self,
        heads: Sequence[ProbeInfo],
        wave: np.ndarray,
        sample_rate: int,
        threshold: float | None,
        top_k: int | None,
        overlap: float,
    ) -> list[results.Prediction]:
        selections = [results.Selection.of(results.score_scale(h.activation), threshold, top_k) for h in heads]
        heard = self.hear(wave, sample_rate, [head.logits for head in heads], overlap=overlap)
        return [
            self.prediction(head, heard, heard.outputs[head.logits], selection)
            for head, selection in zip(heads, selections, strict=True)
        ]

    def hear(self, wave: np.ndarray, sample_rate: int, outputs: Sequence[str], *, overlap: float = 0.0) -> Heard:
        """The outputs of these names for a recording, in one pass; other arguments and errors as in `predict`."""
        plan, batches = self._windows(Recording(wave, sample_rate), overlap)
        return Heard(plan, overlap, self._outputs(list(outputs), batches, len(plan.starts)))

    def prediction(
        self, head: ProbeInfo, heard: Heard, logits: np.ndarray, selection: results.Selection
    ) -> results.Prediction:
        """What a head of this bundle says by its logits (N, C) of a recording, whichever engine heard it."""
        scores = results.activate(logits, head.activation)
        return results.Prediction(
            **self._answer(head),
            **_timing(heard.plan, heard.overlap),
            score_scale=results.score_scale(head.activation),
            detections=results.detect(heard.plan.spans, scores, self.bundle.labels[head.name], selection),
        )

    def score(
        self, wave: np.ndarray, sample_rate: int, *, overlap: float = 0.0, probe: str | None = None
    ) -> WindowScores:
        """All scores of a recording as arrays; arguments and errors as in `predict`."""
        head = self.probe(probe)
        plan, batches = self._windows(Recording(wave, sample_rate), overlap)
        outputs = self._outputs([head.logits], batches, len(plan.starts))
        return WindowScores(plan.spans, results.activate(outputs[head.logits], head.activation))

    def embed(
        self, wave: np.ndarray, sample_rate: int, *, overlap: float = 0.0, output: str | None = None
    ) -> WindowEmbeddings:
        """The embeddings of a recording; arguments and errors as in `predict`.

        Args:
            wave: see `predict`.
            sample_rate: see `predict`.
            overlap: see `predict`.
            output: name of the output that is the embedding; the bundle's first one by default.
        """
        name = self.embedding(output).output
        plan, batches = self._windows(Recording(wave, sample_rate), overlap)
        return WindowEmbeddings(plan.spans, self._outputs([name], batches, len(plan.starts))[name])

    def embedding_document(
        self, wave: np.ndarray, sample_rate: int, *, overlap: float, output: str | None = None
    ) -> results.Embedding:
        """`embed` as a document for JSON."""
        name = self.embedding(output).output
        plan, batches = self._windows(Recording(wave, sample_rate), overlap)
        outputs = self._outputs([name], batches, len(plan.starts), OUTPUT_BYTES + results.NUMBER_BYTES)
        return results.Embedding(
            bundle=self.manifest.name,
            version=self.manifest.version,
            output=name,
            **_timing(plan, overlap),
            spans=[(start, end) for start, end in plan.spans.tolist()],
            embeddings=outputs[name].tolist(),
        )

    def classify(
        self,
        embeddings: np.ndarray,
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        probe: str | None = None,
    ) -> results.Classification:
        """Ask the head about embeddings that the client brings, (B, D) or (B, T, D) as the manifest says.

        Raises:
            InputError: embeddings, threshold or top_k that can't be used.
            NotFoundError: no such probe.
            UnsupportedError: the bundle takes audio, not embeddings.
        """
        if self.manifest.kind != "embedding":
            raise UnsupportedError(
                f"bundle {self.manifest.name} takes audio, not embeddings; use predict, or export with --offline"
            )
        head = self.probe(probe)
        labels, scale = self.bundle.labels[head.name], results.score_scale(head.activation)
        selection = results.Selection.of(scale, threshold, top_k)
        scores = results.activate(self.infer(embeddings)[head.logits], head.activation)
        return results.Classification(
            **self._answer(head), score_scale=scale, results=results.rank(scores, labels, selection)
        )

    def infer(self, batch: np.ndarray, padding_mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The graph's raw outputs for an input of the manifest's shape, (B, …) float32.

        Args:
            batch: the input.
            padding_mask: (B, S) bool, True where a clip is padded; None: nowhere.

        Raises:
            TensorError: another shape or type, no rows, or values or results that are not finite.
            TooLargeError: longer clips or sequences than the current allowance has it.
            UnsupportedError: a mask, and the bundle takes none.
        """
        self.check_input(batch)
        self._check_length(batch)
        if padding_mask is not None:
            self._check_mask(padding_mask, batch)
        batches = _chunks(self.graph_inputs(batch, padding_mask), self.backend.max_batch)
        return self._outputs(self._names(), batches, len(batch))

    def graph_inputs(self, batch: np.ndarray, padding_mask: np.ndarray | None) -> Inputs:
        """What the backend runs on: the batch and, if the graph takes one, the mask, by default of no padding."""
        if not self.manifest.takes_padding_mask:
            return (batch,)
        return batch, np.zeros(batch.shape, bool) if padding_mask is None else padding_mask

    def infer_recording(self, wave: np.ndarray, sample_rate: int, *, overlap: float = 0.0) -> dict[str, np.ndarray]:
        """The graph's raw outputs for a recording, (N, …) with one row a window; see `predict` for the rest."""
        plan, batches = self._windows(Recording(wave, sample_rate), overlap)
        return self._outputs(self._names(), batches, len(plan.starts))

    def check_input(self, batch: np.ndarray) -> None:
        """Raise TensorError unless the batch is what the graph takes."""
        spec = self.manifest.inputs[0]
        fits = batch.ndim == len(spec.shape) and all(
            want in (-1, got) for want, got in zip(spec.shape, batch.shape, strict=True)
        )
        if not fits:
            raise TensorError(f"input {spec.name!r} has shape {list(batch.shape)}; expected {list(spec.shape)}")
        audio = self.manifest.audio
        if audio is not None and audio.shortest_samples is not None and 0 < batch.shape[1] < audio.shortest_samples:
            raise TensorError(
                f"input {spec.name!r} has clips of {batch.shape[1]} samples; the shortest that the model takes has "
                f"{audio.shortest_samples} ({audio.shortest_samples / audio.sample_rate:g} s); pad with zeros"
            )
        if batch.dtype != np.float32:
            raise TensorError(f"input {spec.name!r} has type {batch.dtype}; expected float32")
        if batch.size == 0:
            raise TensorError(f"input {spec.name!r} of shape {list(batch.shape)} is empty; send at least one row")
        if not np.isfinite(batch).all():
            raise TensorError(f"input {spec.name!r} holds NaN or infinite values; expected finite ones")

    def check_overlap(self, overlap: float) -> None:
        """Raise InputError for an overlap that windows of this bundle can't have, as `predict` does."""
        spec = self._audio_spec()
        plan_windows(0, spec.window_samples, spec.sample_rate, overlap)

    def _check_length(self, batch: np.ndarray) -> None:
        if (spec := self.manifest.audio) is not None:
            allowance.current().check_clip(batch.shape[1], spec.sample_rate, spec.window_samples)
        elif batch.ndim == 3:
            allowance.current().check_steps(batch.shape[1])

    def _check_mask(self, mask: np.ndarray, batch: np.ndarray) -> None:
        if not self.manifest.takes_padding_mask:
            raise UnsupportedError(
                f"bundle {self.manifest.name} takes no padding mask; leave it out, or export with --padding-mask"
            )
        name = self.manifest.inputs[1].name
        if mask.shape != batch.shape or mask.dtype != np.bool_:
            raise TensorError(
                f"input {name!r} has shape {list(mask.shape)} and type {mask.dtype}; expected {list(batch.shape)}, "
                "as the clips, and bool"
            )
        if mask.all(axis=1).any():
            raise TensorError(f"input {name!r} marks every sample of a clip as padding; leave out such clips")

    def probe(self, name: str | None) -> ProbeInfo:
        """The head of that name, the first one for None.

        Raises:
            NotFoundError: there is none of that name.
            UnsupportedError: there is no head at all.
        """
        heads = self.manifest.probes
        if not heads:
            raise UnsupportedError(
                f"bundle {self.manifest.name} answers embeddings alone and has no probe; use embed, or serve a "
                "bundle that was exported without --embeddings"
            )
        for head in heads:
            if name is None or head.name == name:
                return head
        raise NotFoundError(
            f"no probe {name!r} in bundle {self.manifest.name}; it has {', '.join(h.name for h in heads)}"
        )

    def embedding(self, name: str | None) -> EmbeddingInfo:
        """The output of that name which is an embedding, the first one for None.

        Raises:
            NotFoundError: there is none of that name.
            UnsupportedError: the bundle takes embeddings itself.
        """
        self._audio_spec()
        for info in self.manifest.embeddings:
            if name is None or info.output == name:
                return info
        known = ", ".join(info.output for info in self.manifest.embeddings)
        raise NotFoundError(f"no embedding {name!r} in bundle {self.manifest.name}; it has {known}")

    def _windows(self, recording: Recording, overlap: float) -> tuple[WindowPlan, Iterator[Inputs]]:
        spec = self._audio_spec()
        wave = waveform.check_wave(recording.wave)
        total = waveform.resampled_size(wave.size, recording.sample_rate, spec.sample_rate)
        plan = plan_windows(total, spec.window_samples, spec.sample_rate, overlap, spec.shortest_samples)
        allowance.current().check_windows(len(plan.starts))
        wave = waveform.resample(wave, recording.sample_rate, spec.sample_rate)
        return plan, plan.batches(wave, self.backend.max_batch, masked=self.manifest.takes_padding_mask)

    def _audio_spec(self) -> AudioSpec:
        if self.manifest.audio is None:
            raise UnsupportedError(
                f"bundle {self.manifest.name} takes embeddings, not audio; use classify, or serve an audio bundle"
            )
        return self.manifest.audio

    def _names(self) -> list[str]:
        return [spec.name for spec in self.manifest.outputs]

    def _outputs(
        self, names: list[str], batches: Iterable[Inputs], count: int, value_bytes: int = OUTPUT_BYTES
    ) -> dict[str, np.ndarray]:
        """The outputs of these names, `count` rows of all batches, each value of which will take so many bytes."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for index, run in enumerate(self._run(batches)):
            if index == 0:  # which shows how many values a row has
                values = sum(run[name][0].size for name in names)
                allowance.current().extend_answer(
                    value_bytes * count * values, "send the recording in pieces, or fewer rows at once"
                )
            for name in names:
                rows[name].append(run[name])
        outputs = {name: np.concatenate(arrays) for name, arrays in rows.items()}
        for name, output in outputs.items():
            # Finite samples of 1e38 overflow in any model, and JSON has no word for what comes out.
            if not np.isfinite(output).all():
                raise TensorError(f"output {name!r} is not finite for this input; audio samples lie in [-1, 1]")
        return outputs

    def _run(self, batches: Iterable[Inputs]) -> Iterator[dict[str, np.ndarray]]:
        batches = iter(batches)
        first, second = next(batches), next(batches, None)
        if second is None:  # a thread of its own would only have to wake up
            allowance.current().checkpoint()
            yield self._inference()(*first)
            return
        # A few batches ahead of the threads, not all of them: a recording of hours has many windows.
        ahead = 2 * self.threads
        waiting: deque[Future[dict[str, np.ndarray]]] = deque()
        try:
            for batch in chain((first, second), batches):
                allowance.current().checkpoint()
                waiting.append(self._pool.submit(self._inference(), *batch))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # none, unless an error ended the loop
                future.cancel()

    def _inference(self) -> Run:
        """What runs one batch, in whatever thread, once fewer than `threads` of them run."""
        run = in_pool(self.backend.run, self.manifest.name)

        def infer(*inputs: np.ndarray) -> dict[str, np.ndarray]:
            with self._places:
                if self._closed:
                    raise RuntimeError(f"the engine of bundle {self.manifest.name} is closed; open the bundle again")
                return run(*inputs)

        return infer

    def _answer(self, head: ProbeInfo) -> "_AnswerFields":
        return {
            "bundle": self.manifest.name,
            "version": self.manifest.version,
            "probe": head.name,
            "trained": head.trained,
        }


class _AnswerFields(TypedDict):
    bundle: str
    version: str
    probe: str
    trained: bool


class _TimingFields(TypedDict):
    duration: float
    window: float
    overlap: float


def _timing(plan: WindowPlan, overlap: float) -> _TimingFields:
    rate = plan.sample_rate
    return {"duration": plan.total / rate, "window": plan.length / rate, "overlap": float(overlap)}


def _chunks(inputs: Inputs, size: int) -> Iterator[Inputs]:
    return (tuple(batch[start : start + size] for batch in inputs) for start in range(0, len(inputs[0]), size))
