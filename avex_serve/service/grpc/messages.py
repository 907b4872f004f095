"""The messages of the Open Inference Protocol over gRPC, from bytes to checked messages.

They are described in ``open_inference.proto``, compiled to the descriptors in ``open_inference.binpb`` and loaded
into a pool of their own. Generated code would tie the project to one range of protobuf versions, and clash in any
process that also loads Triton's client, which registers the same names.
"""

from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from avex_serve.errors import InputError, TooLargeError

MessageType = TypeVar("MessageType", bound=Message)

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
DESCRIPTORS: Final = Path(__file__).with_name("open_inference.binpb")  # made by `make proto`

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
    _pool.Add(_file)


def message_class(name: str) -> type[Message]:
    """The class of a message, e.g. ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


# -- from bytes to messages -----------------------------------------------------------------------------------------

# Decoded, a part of a message takes tens of bytes, even if it was sent in two. A message of the allowed size could
# grow to gigabytes, and take as long. Sensible messages have a handful of parts.
MAX_PARTS: Final = 2**14  # fields, also of inner messages, and numbers of the lists that grow when decoded

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SKIPPED: Final = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_TAG: Final = 2**32
_LONGEST_VARINT: Final = 64  # bits

# Where to count further, by number of the field: in an inner message, or (None) in a packed list of integers.
# A parameter counts as one part; packed floats and flags don't grow.
_Fields: TypeAlias = "dict[int, _Fields | None]"
_CONTENTS: Final[_Fields] = {2: None, 3: None, 4: None, 5: None}
_INPUT: Final[_Fields] = {3: None, 5: _CONTENTS}
_OUTPUT: Final[_Fields] = {}
_REQUEST: Final[_Fields] = {5: _INPUT, 6: _OUTPUT}


def message(kind: type[MessageType], data: bytes) -> MessageType:
    """The message of that kind in bytes. If gRPC decoded it, it would log a traceback for bytes that are none.

    Raises:
        InputError: the bytes are no such message.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InputError(f"the request is no {kind.DESCRIPTOR.name}") from None


def check_parts(data: bytes) -> None:
    """Check that a ModelInferRequest, before it is decoded, has at most `MAX_PARTS`.

    Raises:
        TooLargeError: it has more.
        InputError: the bytes are no such message.
    """
    _count(data, 0, len(data), _REQUEST, 0)


def _count(data: bytes, at: int, end: int, fields: _Fields, parts: int) -> int:
    """The parts so far, and those of the message between two positions of the data."""
    while at < end:
        tag, at = _varint(data, at, end)
        if tag >= _LONGEST_TAG:
            raise _malformed()
        number, wire_type = tag >> 3, tag & 7
        parts += 1
        if wire_type == _VARINT:
            _, at = _varint(data, at, end)
        elif wire_type == _BYTES:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise _malformed()
            if number in fields:
                inner = fields[number]
                parts = parts + length if inner is None else _count(data, at, at + length, inner, parts)
            at += length
        elif wire_type in _SKIPPED:
            at += _SKIPPED[wire_type]
        else:
            raise _malformed()
        if parts > MAX_PARTS:
            raise TooLargeError(
                f"the message has more than {MAX_PARTS} fields and numbers; send tensors in raw_input_contents"
            )
    if at > end:
        raise _malformed()
    return parts


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at a position of the data, and the position after it."""
    number = shift = 0
    while at < end and shift < _LONGEST_VARINT:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise _malformed()


def _malformed() -> InputError:
    return InputError("the request is no ModelInferRequest")
