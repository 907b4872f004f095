"""The engine: a bundle that is ready to run. It checks inputs and spreads batches over threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from avex_serve.audio.reader import open_wave
from avex_serve.audio.windows import FinalClip
from avex_serve.bundles.manifest import AudioSpec, EmbeddingInfo, Manifest, ProbeInfo
from avex_serve.bundles.reading import Bundle
from avex_serve.calibration.scales import Calibrator
from avex_serve.errors import NotFoundError, TensorError, UnsupportedError
from avex_serve.inference import pipeline
from avex_serve.inference.pipeline import Query
from avex_serve.inference.results import Classification, MergeScore, Prediction
from avex_serve.inference.scores import Threshold, activate
from avex_serve.scheduling.cores import usable_cores
from avex_serve.scheduling.request import INFER, QUEUE, ModelName, Request, current

if TYPE_CHECKING:
    from avex_serve.inference.backend import Backend

Inputs = tuple[np.ndarray, ...]  # one batch (B, …) of each input of the graph
Outputs = dict[str, np.ndarray]  # by name, each (B, …) float32


class WindowScores(NamedTuple):
    """Scores of a recording, window by window."""

    spans: np.ndarray  # (N, 2) float64, seconds
    scores: np.ndarray  # (N, C) float32, after the activation that the manifest declares


class WindowEmbeddings(NamedTuple):
    """Embeddings of a recording, window by window."""

    spans: np.ndarray  # (N, 2) float64, seconds
    embeddings: np.ndarray  # (N, D), or (N, T, D) from a bundle for heads that read sequences; float32


class Engine:
    """A bundle and the backend that runs its graph.

    Use it as a context manager, or call `close`. Calls from several threads at once are allowed.
    """

    def __init__(self, bundle: Bundle, backend: "Backend", threads: int | None = None) -> None:
        self.bundle = bundle
        self.warnings: tuple[str, ...] = ()  # for each answer, a sentence each
        self.backend = backend
        # One call of the backend uses one core; the batches of a recording spread over the cores here.
        self.threads = threads or usable_cores()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="avex-infer")
        self._places = FairSemaphore(self.threads)
        self._closed = False
        self._calibrators = {
            head.name: None if head.calibration is None else Calibrator.of(head.calibration, head.activation)
            for head in bundle.manifest.probes
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for running calls and free the threads; later calls raise RuntimeError."""
        self._pool.shutdown()
        for _ in range(self.threads):
            self._places.acquire()
        self._closed = True
        for _ in range(self.threads):
            self._places.release()

    # -- what the bundle is ---------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return self.bundle.manifest

    @property
    def model(self) -> ModelName:
        """Name and version of the bundle."""
        return ModelName(self.manifest.name, self.manifest.version)

    @property
    def audio_spec(self) -> AudioSpec:
        """What the graph expects of audio; UnsupportedError for a bundle that takes embeddings."""
        if self.manifest.audio is None:
            raise UnsupportedError(
                f"bundle {self.manifest.name} takes embeddings, not audio; use classify, or serve an audio bundle"
            )
        return self.manifest.audio

    def labels(self, probe: str | None = None) -> tuple[str, ...]:
        """The labels of a head in the order of its logits; see `probe`."""
        return self.bundle.labels[self.probe(probe).name]

    def probe(self, name: str | None) -> ProbeInfo:
        """The head with that name, the first one for None.

        Raises:
            NotFoundError: no head has that name.
            UnsupportedError: the bundle has no head.
        """
        heads = self.manifest.probes
        if not heads:
            raise UnsupportedError(
                f"bundle {self.manifest.name} has no probe and returns only embeddings; use embed, or serve a "
                "bundle that was exported without --embeddings"
            )
        for head in heads:
            if name is None or head.name == name:
                return head
        raise NotFoundError(
            f"no probe {name!r} in bundle {self.manifest.name}; it has {', '.join(h.name for h in heads)}"
        )

    def calibrator(self, probe: str | None = None) -> Calibrator | None:
        """The calibration of a head, None if it has none; see `probe`."""
        return self._calibrators[self.probe(probe).name]

    def embedding(self, name: str | None) -> EmbeddingInfo:
        """The output with that name that is an embedding, the first one for None.

        Raises:
            NotFoundError: no embedding has that name.
            UnsupportedError: the bundle takes embeddings itself.
        """
        _ = self.audio_spec
        for info in self.manifest.embeddings:
            if name is None or info.output == name:
                return info
        known = ", ".join(info.output for info in self.manifest.embeddings)
        raise NotFoundError(f"no embedding {name!r} in bundle {self.manifest.name}; it has {known}")

    # -- a recording in memory ------------------------------------------------------------------------------------

    def predict(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        threshold: Threshold = None,
        top_k: int | None = None,
        label: Sequence[str] | None = None,
        merge: float | None = None,
        merge_score: MergeScore = "max",
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        probe: str | None = None,
    ) -> Prediction:
        """Name the sounds in a recording.

        Args:
            wave: (S,) floating point, mono, in [-1, 1]; if it goes a little beyond, the answer has a warning.
            sample_rate: of the wave, in Hz; resampled to the model's.
            threshold: lowest score to report, or a mapping from labels to it.
            top_k: most labels to report for a window; see `scores.Selection` for the defaults.
            label: the labels to report; None: all.
            merge: join windows of a label that are at most this many seconds apart; None: they stay apart.
            merge_score: of joined windows.
            overlap: of neighbouring windows, in seconds.
            hop: seconds from the start of a window to the start of the next, in place of the overlap.
            final_clip: what happens to an end shorter than a window; see `avex_serve.audio.windows`.
            probe: name of the head to run; the bundle's first one by default.

        Raises:
            InputError: audio or options that can't be used, or a result that is not finite.
            NotFoundError: no such probe or label.
            UnsupportedError: the bundle takes embeddings, not audio, or has no head.
        """
        query = Query(
            threshold=threshold,
            top_k=top_k,
            label=label,
            merge=merge,
            merge_score=merge_score,
            overlap=overlap,
            hop=hop,
            final_clip=final_clip,
            probe=probe,
        )
        return pipeline.predict(self, partial(open_wave, wave, sample_rate), query)

    def predict_all(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        threshold: Threshold = None,
        top_k: int | None = None,
        label: Sequence[str] | None = None,
        merge: float | None = None,
        merge_score: MergeScore = "max",
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
    ) -> list[Prediction]:
        """Run all heads in one pass of the backbone; arguments and errors as in `predict`."""
        query = Query(
            threshold=threshold,
            top_k=top_k,
            label=label,
            merge=merge,
            merge_score=merge_score,
            overlap=overlap,
            hop=hop,
            final_clip=final_clip,
        )
        return pipeline.predict_all(self, partial(open_wave, wave, sample_rate), query).predictions

    def score(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        probe: str | None = None,
    ) -> WindowScores:
        """All scores of a recording as arrays; arguments and errors as in `predict`."""
        head, query = self.probe(probe), Query(overlap=overlap, hop=hop, final_clip=final_clip)
        spans, outputs = pipeline.run_recording(self, partial(open_wave, wave, sample_rate), query, [head.logits])
        return WindowScores(spans, activate(outputs[head.logits], head.activation))

    def embed(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        output: str | None = None,
    ) -> WindowEmbeddings:
        """The embeddings of a recording; arguments and errors as in `predict`.

        `output` names the output that is the embedding; the bundle's first one by default.
        """
        name, query = self.embedding(output).output, Query(overlap=overlap, hop=hop, final_clip=final_clip)
        spans, outputs = pipeline.run_recording(self, partial(open_wave, wave, sample_rate), query, [name])
        return WindowEmbeddings(spans, outputs[name])

    def infer_recording(
        self,
        wave: np.ndarray,
        sample_rate: int,
        *,
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
    ) -> Outputs:
        """The graph's raw outputs for a recording, each (N, …) with one row for each window; see `predict`."""
        names = [spec.name for spec in self.manifest.outputs]
        query = Query(overlap=overlap, hop=hop, final_clip=final_clip)
        return pipeline.run_recording(self, partial(open_wave, wave, sample_rate), query, names)[1]

    # -- tensors --------------------------------------------------------------------------------------------------

    def classify(
        self,
        embeddings: np.ndarray,
        *,
        threshold: Threshold = None,
        top_k: int | None = None,
        probe: str | None = None,
    ) -> Classification:
        """Run a head on embeddings, (B, D) or (B, T, D) as the manifest says.

        Raises:
            InputError: embeddings, threshold or top_k that can't be used.
            NotFoundError: no such probe.
            UnsupportedError: the bundle takes audio, not embeddings.
        """
        return pipeline.classify(self, embeddings, Query(threshold=threshold, top_k=top_k, probe=probe))

    def infer(self, batch: np.ndarray, padding_mask: np.ndarray | None = None) -> Outputs:
        """The graph's raw outputs for an input of the manifest's shape, (B, …) float32.

        Args:
            batch: the input.
            padding_mask: (B, S) bool, True where a clip is padded; None: nowhere.

        Raises:
            AudioError: samples far from [-1, 1].
            TensorError: another shape or type, no rows, or values or results that are not finite.
            TooLargeError: longer clips or sequences than the current request may send.
            UnsupportedError: a mask, and the bundle takes none.
        """
        self.check_input(batch)
        self._check_length(batch)
        if padding_mask is not None:
            self._check_mask(padding_mask, batch)
        inputs = self.graph_inputs(batch, padding_mask)
        size = self.backend.max_batch
        chunks = (tuple(each[start : start + size] for each in inputs) for start in range(0, len(batch), size))
        names = [spec.name for spec in self.manifest.outputs]
        if (audio := self.manifest.audio) is not None:
            current().timings.audio.append((self.model, batch.size / audio.sample_rate))
        return pipeline.collect(self.run(chunks, names))

    def graph_inputs(self, batch: np.ndarray, padding_mask: np.ndarray | None) -> Inputs:
        """The inputs of the graph: the batch and, if the graph takes one, the mask, by default of no padding."""
        if not self.manifest.takes_padding_mask:
            return (batch,)
        return batch, np.zeros(batch.shape, bool) if padding_mask is None else padding_mask

    def run(self, batches: Iterable[Inputs], names: Sequence[str]) -> Iterator[Outputs]:
        """The outputs of these names for each batch, in order; a few batches run at the same time.

        Raises:
            TensorError: results that are not finite.
            ClientGoneError, DeadlineError: the answer is no longer wanted.
        """
        batches = iter(batches)
        first, second = next(batches), next(batches, None)
        request = current()
        if second is None:  # starting a thread for one batch would only cost time
            request.checkpoint()
            yield self._job(request, names)(*first)
            return
        # A few batches ahead of the threads, not all of them: a recording of hours has many windows.
        ahead = 2 * self.threads
        waiting: deque[Future[Outputs]] = deque()
        try:
            for batch in chain((first, second), batches):
                request.checkpoint()
                waiting.append(self._pool.submit(self._job(request, names), *batch))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # none, unless an error ended the loop
                future.cancel()

    def check_input(self, batch: np.ndarray) -> None:
        """Raise TensorError unless the graph takes the batch, AudioError for samples far from [-1, 1]."""
        spec = self.manifest.inputs[0]
        if not spec.fits(batch.shape):
            row = "embedding" if self.manifest.audio is None else "clip"
            raise TensorError(
                f"input {spec.name!r} has shape {list(batch.shape)}; expected {list(spec.shape)}: "
                f"a row for each {row}"
            )
        audio = self.manifest.audio
        if audio is not None and audio.shortest_samples is not None and 0 < batch.shape[1] < audio.shortest_samples:
            raise TensorError(
                f"input {spec.name!r} has clips of {batch.shape[1]} samples; expected at least "
                f"{audio.shortest_samples} ({audio.shortest_samples / audio.sample_rate:g} s): pad with zeros"
            )
        if batch.dtype != np.float32:
            raise TensorError(f"input {spec.name!r} has type {batch.dtype}; expected float32")
        if batch.size == 0:
            raise TensorError(f"input {spec.name!r} of shape {list(batch.shape)} is empty; send at least one row")
        if not np.isfinite(batch).all():
            raise TensorError(f"input {spec.name!r} has NaN or infinite values; expected finite ones")
        if audio is not None:
            pipeline.find_peak(batch)

    def _check_length(self, batch: np.ndarray) -> None:
        limits = current().limits
        if (spec := self.manifest.audio) is not None:
            limits.check_clip(batch.shape[1], spec.sample_rate, spec.window_samples)
        elif batch.ndim == 3:
            limits.check_steps(batch.shape[1])

    def _check_mask(self, mask: np.ndarray, batch: np.ndarray) -> None:
        if not self.manifest.takes_padding_mask:
            raise UnsupportedError(
                f"bundle {self.manifest.name} takes no padding mask; leave it out, or export with --padding-mask"
            )
        name = self.manifest.inputs[1].name
        if mask.shape != batch.shape or mask.dtype != np.bool_:
            raise TensorError(
                f"input {name!r} has shape {list(mask.shape)} and type {mask.dtype}; expected the shape of the "
                f"clips, {list(batch.shape)}, and bool"
            )
        if mask.all(axis=1).any():
            raise TensorError(f"input {name!r} marks every sample of a clip as padding; leave out such clips")

    def _job(self, request: Request, names: Sequence[str]) -> Callable[..., Outputs]:
        """A function that runs one batch, in any thread, and notes its times in the request."""
        end_wait = request.begin(QUEUE)

        def run(*inputs: np.ndarray) -> Outputs:
            with self._places:
                if self._closed:
                    raise RuntimeError(f"the engine of bundle {self.manifest.name} is closed; open the bundle again")
                end_wait()
                end = request.begin(INFER)
                try:
                    outputs = self.backend.run(*inputs)
                finally:
                    end()
                    request.timings.batches.append(len(inputs[0]))
                    request.timings.models.append(self.model)
            for name in names:
                # Finite samples of 1e38 overflow in any model, and JSON has no word for the result.
                if not np.isfinite(outputs[name]).all():
                    raise TensorError(
                        f"output {name!r} is not finite for this input; expected audio samples in [-1, 1]"
                    )
            return {name: outputs[name] for name in names}

        return run

    # -- a repository of one bundle, for the pipeline -------------------------------------------------------------

    @contextmanager
    def lease(self, name: str | None, version: str | None) -> Iterator[Self]:
        """This engine."""
        yield self

    @contextmanager
    def lease_those(self, wanted: Callable[[Manifest], bool]) -> "Iterator[list[Engine]]":
        """This engine, if it is wanted."""
        yield [self] if wanted(self.manifest) else []


class FairSemaphore:
    """A semaphore that serves its waiters in the order in which they came.

    With `threading.Semaphore`, a thread that releases it may acquire it again before a waiter has woken up.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()  # each is held until its owner's turn has come

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take a place, once there is one and no other thread has waited longer."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def release(self) -> None:
        """Pass the place to the thread that has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1
