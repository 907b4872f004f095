"""How many parts a ModelInfer message has, counted before it is decoded.

Decoded, a part takes tens of bytes, however few it came in: two for an empty input. A message of the size that is
taken would grow to gigabytes, and with it the time that it takes. Sensible messages have a handful of parts.
"""

from typing import Final, TypeAlias

from avex_serve.errors import InputError, TooLargeError

MAX_PARTS: Final = 2**14  # fields, also of inner messages, and numbers of those lists that grow when decoded

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SKIPPED: Final = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_TAG: Final = 2**32
_LONGEST_VARINT: Final = 64  # bits

# Where to look further, by number of the field: into an inner message, or (None) at a packed list of integers.
# Parameters are parts by themselves; packed floats and flags don't grow.
_Fields: TypeAlias = "dict[int, _Fields | None]"
_CONTENTS: Final[_Fields] = {2: None, 3: None, 4: None, 5: None}
_INPUT: Final[_Fields] = {3: None, 5: _CONTENTS}
_OUTPUT: Final[_Fields] = {}
_REQUEST: Final[_Fields] = {5: _INPUT, 6: _OUTPUT}


def check_parts(data: bytes) -> None:
    """Make sure that a ModelInferRequest, as it came, has no more than `MAX_PARTS`.

    Raises:
        TooLargeError: it has more.
        InputError: it is no such message.
    """
    _count(data, 0, len(data), _REQUEST, 0)


def _count(data: bytes, at: int, end: int, fields: _Fields, parts: int) -> int:
    """The number of parts before, and of those between two places of the data, which hold one message."""
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
    """The number at a place of the data, and where it ends."""
    value = shift = 0
    while at < end and shift < _LONGEST_VARINT:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _malformed()


def _malformed() -> InputError:
    return InputError("the request is no ModelInferRequest")
