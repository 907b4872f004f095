"""The messages of the Open Inference Protocol over gRPC, from bytes to checked messages.

They are described in ``open_inference.proto``, compiled to the descriptors in ``open_inference.binpb`` and loaded
into a pool of their own. Generated code would tie the project to one range of protobuf versions, and clash in any
process that also loads Triton's client, which registers the same names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from avex_serve.errors import InputError, TooLargeError

MessageType = TypeVar("MessageType", bound=Message)

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
DESCRIPTORS: Final = Path(__file__).with_name("open_inference.binpb")  # made by `make proto`


def descriptors() -> Sequence[descriptor_pb2.FileDescriptorProto]:
    """What describes the protocol."""
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file


_pool = descriptor_pool.DescriptorPool()
for _file in descriptors():
    _pool.Add(_file)


def message_class(name: str) -> type[Message]:
    """The class of a message, e.g. ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


# -- from bytes to messages -----------------------------------------------------------------------------------------

# Decoded, a part of a message takes tens of bytes, even if it was sent in two. A message of the allowed size could
# grow to gigabytes, and take as long. Sensible messages have a handful of parts.
MAX_PARTS: Final = 2**14  # fields, also of inner messages, and numbers of the lists that grow when decoded
TEXT_BYTES: Final = 2**6  # of names, ids and parameters that count as a part: errors repeat them

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SKIPPED: Final = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_TAG: Final = 2**32
_LONGEST_VARINT: Final = 64  # bits

# Where to count further, by number of the field: in an inner message, or (None) in a packed list of integers.
# Packed floats and flags don't grow.
_Fields: TypeAlias = "dict[int, _Fields | None]"
_CONTENTS: Final[_Fields] = {2: None, 3: None, 4: None, 5: None}
_INPUT: Final[_Fields] = {3: None, 5: _CONTENTS}
_OUTPUT: Final[_Fields] = {}
_REQUEST: Final[_Fields] = {5: _INPUT, 6: _OUTPUT}
_RAW: Final = 7  # raw_input_contents of the request


def message(kind: type[MessageType], data: bytes) -> MessageType:
    """The message of that kind in bytes. If gRPC decoded it, it would log a traceback for other bytes.

    Raises:
        InputError: the bytes are not such a message.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InputError(f"the request is not a {kind.DESCRIPTOR.name}") from None


def split(data: bytes) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest without its raw_input_contents, and views of these: decoding would copy them.

    Raises:
        TooLargeError: the message has more than `MAX_PARTS`.
        InputError: the bytes are not such a message.
    """
    fields: list[tuple[int, int, int]] = []  # start, start of the content, end
    _count(data, 0, len(data), _REQUEST, 0, fields)
    view, rest, raw, done = memoryview(data), [], [], 0
    for start, content, end in fields:
        rest.append(view[done:start])
        raw.append(view[content:end])
        done = end
    return b"".join([*rest, view[done:]]), raw


def _count(
    data: bytes, at: int, end: int, fields: _Fields, parts: int, raw: list[tuple[int, int, int]] | None = None
) -> int:
    """The parts so far, and those of the message between two positions of the data; finds the raw contents too."""
    while at < end:
        start = at
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
            elif raw is not None and number == _RAW:
                raw.append((start, at, at + length))
            elif fields is not _CONTENTS:
                parts += length // TEXT_BYTES
            at += length
        elif wire_type in _SKIPPED:
            at += _SKIPPED[wire_type]
        else:
            raise _malformed()
        if parts > MAX_PARTS:
            raise TooLargeError(
                f"the message has more than {MAX_PARTS} fields and numbers, or longer names and parameters; "
                "send tensors in raw_input_contents"
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
    return InputError("the request is not a ModelInferRequest")
