"""What clients send, from bytes and text to checked values: JSON, options and tensors.

This is the only place that decodes them. Limits on a document are checked here, before it is decoded.
"""

import codecs
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from avex_serve.audio.reader import CONVERT, AudioStream, Channel, open_audio
from avex_serve.errors import AudioError, InputError, TensorError, TooLargeError
from avex_serve.inference.pipeline import Query
from avex_serve.scheduling.request import current

Value = TypeVar("Value")

_NOT_FINITE: Final = re.compile(rb"[\[,:\s]-?(NaN|Infinity)\b")

_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as editors on Windows write them

MAX_MEMBERS: Final = 2**12  # names in a JSON document: each makes values that take many times its bytes
MAX_PARAMETER: Final = 256  # bytes of a parameter, unless it is a text
SEVERAL: Final = frozenset({"label"})  # options that may be sent more than once
QUOTED: Final = 80  # characters of a client's value that an error message repeats

# -- JSON and options -----------------------------------------------------------------------------------------------


def document(kind: type[Value], data: bytes, *, strict: bool = True) -> Value:
    """The value of that type in a JSON document.

    Args:
        kind: a Struct. Its lists of numbers are of type `msgspec.Raw`, which `from_numbers` reads with less memory.
        data: the document.
        strict: otherwise numbers and flags may be written as text.

    Raises:
        InputError: no JSON, or no such value; the message names the first fault.
        TooLargeError: more JSON than the current request may send.
    """
    if (found := kind_of(data)) not in (RECORDING, FORM):  # which fail at their first byte, whatever their length
        current().limits.check_json(len(data))
        if data.count(b":") > MAX_MEMBERS:
            raise TooLargeError(f"the JSON has more than {MAX_MEMBERS} names of values; send fewer of them")
    try:
        return msgspec.json.decode(data, type=kind, strict=strict)
    except msgspec.ValidationError as error:
        reason, _, place = _plain(error).partition(" - at `$.")
        if "unknown field" in reason:
            reason += f"; known: {', '.join(get_type_hints(kind))}"
        raise InputError(f"{place.rstrip('`')[:QUOTED]}: {reason}".lstrip(": ")) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = "" if found in (None, JSON) else f"; it is {found}"
        hint += ". Send recordings to /predict" if found in (RECORDING, FORM) else ""
        hint += "; write it as UTF-8 without a byte order mark" if data.startswith(_MARKS) else ""
        hint += "; JSON has no NaN or Infinity" if found == JSON and _NOT_FINITE.search(data) else ""
        raise InputError(f"the body is not valid JSON: {error}{hint}") from None
    except RecursionError:
        raise InputError("the JSON has too many lists or objects in one another") from None


def parameters(given: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """The values of parameters in JSON.

    Raises:
        InputError: a number beyond all ranges, or a text that is no UTF-8.
        TooLargeError: a long list or object.
    """
    values = {}
    for name, raw in given.items():
        text = bytes(raw)
        if len(text) > MAX_PARAMETER and text[:1] != b'"':
            raise TooLargeError(
                f"the parameter {name[:QUOTED]!r} has {len(text)} bytes; expected at most {MAX_PARAMETER}, or a text"
            )
        try:
            values[name] = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the parameter {name[:QUOTED]!r} can't be read: {error}") from None
    return values


def value(name: str, given: object, kind: Any) -> Any:
    """An option or parameter as a value of that type; numbers may be written as text.

    Raises:
        InputError: it isn't one.
    """
    number = given
    if isinstance(given, str) and given.startswith("{") and Mapping in {get_origin(part) for part in get_args(kind)}:
        with suppress(msgspec.DecodeError):
            number = msgspec.json.decode(given)
    elif isinstance(given, str):
        for convert in {int, float} & {kind, *get_args(kind)}:
            with suppress(ValueError):
                number = convert(given)
    try:
        return msgspec.convert(number, kind, strict=False)
    except msgspec.ValidationError as error:
        expected = _plain(error).partition(", got")[0].removesuffix(" or null")  # which stands for the default
        if Mapping in {get_origin(part) for part in get_args(kind)}:
            expected = 'expected a number, or JSON of numbers by label such as {"robin": 0.7}'
        elif isinstance(given, list):
            expected = "expected a list of texts alone"
        if words := [each for part in (kind, *get_args(kind)) for each in get_args(part) if isinstance(each, str)]:
            expected = f"expected {', '.join([*['a whole number'] * (int in get_args(kind)), *words])}"
        raise InputError(f"{name[:QUOTED]} is {_shortened(given)}; {expected}") from None


def query(given: Mapping[str, object], names: Collection[str]) -> Query:
    """The query that options describe.

    Args:
        given: the options by name.
        names: the options that may be given.

    Raises:
        InputError: an unknown option, or a value of another type.
    """
    for name in given:
        if name not in names:
            nearest = get_close_matches(name[:QUOTED], names, 1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise InputError(f"unknown option {name[:QUOTED]!r}; {hint}known: {', '.join(names)}")
    if any(name in SEVERAL and given[name] == [] for name in given):
        raise InputError("label is an empty list; expected one label or more, or none of this option for all labels")
    listed = {name: _listed(text) for name, text in given.items() if name in SEVERAL and isinstance(text, str)}
    return Query(**{name: value(name, each, _query_types()[name]) for name, each in {**given, **listed}.items()})


def query_from_text(pairs: Iterable[tuple[str, str]], names: Collection[str]) -> Query:
    """The query that query parameters and form fields describe.

    BentoML's client writes form fields as JSON (``null``, ``0.5``, ``"name"``, ``["a", "b"]``), people write plain
    text. An empty value and ``null`` stand for the default.

    Raises:
        InputError: as of `query`, or an option that is given more than once.
    """
    texts: dict[str, list[str]] = {}
    for name, text in pairs:
        if name in texts and name not in SEVERAL:
            raise InputError(f"{name[:QUOTED]} is given more than once; send it once")
        texts.setdefault(name, []).append(text)
    given: dict[str, object] = {}
    for name, sent in texts.items():
        if sent := [text for text in sent if text not in ("", "null")]:
            given[name] = (
                [each for text in sent for each in _listed(text)] if name in SEVERAL else _unquoted(sent[0])
            )
    return query(given, names)


@cache
def _query_types() -> dict[str, Any]:
    return get_type_hints(Query)


def _listed(text: str) -> list[str]:
    """The texts in a list of JSON, or the text itself."""
    if text.startswith("["):
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(text, type=list[str])
    return [_unquoted(text)]


def _unquoted(text: str) -> str:
    if text.startswith('"'):
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(text, type=str)
    return text


_PLAIN: Final = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "object": "an object",
    "array": "a list",
}


def _plain(error: msgspec.ValidationError) -> str:
    """Msgspec's message with plain words for its types."""

    def words(types: re.Match[str]) -> str:
        return " or ".join(_PLAIN.get(each, each) for each in types[1].split(" | "))

    text = re.sub(r"`((?:int|float|str|bool|object|array|null| \| )+)`", words, str(error))
    return text[:1].lower() + text[1:]


def _shortened(given: object) -> str:
    # A list may be a whole recording: its type is enough.
    text = {list: "a list", dict: "an object", bool: str(given).lower()}.get(type(given)) or repr(given)
    return text if len(text) <= QUOTED else text[:QUOTED] + "…"


# -- recordings, and what is sent instead of them -------------------------------------------------------------------

EMPTY: Final = "empty"
RECORDING: Final = "a recording"
FORM: Final = "a form"
JSON: Final = "JSON"
_KINDS: Final = (  # what bytes begin with
    (re.compile(rb"RIFF|RIFX|RF64|fLaC|OggS|ID3|FORM"), RECORDING),
    (re.compile(rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"), "a compressed file"),
    (re.compile(rb"\s*data:[\w.+-]*/[\w.+-]*[;,]"), "a data URL"),
    (re.compile(rb"\s*<(!|\?|html|svg)", re.IGNORECASE), "a web page"),
    (re.compile(rb"--[^\r\n]{1,70}\r?\nContent-Disposition:", re.IGNORECASE), FORM),
    (re.compile(rb"\s*[\[{]\s*([\[{\"\-\d\]}]|null|true|false)"), JSON),
    (re.compile(rb"[\w.%+-]+="), "a form as text"),
    (re.compile(rb"\s*(\w+://\S+|[^\r\n\0]+\.\w{2,4})\s*\Z"), "a path or a URL"),
    # Of RIFF, fLaC, OggS and ID3.
    (re.compile(rb"\s*\"?(UklGR|ZkxhQ|T2dnU|SUQz)"), "base64"),
)


def kind_of(data: bytes) -> str | None:
    """What bytes look like that aren't what was expected; None: nothing that clients usually send by mistake."""
    head = data[:200]
    return EMPTY if not data else next((kind for pattern, kind in _KINDS if pattern.match(head)), None)


@contextmanager
def open_recording(
    channel: Channel, *, data: bytes, remedy: str = "send the file's own bytes"
) -> Iterator[AudioStream]:
    """Open a recording that a client sent; errors as of `open_audio`.

    Args:
        channel: which one to read.
        data: the encoded bytes.
        remedy: how to send a recording, for messages about bytes that are something else.
    """
    try:
        with open_audio(data, channel) as stream:
            yield stream
    except AudioError as error:
        if (kind := kind_of(data)) in (None, RECORDING):
            raise
        found = f"{kind} without its Content-Type" if kind == FORM else kind
        fault = str(error).removesuffix(CONVERT)
        raise AudioError(f"{fault}; {remedy if kind == EMPTY else f'this is {found}, so {remedy}'}") from None


# -- tensors --------------------------------------------------------------------------------------------------------

FP32: Final = "FP32"
BYTES: Final = "BYTES"
BOOL: Final = "BOOL"
MAX_DIMENSIONS: Final = 64  # numpy's limit
STEP: Final = 1000  # elements of BYTES that are found in about a millisecond
PIECE: Final = 2**16  # bytes of numbers as text that are read in about a millisecond
LENGTH_BYTES: Final = 4  # before each element of a BYTES tensor, little-endian


def check_datatype(name: str, datatype: str) -> None:
    """Raise TensorError for types other than FP32, BYTES and BOOL."""
    if datatype not in (FP32, BYTES, BOOL):
        raise TensorError(f"input {name!r} has type {datatype!r}; expected FP32, or BYTES for encoded recordings")


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> np.ndarray | list[bytes]:
    """The data of a tensor from its raw form: little-endian floats, bytes 0 and 1, or elements after their length.

    Raises:
        TensorError: another type, bytes that don't add up, or BYTES with empty elements or more of them than the
            shape says.
        ClientGoneError, DeadlineError: between many elements.
    """
    check_datatype(name, datatype)
    if datatype == BYTES:
        current().limits.check_recordings(count := elements(name, shape))
        return _split(name, count, raw)
    if datatype == BOOL:
        flags = np.frombuffer(raw, dtype=np.uint8)
        if (flags > 1).any():
            raise TensorError(f"input {name!r} of type BOOL holds bytes other than 0 and 1")
        return flags.astype(bool)
    if len(raw) % 4:
        raise TensorError(f"input {name!r} has {len(raw)} bytes of data; FP32 needs a multiple of 4")
    # A copy, since a view of the request is neither writable nor aligned.
    return np.frombuffer(raw, dtype="<f4").astype(np.float32)


def from_flags(name: str, data: msgspec.Raw) -> np.ndarray:
    """A bool array of the shape in which truth values are nested in lists; errors as of `from_numbers`."""
    return _array(name, data, b"truefals", "true and false", bool)


def from_numbers(name: str, data: msgspec.Raw) -> np.ndarray:
    """A float32 array of the shape in which numbers are nested in lists.

    Args:
        name: for messages.
        data: JSON, without faults of grammar.

    Raises:
        TensorError: other values than numbers, lists of unequal lengths, or more lists in one another than a tensor
            has dimensions.
        OverloadError: all requests together hold too many bytes.
        ClientGoneError, DeadlineError: between many numbers.
    """
    with np.errstate(over="ignore"):  # the engine refuses infinite values
        return _array(name, data, b"0123456789+-.eE", "numbers", np.float32)


def from_texts(name: str, data: msgspec.Raw) -> list[str]:
    """The texts in a list; TensorError for anything else, TooLargeError for too many."""
    text = bytes(data)
    current().limits.check_recordings(text.count(b'"') // 2)
    try:
        return msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TensorError(
            f"{name} of type BYTES: expected one list of strings, each a recording as base64, and the shape "
            "[recordings]"
        ) from None


def from_shape(name: str, shape: msgspec.Raw) -> list[int]:
    """The shape of an input; TensorError for anything but a list of a few whole numbers."""
    text = bytes(shape)
    if (dimensions := text.count(b",") + 1) > MAX_DIMENSIONS:
        raise TensorError(
            f"{name} has an impossible shape of {dimensions} dimensions; expected at most {MAX_DIMENSIONS}"
        )
    try:
        return msgspec.json.decode(text, type=list[int], strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError):
        given = _shortened(text.decode("utf-8", "replace"))
        raise TensorError(f"{name}: the shape is {given}; expected a list of whole numbers") from None


def elements(name: str, shape: Sequence[int]) -> int:
    """How many elements a tensor of that shape has; TensorError for an impossible shape."""
    # A client may write any numbers here, and the product of a million of them takes minutes.
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise TensorError(
            f"input {name!r} has an impossible shape of {len(shape)} dimensions; expected at most "
            f"{MAX_DIMENSIONS}, none of them negative"
        )
    return math.prod(shape)


def wrong_count(name: str, shape: Sequence[int], count: int) -> TensorError:
    """The error for data that has another number of elements than its shape says."""
    return TensorError(
        f"input {name!r} of shape {list(shape)} has {count} elements; expected {elements(name, shape)}"
    )


def _array(name: str, data: msgspec.Raw, characters: bytes, values: str, dtype: type) -> np.ndarray:
    """An array from JSON, without a Python object for each number.

    Args:
        name: for messages.
        data: the JSON.
        characters: that its values consist of.
        values: their name in messages.
        dtype: of the array.
    """
    text = bytes(data).translate(None, b" \t\r\n")
    if text.translate(None, characters + b"[,]"):
        raise TensorError(f"{name} holds other values than {values}")
    shape = _nested_shape(name, text.translate(None, characters))
    if b"[]" in text:
        if text.strip(b"[,]"):
            raise _ragged(name)
        shape[-1] = 0
    count = math.prod(shape)
    current().extend_body(np.dtype(dtype).itemsize * count)
    array: np.ndarray = np.empty(count, dtype)
    flat = text.translate(None, b"[]")
    del text
    values_type: Any = list[bool] if dtype is bool else list[float]
    done = position = 0
    while done < count:
        end = flat.find(b",", position + PIECE)
        end = len(flat) if end < 0 else end
        try:
            piece = msgspec.json.decode(b"[%b]" % flat[position:end], type=values_type)
        except msgspec.ValidationError as error:
            raise InputError(f"{name}: {_plain(error).partition(' - at')[0]}") from None
        array[done : done + len(piece)] = piece
        done, position = done + len(piece), end + 1
        current().check_wanted()  # and no turn of others: they would wait along with all of this
    return array.reshape(shape)


def _nested_shape(name: str, brackets: bytes) -> list[int]:
    """The shape of nested lists of which brackets and commas are left, e.g. [2, 3] for ``[[,,],[,,]]``."""
    depth = len(brackets) - len(brackets.lstrip(b"["))
    if depth > MAX_DIMENSIONS:
        raise TensorError(f"{name} has lists in lists, {depth} deep; expected at most {MAX_DIMENSIONS}")
    shape: list[int] = []
    regular = b""  # a list of this depth as the first ones of each depth are
    for level in range(1, depth + 1):
        first_end = brackets.find(b"]" * level) + level
        size = (first_end - (depth - level) - 1) // (len(regular) + 1)
        if size < 1:
            raise _ragged(name)
        regular = b"[%b%b]" % (regular, (b"," + regular) * (size - 1))
        shape.insert(0, size)
    if regular != brackets:
        raise _ragged(name)
    return shape


def _ragged(name: str) -> TensorError:
    return TensorError(f"{name} is ragged: lists at the same depth differ in length")


def _split(name: str, count: int, raw: bytes | memoryview) -> list[bytes]:
    """The elements of a BYTES tensor in its raw form."""
    found: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(found) == count:
            raise TensorError(f"input {name!r} has more than the {count} elements of its shape")
        if len(found) % STEP == 0:
            current().checkpoint()
        start = position + LENGTH_BYTES
        position = start + int.from_bytes(raw[position:start], "little")
        if position > len(raw):
            raise TensorError(
                f"input {name!r}: an element of BYTES is longer than the data that was sent; expected before "
                f"each the number of its bytes, in {LENGTH_BYTES} bytes, little-endian"
            )
        if position == start:
            raise TensorError(f"input {name!r}: an element of BYTES is empty; expected an encoded recording")
        found.append(bytes(raw[start:position]))
    return found
