"""The Open Inference Protocol's messages over HTTP: JSON, with tensors inside it or in binary after it."""

import base64
import binascii
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import numpy as np
from pydantic import BaseModel, TypeAdapter

from avex_serve.errors import InputError, TensorError
from avex_serve.inference.results import NUMBER_BYTES
from avex_serve.scheduling.request import current
from avex_serve.service import oip
from avex_serve.service.options import validated

# Of the binary tensor extension: how much of the body is JSON.
JSON_LENGTH: Final = "Inference-Header-Content-Length"
# Eight times as fast as json's, which would keep the interpreter from everything else for seconds.
_JSON: Final = TypeAdapter(dict[str, Any])


class _Input(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(BaseModel):
    name: str
    parameters: dict[str, Any] = {}


class _Request(BaseModel):
    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: list[_Input]
    outputs: list[_Output] = []


class IndexRequest(BaseModel):
    """A request for the index of the repository."""

    ready: bool = False  # those alone that are ready


class ControlRequest(BaseModel):
    """A request to load or unload a model."""

    parameters: dict[str, Any] = {}


class JsonRequest(NamedTuple):
    """A request and how its answer is wanted."""

    infer: oip.InferRequest
    id: str
    binary: frozenset[str] | None  # outputs wanted in binary; None: all


class Body(NamedTuple):
    """The body of a response."""

    content: bytes
    json_length: int | None  # bytes of JSON before the binary tensors; None: it is all JSON


def parse_request(body: bytes, json_length: str | None) -> JsonRequest:
    """The request in a body.

    Args:
        body: JSON, then the binary tensors.
        json_length: value of the header `JSON_LENGTH`, None without it.

    Raises:
        InputError: a body that is not such a request.
    """
    split = _split(body, json_length)
    request = validated(_Request, body[:split])
    inputs, rest = [], body[split:]
    for tensor in request.inputs:
        oip.refuse_shared_memory(tensor.name, tensor.parameters)
        if (size := tensor.parameters.get("binary_data_size")) is None:
            data = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise TensorError(
                    f"input {tensor.name!r}: binary_data_size is {size!r}; {len(rest)} bytes follow the JSON"
                )
            data, rest = oip.from_raw(tensor.name, tensor.datatype, tensor.shape, rest[:size]), rest[size:]
        inputs.append(oip.InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    if rest:
        raise TensorError(f"{len(rest)} bytes follow the JSON that no input lays claim to by binary_data_size")
    return JsonRequest(
        oip.InferRequest(
            inputs=inputs,
            outputs=[oip.parse_output(output.name, output.parameters) for output in request.outputs],
            parameters=validated(oip.InferParameters, request.parameters),
        ),
        request.id,
        _wanted_in_binary(request),
    )


def parse_index_request(body: bytes) -> IndexRequest:
    """The request in a body, which may be empty; InputError if it is something else."""
    return validated(IndexRequest, body or b"{}")


def parse_control_request(body: bytes) -> ControlRequest:
    """The request in a body, which may be empty; InputError if it is something else."""
    return validated(ControlRequest, body or b"{}")


def dump_answer(model: oip.Model, request: JsonRequest, answer: oip.InferAnswer) -> Body:
    """The body of the response."""
    outputs, tensors = [], []
    for name, tensor in answer.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        if request.binary is None or name in request.binary:
            tensors.append(oip.to_raw(tensor))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
        elif tensor.datatype == oip.BYTES:
            output["data"] = [each.decode() for each in tensor.array.ravel()]
        else:
            current().extend_answer(
                NUMBER_BYTES * tensor.array.size, "ask for outputs in binary, or send fewer rows"
            )
            output["data"] = tensor.array.ravel().tolist()
        outputs.append(output)
    document: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id:
        document["id"] = request.id
    if answer.parameters:
        document["parameters"] = answer.parameters
    head = _JSON.dump_json({**document, "outputs": outputs})
    return Body(b"".join([head, *tensors]), len(head) if tensors else None)


def dump_metadata(metadata: oip.ModelMetadata) -> dict[str, Any]:
    """The metadata as a JSON document."""
    return asdict(metadata)


def _split(body: bytes, json_length: str | None) -> int:
    if json_length is None:
        return len(body)
    try:
        split = int(json_length)
    except ValueError:
        split = -1
    if not 0 <= split <= len(body):
        raise InputError(f"{JSON_LENGTH} is {json_length[:20]!r}; expected a number up to the body's {len(body)}")
    return split


def _from_json(tensor: _Input) -> np.ndarray | list[bytes]:
    oip.check_datatype(tensor.name, tensor.datatype)
    if tensor.data is None:
        raise TensorError(f"input {tensor.name!r} has no data")
    if tensor.datatype == oip.FP32:
        return oip.from_numbers(f"input {tensor.name!r}", tensor.data).ravel()
    if tensor.datatype == oip.BOOL:
        return oip.from_flags(f"input {tensor.name!r}", tensor.data).ravel()
    if not isinstance(tensor.data, list) or not all(isinstance(text, str) for text in tensor.data):
        raise TensorError(f"input {tensor.name!r} of type BYTES: expected a list of strings")
    try:
        # JSON can't hold arbitrary bytes.
        return [base64.b64decode(text, validate=True) for text in tensor.data]
    except (binascii.Error, ValueError):
        raise TensorError(
            f"input {tensor.name!r} of type BYTES: expected each recording as base64, or as a binary tensor"
        ) from None


def _wanted_in_binary(request: _Request) -> frozenset[str] | None:
    if request.parameters.get("binary_data_output") is True and not request.outputs:
        return None
    default = request.parameters.get("binary_data_output", False)
    return frozenset(
        output.name for output in request.outputs if output.parameters.get("binary_data", default) is True
    )
