"""The Open Inference Protocol's messages over HTTP: JSON, with tensors inside it or in binary after it."""

import base64
import binascii
from collections.abc import Collection
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np

from avex_serve.errors import InputError, TensorError
from avex_serve.inference.results import NUMBER_BYTES
from avex_serve.scheduling.request import current
from avex_serve.service import parsing
from avex_serve.service.oip import protocol
from avex_serve.service.parsing import BOOL, BYTES, FP32

# Of the binary tensor extension: how much of the body is JSON.
JSON_LENGTH: Final = "Inference-Header-Content-Length"


# For `str.translate`: spaces are removed, and the alphabet for URLs becomes the usual one.
_PLAIN: Final = {**dict.fromkeys(map(ord, " \t\r\n")), ord("-"): "+", ord("_"): "/"}

Parameters: TypeAlias = dict[str, msgspec.Raw]


# Of inputs, outputs and types: errors repeat them.
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=1000)]


class _Input(msgspec.Struct):
    name: _Name
    shape: msgspec.Raw
    datatype: _Name
    parameters: Parameters = {}
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Output(msgspec.Struct):
    name: _Name
    parameters: Parameters = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[_Output] = []


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _ControlRequest(msgspec.Struct):
    parameters: Parameters = {}


class JsonRequest(NamedTuple):
    """A request, and the form of its answer."""

    infer: protocol.InferRequest
    id: str
    binary: frozenset[str] | None  # outputs wanted in binary; None: all


class ResponseBody(NamedTuple):
    """The body of a response."""

    content: bytes
    json_length: int | None  # bytes of JSON before the binary tensors; None: it is all JSON


def parse_request(body: bytes, json_length: str | None, options: Collection[str] = ()) -> JsonRequest:
    """The request in a body.

    Args:
        body: JSON, then the binary tensors.
        json_length: value of the header `JSON_LENGTH`, None without it.
        options: names in the URL's query, which has no meaning in the protocol.

    Raises:
        InputError: a body that is not such a request.
    """
    split = _split(body, json_length)
    document = body[:split]
    try:
        request = parsing.document(_Request, document, strict=False)
    except InputError as error:
        if json_length is None and "trailing characters" in str(error):
            raise InputError(f"{error}; if these are binary tensors, send the header {JSON_LENGTH}") from None
        raise
    inputs, of_inputs, rest = [], [], memoryview(body)[split:]
    for tensor in request.inputs:
        parameters = parsing.parameters(tensor.parameters)
        protocol.refuse_shared_memory(tensor.name, parameters)
        of_inputs.append(parameters)
        shape = parsing.from_shape(f"input {tensor.name!r}", tensor.shape)
        if (size := parameters.get("binary_data_size")) is None:
            data = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise TensorError(
                    f"input {tensor.name!r}: binary_data_size is {size!r}; {len(rest)} bytes follow the JSON"
                )
            data, rest = parsing.from_raw(tensor.name, tensor.datatype, shape, rest[:size]), rest[size:]
        inputs.append(protocol.InputTensor(tensor.name, tensor.datatype, tuple(shape), data))
    if rest:
        raise TensorError(f"{len(rest)} bytes after the JSON belong to no input; set binary_data_size of each")
    asked = parsing.parameters(request.parameters)
    outputs = [(output.name, parsing.parameters(output.parameters)) for output in request.outputs]
    return JsonRequest(
        protocol.InferRequest(
            inputs=inputs,
            outputs=[protocol.parse_output(name, parameters) for name, parameters in outputs],
            query=protocol.parse_parameters(asked),
            given=tuple(asked),
            misplaced=protocol.find_misplaced([*of_inputs, *(parameters for _, parameters in outputs)]),
            options=tuple(options),
            unknown=_unknown_fields(document),
        ),
        request.id,
        _wanted_in_binary(asked, outputs),
    )


def parse_index_request(body: bytes) -> bool:
    """Whether the index is to hold only ready models; the body may be empty."""
    return parsing.document(_IndexRequest, body or b"{}", strict=False).ready


def parse_control_request(body: bytes) -> dict[str, Any]:
    """The parameters of a request to load or unload a model; the body may be empty."""
    return parsing.parameters(parsing.document(_ControlRequest, body or b"{}", strict=False).parameters)


def dump_answer(model: protocol.Model, request: JsonRequest, answer: protocol.InferAnswer) -> ResponseBody:
    """The body of the response."""
    outputs, tensors = [], []
    for name, tensor in answer.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        if request.binary is None or name in request.binary:
            tensors.append(protocol.to_raw(tensor))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
        elif tensor.datatype == BYTES:
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
    head = msgspec.json.encode({**document, "outputs": outputs})
    return ResponseBody(b"".join([head, *tensors]), len(head) if tensors else None)


def _unknown_fields(document: bytes) -> tuple[str, ...]:
    """The names that a request, its inputs and its outputs don't have, such as ``output`` or ``inputs.rate``."""
    fields = parsing.document(dict[str, msgspec.Raw], document)
    unknown = dict.fromkeys(name for name in fields if name not in _Request.__struct_fields__)
    for name, kind in (("inputs", _Input), ("outputs", _Output)):
        for tensor in parsing.document(list[dict[str, msgspec.Raw]], bytes(fields.get(name, b"[]"))):
            unknown |= dict.fromkeys(f"{name}.{each}" for each in tensor if each not in kind.__struct_fields__)
    return tuple(unknown)


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
    name = f"input {tensor.name!r}"
    parsing.check_datatype(tensor.name, tensor.datatype)
    if bytes(tensor.data) == b"null":
        raise TensorError(f"{name} has no data")
    if tensor.datatype == FP32:
        return parsing.from_numbers(name, tensor.data).ravel()
    if tensor.datatype == BOOL:
        return parsing.from_flags(name, tensor.data).ravel()
    texts = parsing.from_texts(name, tensor.data)
    return [_from_base64(f"{name}, recording {number}", text) for number, text in enumerate(texts, 1)]


def _from_base64(name: str, text: str) -> bytes:
    """The bytes of a recording: JSON can't hold arbitrary ones. Line breaks and the head of a data URL are skipped.

    Both alphabets of base64 are read, that for URLs too.

    Raises:
        TensorError: no base64.
    """
    head, comma, rest = text.partition(",")
    if comma and head.lstrip()[:5].lower() == "data:":
        if not head.lower().rstrip().endswith(";base64"):
            raise TensorError(f"{name} is a data URL without base64; expected data:audio/wav;base64,…")
        text = rest
    try:
        return base64.b64decode(text.translate(_PLAIN), validate=True)
    except (binascii.Error, ValueError) as error:
        raise TensorError(
            f"{name} is no base64 ({error}); expected the file's bytes, neither its path nor its URL, as base64 "
            "with its padding, or as a binary tensor"
        ) from None


def _wanted_in_binary(
    parameters: dict[str, Any], outputs: list[tuple[str, dict[str, Any]]]
) -> frozenset[str] | None:
    default = parameters.get("binary_data_output", False)
    if default is True and not outputs:
        return None
    return frozenset(name for name, own in outputs if own.get("binary_data", default) is True)
