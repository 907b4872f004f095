"""The Open Inference Protocol (KServe and Triton v2) without a transport: what HTTP and gRPC share.

The model takes the one input that its manifest names, in one of two forms:

    FP32   the graph's own input, e.g. windows (B, samples)
    BYTES  (recordings,), audio bundles only: each element is an encoded recording (WAV, FLAC, OGG, MP3), which is
           decoded, mixed down, resampled and cut into windows as by ``/predict``

It answers the outputs of the manifest and, of each probe, ``scores`` (the logits after the activation; NAME.scores
beside NAME.logits where there are several), one row a window. For BYTES
the rows of all recordings follow one another, and the response parameter ``windows`` holds a JSON list of how many
rows each recording has, e.g. ``"[3, 1]"``. Request parameters: ``overlap`` in seconds (for BYTES) and ``probe``;
others are ignored, since clients add their own.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from pydantic import BaseModel

from avex_serve.errors import InputError, NotFoundError, TensorError, UnsupportedError
from avex_serve.runtime.audio import decode
from avex_serve.runtime.engine import Engine
from avex_serve.runtime.results import activate
from avex_serve.version import __version__

SERVER: Final = "avex-serve"
FP32: Final = "FP32"
BYTES: Final = "BYTES"
# Names as Triton gives them, where it has one.
PLATFORMS: Final = {"onnx": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}
_LENGTH_BYTES: Final = 4  # before each element of a BYTES tensor, little-endian


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


@dataclass(frozen=True)
class InputTensor:
    """An input as the client sent it; the data is not yet checked against the shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray | list[bytes]  # (elements,) float32 for FP32, elements for BYTES


class InferParameters(BaseModel):
    """Request parameters that mean something here."""

    overlap: float = 0.0
    probe: str | None = None


@dataclass(frozen=True)
class InferRequest:
    """What to infer."""

    inputs: list[InputTensor]
    outputs: list[str]  # names; none: all
    parameters: InferParameters


@dataclass(frozen=True)
class InferAnswer:
    """Outputs by name, each (rows, …) float32, and the parameters of the response."""

    outputs: dict[str, np.ndarray]
    parameters: dict[str, str]


class Model:
    """An engine as a model of the protocol."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self._engine.manifest.name

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self._engine.manifest.version

    def check_name(self, name: str, version: str | None) -> None:
        """Raise NotFoundError unless this is the model asked for; no or an empty version means any."""
        if name != self.name:
            raise NotFoundError(f"no model {name!r} here; this server has {self.name!r}")
        if version and version != self.version:
            raise NotFoundError(f"model {self.name!r} has no version {version!r}; it has {self.version!r}")

    def metadata(self) -> ModelMetadata:
        """What the model takes and answers."""
        manifest = self._engine.manifest
        outputs = [TensorMetadata(spec.name, FP32, spec.shape) for spec in manifest.outputs]
        scores = [TensorMetadata(p.scores, FP32, manifest.output(p.logits).shape) for p in manifest.probes]
        return ModelMetadata(
            name=self.name,
            versions=(self.version,),
            platform=PLATFORMS[self._engine.backend.format],
            inputs=tuple(TensorMetadata(spec.name, FP32, spec.shape) for spec in manifest.inputs),
            outputs=(*outputs, *scores),
        )

    def infer(self, request: InferRequest) -> InferAnswer:
        """Run the model.

        Raises:
            InputError: inputs, outputs or parameters that don't fit the model.
            NotFoundError: no such probe.
            UnsupportedError: recordings for a bundle that takes embeddings.
        """
        if request.parameters.probe is not None:
            self._engine.probe(request.parameters.probe)
        wanted = self._wanted(request.outputs)
        tensor = self._input(request.inputs)
        parameters: dict[str, str] = {}
        if isinstance(tensor.data, list):
            outputs, windows = self._infer_recordings(tensor.data, request.parameters.overlap)
            parameters["windows"] = json.dumps(windows)
        else:
            outputs = self._engine.infer(tensor.data.reshape(tensor.shape))
        for probe in self._engine.manifest.probes:
            outputs[probe.scores] = activate(outputs[probe.logits], probe.activation)
        return InferAnswer({name: outputs[name] for name in wanted}, parameters)

    def _wanted(self, names: list[str]) -> list[str]:
        known = [spec.name for spec in self.metadata().outputs]
        for name in names:
            if name not in known:
                raise InputError(f"no output {name!r}; model {self.name!r} has {', '.join(known)}")
        return names or known

    def _input(self, tensors: list[InputTensor]) -> InputTensor:
        name = self._engine.manifest.inputs[0].name
        if [tensor.name for tensor in tensors] != [name]:
            got = ", ".join(repr(tensor.name) for tensor in tensors) or "none"
            raise InputError(f"inputs are {got}; expected one, {name!r}")
        tensor = tensors[0]
        count = len(tensor.data)
        if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) != count:
            raise TensorError(f"input {name!r} of shape {list(tensor.shape)} comes with {count} elements")
        if tensor.datatype == BYTES and len(tensor.shape) != 1:
            raise TensorError(f"input {name!r} of type BYTES has shape {list(tensor.shape)}; expected [recordings]")
        return tensor

    def _infer_recordings(self, recordings: list[bytes], overlap: float) -> tuple[dict[str, np.ndarray], list[int]]:
        if self._engine.manifest.kind != "audio":
            raise UnsupportedError(f"model {self.name!r} takes embeddings as FP32, not recordings as BYTES")
        if not recordings:
            raise TensorError("no recordings; send at least one element")
        answers = [self._engine.infer_recording(*decode(recording), overlap=overlap) for recording in recordings]
        outputs = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
        return outputs, [len(next(iter(answer.values()))) for answer in answers]


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": SERVER, "version": __version__, "extensions": ["binary_tensor_data"]}


def check_datatype(name: str, datatype: str) -> None:
    """Raise TensorError for types other than FP32 and BYTES."""
    if datatype not in (FP32, BYTES):
        raise TensorError(f"input {name!r} has type {datatype!r}; expected FP32, or BYTES for encoded recordings")


def from_raw(name: str, datatype: str, raw: bytes) -> np.ndarray | list[bytes]:
    """The data of a tensor from its raw form: little-endian floats, or elements with their length before each.

    Raises:
        TensorError: another type, or bytes that don't add up.
    """
    check_datatype(name, datatype)
    if datatype == BYTES:
        return _split(name, raw)
    if len(raw) % 4:
        raise TensorError(f"input {name!r} has {len(raw)} bytes of data; FP32 needs a multiple of 4")
    # A copy, since a view of the request is neither writable nor aligned.
    return np.frombuffer(raw, dtype="<f4").astype(np.float32)


def from_numbers(name: str, data: object) -> np.ndarray:
    """A float32 array of the shape in which numbers are nested in lists.

    Raises:
        TensorError: something else than numbers, or lists of unequal lengths.
    """
    try:
        array = np.asarray(data)
    except ValueError:
        raise TensorError(f"{name} is ragged: lists beside one another differ in length") from None
    if array.size and array.dtype.kind not in "iuf":
        raise TensorError(f"{name} holds something else than numbers")
    with np.errstate(over="ignore"):  # the engine refuses what is infinite
        return array.astype(np.float32)


def to_raw(array: np.ndarray) -> bytes:
    """The raw form of an FP32 tensor: little-endian, row by row."""
    return array.astype("<f4").tobytes()


def _split(name: str, raw: bytes) -> list[bytes]:
    elements = []
    position = 0
    while position < len(raw):
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(raw[position:start], "little")
        if position > len(raw):
            raise TensorError(f"input {name!r}: an element of BYTES is longer than the data that came")
        elements.append(raw[start:position])
    return elements
