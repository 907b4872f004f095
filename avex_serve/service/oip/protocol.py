"""The Open Inference Protocol (KServe and Triton v2) without a transport: what HTTP and gRPC share.

The model takes the input that its manifest names first, in one of two forms:

    FP32   the graph's own input, e.g. windows (B, samples)
    BYTES  (recordings,): each element is an encoded recording (WAV, FLAC, OGG, MP3), which is decoded, mixed down,
           resampled and cut into windows as by ``/predict``; for a bundle that takes embeddings, an audio bundle
           that is served too makes them

If the manifest has a second input, ``padding_mask``, it may be sent with FP32: BOOL of the same shape, true where a
clip is padded. Without it, nothing is padded.

The answer has the outputs of the manifest and, for each probe, ``scores``: the logits after the activation, one row
a window. For each calibrated probe it has ``probabilities``, NaN for labels that are not calibrated. If there are
several probes, they are NAME.scores and so on. For BYTES the rows of all recordings follow one another, and these
response parameters tell them apart:

    windows    a JSON list of the number of rows of each recording, e.g. ``"[3, 1]"``
    spans      a JSON list of the start and end of each row, in seconds of its recording, e.g.
               ``"[[0.0, 5.0], [5.0, 10.0], [10.0, 11.2], [0.0, 3.0]]"``

The response parameter ``warnings`` is present, a JSON list of sentences, if there are reasons to doubt the answer;
``trained`` is present, and false, if a head has random weights. Request parameters are ``overlap`` and ``hop`` in
seconds, ``final_clip`` and ``channel`` (all for BYTES), and ``probe``. Others are ignored, since clients add their
own; the answer has a warning that names them, unless Triton's clients are known to add them.

For BYTES there is one more output, which is answered only if it is named: ``detections``, BYTES (detections,), each
a JSON object with ``start``, ``end``, ``label``, ``score`` and, of a calibrated label, ``probability`` as of
``/predict``. The parameters ``threshold`` (a number, or JSON of numbers by label as text), ``top_k``, ``label`` (a
label, or a JSON list), ``merge`` and ``merge_score`` choose them. The response parameter
``detections`` is a JSON list of their number in each recording.

A request of a stream is answered in parts, each with some rows of one recording: the parameters ``recording``, from
1, and ``spans`` say which. In the last part the parameter ``triton_final_response`` is true, and there are the
warnings.

The metadata and the configuration of a model have as parameters what a client must know of it: see
`Model.metadata`.

An output that is requested with the parameter ``classification: k`` (Triton's extension) is answered as BYTES, the k
largest values of each row as ``value:index:label``.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta

from avex_serve import __version__
from avex_serve.audio.reader import AudioStream, Channel
from avex_serve.errors import InputError, NotFoundError, TensorError, UnavailableError, UnsupportedError, naming
from avex_serve.inference import pipeline
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import known
from avex_serve.inference.scores import Selection, activate, check_labels, score_scale
from avex_serve.scheduling.request import current
from avex_serve.service import parsing
from avex_serve.service.parsing import BOOL, BYTES, FP32, LENGTH_BYTES

SERVER: Final = "avex-serve"
NO_SHARED_MEMORY: Final = "shared memory is not offered; send the tensor itself"
# Names as Triton gives them, where it has one.
PLATFORMS: Final = {
    "onnx": "onnxruntime_onnx",
    "onnx-int8": "onnxruntime_onnx",
    "openvino": "openvino_onnx",
    "torchscript": "pytorch_libtorch",
    "torch-half": "pytorch_libtorch",
}
BACKENDS: Final = {
    "onnxruntime_onnx": "onnxruntime",
    "openvino_onnx": "openvino",
    "pytorch_libtorch": "pytorch",
}
EXTENSIONS: Final = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters")
_DATATYPES: Final = {"float32": FP32, "bool": BOOL}
STEP: Final = 1000  # texts of a classification that are made in about a millisecond
TEXT_BYTES: Final = 256  # of memory for each of these texts in an answer: measured, rounded up
SPAN_BYTES: Final = 512  # of memory for the start and end of a window as text; measured, rounded up
# Request parameters with a meaning here: for recordings, for their detections, and all.
RECORDING_PARAMETERS: Final = ("overlap", "hop", "final_clip", "channel")
DETECTION_PARAMETERS: Final = ("threshold", "top_k", "label", "merge", "merge_score")
PARAMETERS: Final = (*RECORDING_PARAMETERS, "probe", *DETECTION_PARAMETERS)
# Those that clients of the protocol add by themselves, or that its messages use.
EXPECTED: Final = frozenset(
    ("binary_data", "binary_data_output", "binary_data_size", "classification", "content_type", "headers",
     "priority", "sequence_end", "sequence_id", "sequence_start", "timeout", "triton_enable_empty_final_response")
)  # fmt: skip
FIELDS: Final = "id, inputs, outputs, parameters, and of these name, shape, datatype, data, parameters"
NAMED: Final = 4  # of them that a warning names, the unknown ones
DETECTIONS: Final = "detections"
FINAL: Final = "triton_final_response"
Parameters = dict[str, str | bool | int | float]  # of a model or a response; lists are JSON, since gRPC has none


@dataclass(frozen=True)
class TensorMetadata:
    """Name, type and shape of an input or output; -1 marks a dynamic dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """What a model takes and answers."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    parameters: "Parameters"


@dataclass(frozen=True)
class InputTensor:
    """An input as the client sent it; the data is not yet checked against the shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray | list[bytes]  # (elements,) float32 for FP32, bool for BOOL; elements for BYTES


@dataclass(frozen=True)
class RequestedOutput:
    """An output that the client requests."""

    name: str
    classification: int = 0  # how many of the largest values to name; 0: the tensor itself


@dataclass(frozen=True)
class InferRequest:
    """What to infer."""

    inputs: list[InputTensor]
    outputs: list[RequestedOutput]  # none: all
    query: Query
    given: tuple[str, ...] = ()  # names of its parameters
    misplaced: tuple[str, ...] = ()  # names of parameters of its inputs and outputs that have no meaning there
    unknown: tuple[str, ...] = ()  # names of fields that its JSON has and the protocol lacks
    options: tuple[str, ...] = ()  # names in the URL's query, which mean nothing here


@dataclass(frozen=True)
class OutputTensor:
    """An output: (rows, …) float32 for FP32, (rows, …) of bytes for BYTES."""

    datatype: str
    array: np.ndarray


@dataclass(frozen=True)
class InferAnswer:
    """Outputs by name, and the parameters of the response."""

    outputs: dict[str, OutputTensor]
    parameters: "Parameters"


class Model:
    """An engine as a model of the protocol."""

    def __init__(self, engine: Engine, repository: Repository) -> None:
        """The engine is leased from that repository."""
        self._engine = engine
        self._repository = repository

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._engine.manifest.name

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self._engine.manifest.version

    def metadata(self) -> ModelMetadata:
        """What the model takes and answers.

        Its parameters are ``request_parameters``, a JSON list of the parameters that a request may have, if it takes
        audio those of `_audio_needs`, and for each probe ``labels``, a JSON list in the order of its scores,
        ``score_scale``: sigmoid, softmax or logits, and ``threshold``, the lowest score that is a detection by
        default; for a calibrated probe also ``thresholds``, a JSON object of the
        lowest score that is a detection by label, and ``target_precision`` of these detections. They are named as
        the outputs: NAME.labels if there are several. ``trained`` is false if a head has random weights.
        """
        manifest = self._engine.manifest
        return ModelMetadata(
            name=self.name,
            versions=tuple(self._repository.versions(self.name)),
            platform=PLATFORMS[self._engine.backend.format],
            inputs=tuple(TensorMetadata(spec.name, _DATATYPES[spec.dtype], spec.shape) for spec in manifest.inputs),
            outputs=self._outputs(),
            parameters={
                "trained": manifest.trained,
                "request_parameters": json.dumps(PARAMETERS),
                **self._audio_needs(),
                **self._probe_parameters(),
            },
        )

    def _outputs(self) -> tuple[TensorMetadata, ...]:
        """All outputs but the detections."""
        manifest = self._engine.manifest
        scores = [
            TensorMetadata(name, FP32, manifest.output(p.logits).shape)
            for p in manifest.probes
            for name in ([p.scores] if p.calibration is None else [p.scores, p.probabilities])
        ]
        return (*(TensorMetadata(spec.name, FP32, spec.shape) for spec in manifest.outputs), *scores)

    def _audio_needs(self) -> "Parameters":
        """For a model that takes audio: ``sample_rate`` in Hz, ``channels``, and windows in seconds and samples.

        ``recordings`` and ``detections`` say in words what `ModelMetadata` can't in inputs and outputs: how to send
        whole files, and how to ask for what is found in them. A model of embeddings has these two while a bundle is
        served that makes its embeddings.
        """
        manifest = self._engine.manifest
        if manifest.audio is None:
            with self._repository.lease_those(lambda source: bool(pipeline.links(source, manifest))) as sources:
                if not sources:
                    return {}
        needs: Parameters = {
            "recordings": f"send whole files (WAV, FLAC, OGG, MP3), of any rate and length, as {BYTES} of shape "
            f"[files] in {manifest.inputs[0].name}"
        }
        if (audio := manifest.audio) is not None:
            needs |= {
                "sample_rate": audio.sample_rate,
                "channels": 1,
                "window_seconds": audio.window_samples / audio.sample_rate,
                "window_samples": audio.window_samples,
            }
        if manifest.probes:
            needs[DETECTIONS] = (
                f"name the output {DETECTIONS!r} for a JSON object (start, end, label, score) of each sound found "
                "in recordings"
            )
        if audio is not None and audio.shortest_samples is not None:
            needs["shortest_samples"] = audio.shortest_samples
        return needs

    def _probe_parameters(self) -> "Parameters":
        parameters: Parameters = {}
        for probe in self._engine.manifest.probes:
            prefix = probe.logits.removesuffix("logits")
            parameters[f"{prefix}labels"] = json.dumps(self._engine.labels(probe.name), ensure_ascii=False)
            parameters[f"{prefix}score_scale"] = score_scale(probe.activation)
            parameters[f"{prefix}threshold"] = float(Selection.of(probe.activation, None, None).threshold)
            if (calibrator := self._engine.calibrator(probe.name)) is not None and probe.calibration is not None:
                parameters[f"{prefix}thresholds"] = json.dumps(calibrator.thresholds(), ensure_ascii=False)
                parameters[f"{prefix}target_precision"] = probe.calibration.target_precision
        return parameters

    def config(self) -> dict[str, Any]:
        """The configuration as Triton describes it, the fields that have a meaning here.

        The batch is an ordinary dimension, which Triton writes as ``max_batch_size`` 0.
        """
        metadata = self.metadata()
        inputs, outputs = (
            [{"name": t.name, "data_type": f"TYPE_{t.datatype}", "dims": list(t.shape)} for t in tensors]
            for tensors in (metadata.inputs, metadata.outputs)
        )
        return {
            "name": self.name,
            "platform": metadata.platform,
            "backend": BACKENDS[metadata.platform],
            "max_batch_size": 0,
            "input": inputs,
            "output": outputs,
            # The metadata's messages of Triton's gRPC client have no parameters, those of the configuration do.
            "parameters": {
                name: {"string_value": value if isinstance(value, str) else json.dumps(value)}
                for name, value in metadata.parameters.items()
            },
        }

    def infer(self, request: InferRequest) -> InferAnswer:
        """Run the model.

        Raises:
            InputError: inputs, outputs or parameters that don't fit the model.
            NotFoundError: no such probe.
            UnsupportedError: recordings, and no audio bundle that is served makes the embeddings that it takes.
        """
        wanted, tensor, mask = self._checked(request)
        if not isinstance(tensor.data, list):
            return self._infer_tensor(wanted, tensor, mask, _unused(request, tensor))
        parts, spans, warnings, found, counts = [], [], [], [], []
        for number, recording in enumerate(tensor.data, 1):
            audio = _opening(recording, number, len(tensor.data))
            with pipeline.open_rows(self._repository, self._engine, audio, request.query) as rows:
                span, part = rows.collect()
            spans.append(span)
            parts.append(part)
            warnings.append(rows.warnings)
            if (detecting := self._detecting(wanted, request.query)) is not None:
                found += [*detecting.detect(span, part, early=False), *detecting.rest()]
            counts.append(len(found))
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        all_spans = np.concatenate(spans)
        current().extend_answer(SPAN_BYTES * len(all_spans), "send fewer recordings at once, or with less overlap")
        parameters: Parameters = {
            "windows": json.dumps([len(span) for span in spans]),
            "spans": json.dumps(all_spans.tolist()),
        }
        if self._detecting(wanted, request.query) is not None:
            parameters[DETECTIONS] = json.dumps(np.diff(counts, prepend=0).tolist())
        return self._answer(wanted, outputs, parameters, _numbered(warnings) + _unused(request, tensor), found)

    def stream(self, request: InferRequest) -> Iterator[InferAnswer]:
        """Run the model, and answer in parts while it runs; errors as of `infer`."""
        wanted, tensor, mask = self._checked(request)
        if not isinstance(tensor.data, list):
            answer = self._infer_tensor(wanted, tensor, mask, _unused(request, tensor))
            answer.parameters[FINAL] = True
            yield answer
            return
        warnings: list[Sequence[str]] = []
        held: _Part | None = None  # until it is known whether it is the last one
        for number, recording in enumerate(tensor.data, 1):
            detecting = self._detecting(wanted, request.query)
            audio = _opening(recording, number, len(tensor.data))
            with pipeline.open_rows(self._repository, self._engine, audio, request.query) as rows:
                for spans, outputs in rows:
                    if held is not None:
                        yield self._part(wanted, held)
                    found = [] if detecting is None else detecting.detect(spans, outputs, early=True)
                    held = _Part(number, spans, outputs, found)
            if held is not None and detecting is not None:
                held.detections.extend(detecting.rest())
            warnings.append(rows.warnings)
        assert held is not None
        yield self._part(wanted, held, _numbered(warnings) + _unused(request, tensor), final=True)

    def _part(
        self, wanted: list[RequestedOutput], part: "_Part", warnings: Sequence[str] = (), *, final: bool = False
    ) -> InferAnswer:
        parameters: Parameters = {
            "recording": part.recording,
            "spans": json.dumps(part.spans.tolist()),
            FINAL: final,
        }
        return self._answer(wanted, part.outputs, parameters, warnings, part.detections)

    def _checked(self, request: InferRequest) -> tuple[list[RequestedOutput], InputTensor, np.ndarray | None]:
        """The outputs that are wanted, the input, and the padding mask if there is one; errors as of `infer`."""
        query = request.query
        if query.probe is not None:
            self._engine.probe(query.probe)
        wanted = self._wanted(request.outputs)
        tensor, mask = self._inputs(request.inputs)
        of_recordings = isinstance(tensor.data, list)
        if of_recordings and not tensor.data:
            raise TensorError("no recordings; send at least one element")
        for output in wanted:
            if output.name == DETECTIONS and (output.classification or not of_recordings):
                raise InputError(f"{DETECTIONS} are of recordings, sent as BYTES, and have no classification")
        self._detecting(wanted, query)  # raises for options that can't be
        return wanted, tensor, mask

    def _wanted(self, outputs: list[RequestedOutput]) -> list[RequestedOutput]:
        default = [spec.name for spec in self._outputs()]
        known = [*default, DETECTIONS] if self._engine.manifest.probes else default
        for output in outputs:
            if output.name not in known:
                raise InputError(f"no output {output.name!r}; model {self.name!r} has {', '.join(known)}")
        return outputs or [RequestedOutput(name) for name in default]

    def _detecting(self, wanted: Sequence[RequestedOutput], query: Query) -> "_Detecting | None":
        """What makes the detections of a recording, if they are wanted."""
        if all(output.name != DETECTIONS for output in wanted):
            return None
        return _Detecting(self._engine, query)

    def _infer_tensor(
        self, wanted: list[RequestedOutput], tensor: InputTensor, mask: np.ndarray | None, unused: list[str]
    ) -> InferAnswer:
        """The answer to windows or embeddings."""
        batch = _shaped(tensor)
        self._check_windows(batch)
        outputs, warnings = self._engine.infer(batch, mask), [*self._engine.warnings]
        if self._engine.manifest.kind == "audio":
            warnings += pipeline.level_warnings(pipeline.find_peak(batch))
        return self._answer(wanted, outputs, {}, [*warnings, *unused])

    def _answer(
        self,
        wanted: list[RequestedOutput],
        outputs: dict[str, np.ndarray],
        parameters: "Parameters",
        warnings: Sequence[str],
        detections: Sequence[bytes] = (),
    ) -> InferAnswer:
        """The outputs that are wanted, from those of the graph."""
        if warnings:
            parameters["warnings"] = json.dumps(warnings, ensure_ascii=False)
        outputs = {**outputs, DETECTIONS: np.array(detections, dtype=object)}
        labels: dict[str, tuple[str, ...]] = {}
        for probe in self._engine.manifest.probes:
            outputs[probe.scores] = activate(outputs[probe.logits], probe.activation)
            names = [probe.logits, probe.scores]
            if (calibrator := self._engine.calibrator(probe.name)) is not None:
                outputs[probe.probabilities] = calibrator.probabilities(outputs[probe.scores])
                names.append(probe.probabilities)
            labels |= dict.fromkeys(names, self._engine.labels(probe.name))
        if not self._engine.manifest.trained:
            parameters["trained"] = False
        answers = {
            output.name: _classified(outputs[output.name], output.classification, labels.get(output.name))
            if output.classification
            else OutputTensor(BYTES if output.name == DETECTIONS else FP32, outputs[output.name])
            for output in wanted
        }
        return InferAnswer(answers, parameters)

    def _inputs(self, tensors: list[InputTensor]) -> tuple[InputTensor, np.ndarray | None]:
        """The input, and the padding mask if there is one."""
        name, *others = (spec.name for spec in self._engine.manifest.inputs)
        given = {tensor.name: tensor for tensor in tensors}
        if len(given) != len(tensors) or name not in given or not given.keys() <= {name, *others}:
            got = ", ".join(repr(tensor.name) for tensor in tensors) or "none"
            also = "".join(f", or {other!r} too" for other in others)
            also += ", for recordings too" * any(tensor.datatype == BYTES for tensor in tensors)
            raise InputError(f"inputs are {got}; expected one, {name!r}{also}")
        for tensor in tensors:
            if (count := len(tensor.data)) != parsing.elements(tensor.name, tensor.shape):
                raise parsing.wrong_count(tensor.name, tensor.shape, count)
        tensor = given[name]
        if tensor.datatype == BOOL:
            raise TensorError(f"input {name!r} has type BOOL; expected FP32, or BYTES for encoded recordings")
        if tensor.datatype == BYTES and len(tensor.shape) != 1:
            raise TensorError(f"input {name!r} of type BYTES has shape {list(tensor.shape)}; expected [recordings]")
        mask = next((given[other] for other in others if other in given), None)
        if mask is None:
            return tensor, None
        if mask.datatype != BOOL or tensor.datatype != FP32:
            raise TensorError(
                f"input {mask.name!r} has type {mask.datatype} with {tensor.datatype}; expected BOOL with FP32: the "
                "service makes the mask of recordings"
            )
        return tensor, _shaped(mask)

    def _check_windows(self, batch: np.ndarray) -> None:
        """Refuse what looks like a recording that isn't cut into windows, with the remedy."""
        audio, spec = self._engine.manifest.audio, self._engine.manifest.inputs[0]
        if audio is None or (batch.ndim == 2 and spec.shape[1] in (-1, batch.shape[1])):
            return
        raise TensorError(
            f"input {spec.name!r} has shape {list(batch.shape)}; expected {list(spec.shape)}: a row for each window "
            f"of {audio.window_samples} samples at {audio.sample_rate} Hz. To send recordings, send their files "
            f"as {BYTES}"
        )


@dataclass
class _Part:
    """Some rows of a recording."""

    recording: int  # its number, from 1
    spans: np.ndarray  # (B, 2) float64, start and end of each in seconds
    outputs: dict[str, np.ndarray]  # of the graph, each (B, …)
    detections: list[bytes]


class _Detecting:
    """Makes the detections of a recording by one head, each as JSON."""

    def __init__(self, engine: Engine, query: Query) -> None:
        """The query's probe, or else the first one; errors as of `HeadRun`."""
        head = engine.probe(query.probe)
        check_labels(pipeline.named(query), engine.labels(head.name))
        self._head = pipeline.HeadRun(engine, head, head.logits, query)

    def detect(self, spans: np.ndarray, outputs: dict[str, np.ndarray], *, early: bool) -> list[bytes]:
        """Those that no later window changes; if not early, `rest` has them."""
        head = self._head.head
        scores = activate(outputs[head.logits], head.activation)
        windows = self._head.detect_scores(spans, scores, early=early)
        return [msgspec.json.encode(one) for window in windows for one in known(window)]

    def rest(self) -> list[bytes]:
        """Those that are left."""
        return [msgspec.json.encode(one) for one in known(self._head.rest())]


def _opening(recording: bytes, number: int, count: int) -> pipeline.Audio:
    """What opens one of the recordings of a request; of several, errors name its number."""

    @contextmanager
    def numbered(channel: Channel) -> Iterator[AudioStream]:
        with naming(f"recording {number}"), parsing.open_recording(channel, data=recording) as stream:
            yield stream

    return numbered if count > 1 else partial(parsing.open_recording, data=recording)


def _numbered(warnings: Sequence[Sequence[str]]) -> list[str]:
    """The warnings about each recording, as one list: those of all once, and others with the recording's number."""
    of_all = [each for each in warnings[0] if all(each in others for others in warnings)]
    return of_all + [
        f"recording {number}: {each}" for number, own in enumerate(warnings, 1) for each in own if each not in of_all
    ]


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": SERVER, "version": __version__, "extensions": list(EXTENSIONS)}


def to_raw(tensor: OutputTensor) -> bytes:
    """The raw form of a tensor, row by row: see `from_raw`."""
    if tensor.datatype == FP32:
        return tensor.array.astype("<f4").tobytes()
    return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in tensor.array.ravel())


def parse_output(name: str, parameters: dict[str, Any]) -> RequestedOutput:
    """An output that a client requests.

    Raises:
        InputError: a parameter of another type or value.
        UnsupportedError: shared memory.
    """
    refuse_shared_memory(name, parameters)
    count = parameters.get("classification", 0)
    return RequestedOutput(name, parsing.value("classification", count, Annotated[int, Meta(ge=0)]))


def find_misplaced(tensors: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The names of parameters of inputs and outputs that mean nothing there."""
    names = dict.fromkeys(name for parameters in tensors for name in parameters)
    return tuple(name for name in names if name not in EXPECTED)


def parse_parameters(parameters: Mapping[str, Any]) -> Query:
    """The query that request parameters describe; InputError for values of another type."""
    given = {name: parameters[name] for name in PARAMETERS if parameters.get(name) is not None}
    return parsing.query(given, PARAMETERS)


def _unused(request: InferRequest, tensor: InputTensor) -> list[str]:
    """Warnings of parameters and options that the request has and that change nothing."""

    def given(names: Sequence[str]) -> list[str]:
        return [name for name in names if name in request.given]

    unknown = [name for name in request.given if name not in PARAMETERS and name not in EXPECTED]
    of_recordings = [] if isinstance(tensor.data, list) else given(RECORDING_PARAMETERS)
    detects = any(output.name == DETECTIONS for output in request.outputs)
    of_detections = [] if detects else given(DETECTION_PARAMETERS)
    misplaced = [name for name in request.misplaced if name in PARAMETERS]
    without_meaning = [name for name in request.misplaced if name not in PARAMETERS]
    faults = (
        (
            "unknown fields",
            request.unknown,
            f"known: {FIELDS}; options belong in parameters, the version in the path",
        ),
        ("unknown parameters", unknown, f"known: {', '.join(PARAMETERS)}"),
        ("parameters for recordings", of_recordings, f"the input is {tensor.datatype}, not {BYTES}"),
        ("parameters for detections", of_detections, f"ask for the output {DETECTIONS!r}"),
        ("parameters of inputs and outputs", misplaced, "send them as those of the request"),
        ("unknown parameters of inputs and outputs", without_meaning, "known: binary_data_size, classification"),
        ("options in the URL", request.options, "send parameters in the request"),
    )
    return [f"{what} were ignored: {_named(names)}; {hint}" for what, names, hint in faults if names]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name[: parsing.QUOTED]) for name in names[:NAMED]) + more


def refuse_shared_memory(name: str, parameters: Collection[str]) -> None:
    """Raise UnsupportedError if a tensor's parameters name a region of shared memory."""
    if "shared_memory_region" in parameters:
        raise UnsupportedError(f"{name!r}: {NO_SHARED_MEMORY}")


def _shaped(tensor: InputTensor) -> np.ndarray:
    """The data of an FP32 or BOOL tensor in its shape."""
    assert isinstance(tensor.data, np.ndarray)
    try:
        return tensor.data.reshape(tensor.shape)
    except ValueError:  # no elements, and a dimension larger than numpy allows
        raise TensorError(f"input {tensor.name!r} has an impossible shape") from None


def _classified(values: np.ndarray, count: int, labels: tuple[str, ...] | None) -> OutputTensor:
    """The largest values of each row, the largest first, as (…, count) texts ``value:index[:label]``."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    current().extend_answer(TEXT_BYTES * order.size, "ask for a lower classification, or send fewer rows")
    best = np.empty(order.shape, dtype=object)
    for done, (place, index) in enumerate(np.ndenumerate(order)):
        if done and done % STEP == 0:
            current().checkpoint()
        text = f"{values[(*place[:-1], index)]:f}:{index}"  # a value as Triton writes it
        best[place] = (f"{text}:{labels[index]}" if labels is not None else text).encode()
    return OutputTensor(BYTES, best)


# -- the repository, as the protocol shows it -----------------------------------------------------------------------

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"

# Triton's extensions that are not offered: paths under /v2, with {name} and {version} of a model, and gRPC methods.
NO_STATISTICS: Final = "statistics are not offered here; GET /metrics has them"
NO_SETTINGS: Final = "trace and log settings are not offered; set them when you start the service"
REFUSED_PATHS: Final = {
    "/models/stats": NO_STATISTICS,
    "/models/{name}/stats": NO_STATISTICS,
    "/models/{name}/versions/{version}/stats": NO_STATISTICS,
    "/models/{name}/trace/setting": NO_SETTINGS,
    "/trace/setting": NO_SETTINGS,
    "/logging": NO_SETTINGS,
    "/systemsharedmemory/{rest:path}": NO_SHARED_MEMORY,
    "/cudasharedmemory/{rest:path}": NO_SHARED_MEMORY,
}
REFUSED_METHODS: Final = {
    "ModelStatistics": NO_STATISTICS,
    "TraceSetting": NO_SETTINGS,
    "LogSettings": NO_SETTINGS,
    "SystemSharedMemoryStatus": NO_SHARED_MEMORY,
    "SystemSharedMemoryRegister": NO_SHARED_MEMORY,
    "SystemSharedMemoryUnregister": NO_SHARED_MEMORY,
    "CudaSharedMemoryStatus": NO_SHARED_MEMORY,
    "CudaSharedMemoryRegister": NO_SHARED_MEMORY,
    "CudaSharedMemoryUnregister": NO_SHARED_MEMORY,
}


@contextmanager
def leased_model(repository: Repository, name: str, version: str | None) -> Iterator[Model]:
    """The model of that name and version; errors as of `Repository.lease`."""
    if not name:
        raise NotFoundError("the request names no model")
    with repository.lease(name, version) as engine:
        yield Model(engine, repository)


def model_ready(repository: Repository, name: str, version: str | None) -> bool:
    """Whether a model is served; NotFoundError for an unknown name or version."""
    try:
        with leased_model(repository, name, version):
            return True
    except UnavailableError:
        return False


def index(repository: Repository, *, ready: bool) -> list[dict[str, str]]:
    """Every bundle on disk, or only the ready ones, with its state and, if it is not served, the reason."""
    return [
        {
            "name": state.name,
            "version": state.version,
            "state": READY if state.ready else UNAVAILABLE,
            "reason": state.reason,
        }
        for state in repository.index()
        if state.ready or not ready
    ]


def check_load_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for parameters of Triton that carry a configuration or files."""
    if sent := sorted(name for name in parameters if name == "config" or name.startswith("file:")):
        raise UnsupportedError(
            f"load takes no {', '.join(sent)}: the service loads models only from the folders of AVEX_BUNDLE"
        )
