"""Writes Parquet files of scores and embeddings, and nothing else.

DuckDB takes 2 to 4 ms for the smallest file, a tenth of the time of a short recording. This takes 0.3 ms. Its bytes
depend on the rows alone and not on the version of a library, so that runs on several machines can be compared. The
format: https://parquet.apache.org/docs/file-format/
"""

import functools
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Final, NamedTuple

import numpy as np

MAGIC: Final = b"PAR1"
CREATED_BY: Final = "avex-serve"
# The numbers of parquet.thrift.
INT32, FLOAT, DOUBLE, BYTE_ARRAY = 1, 4, 5, 6
REQUIRED, REPEATED = 0, 2
UTF8, LIST = 0, 3  # converted types
PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
UNCOMPRESSED, GZIP = 0, 2
DATA_PAGE, DICTIONARY_PAGE = 0, 2
# Thrift's compact types.
I32, I64, BINARY, ARRAY, STRUCT = 5, 6, 8, 9, 12

Field = tuple[int, int, "int | bytes | str | _List | list[Field]"]  # number, type and value


class _List(NamedTuple):
    kind: int
    values: "Sequence[int | bytes | str | list[Field]]"


class Column(NamedTuple):
    """A column of a group of rows. No value is missing."""

    kind: int  # FLOAT, DOUBLE or BYTE_ARRAY (text)
    rows: int
    data: bytes  # the content of its data page, see `plain`, `repeated` and `lists`
    encoding: int = PLAIN
    dictionary: bytes = b""
    distinct: int = 0  # values in the dictionary
    values: int | None = None  # in lists; None: the column holds no lists
    compress: bool = False


def plain(values: np.ndarray) -> Column:
    """A column of float32, (N,)."""
    return Column(FLOAT, len(values), values.astype("<f4", copy=False).tobytes())


def lists(values: np.ndarray) -> Column:
    """A column of lists of float32, (N, D)."""
    rows, width = values.shape
    # Where lists begin: a 0, and then D - 1 times a 1. All values exist: as often a 1.
    starts = b"\x02\x00" + (_varint((width - 1) << 1) + b"\x01" if width > 1 else b"")
    exist = _varint((rows * width) << 1) + b"\x01"
    levels = b"".join(struct.pack("<I", len(level)) + level for level in (starts * rows, exist))
    return Column(FLOAT, rows, levels + values.astype("<f4", copy=False).tobytes(), values=rows * width)


def runs(values: np.ndarray | Sequence[str], length: int) -> Column:
    """A column in which each value, float64 or text, comes `length` times in a row."""
    header = _varint(length << 1)
    indices = np.zeros(len(values), np.dtype([("header", f"V{len(header)}"), ("index", "<u4")]))
    indices["header"] = np.void(header)
    indices["index"] = np.arange(len(values))
    return _by_index(values, len(values) * length, b"\x20" + indices.tobytes())


@functools.lru_cache(maxsize=8)  # most recordings of an archive have one length
def cycles(values: tuple[str, ...], count: int) -> Column:
    """A column in which all values, text, come in order, and that `count` times."""
    kind = "<u1" if len(values) <= 256 else "<u2" if len(values) <= 65536 else "<u4"
    distinct = list(dict.fromkeys(values))
    position = {value: index for index, value in enumerate(distinct)}
    cycle = np.array([position[value] for value in values], kind)
    rows = len(values) * count
    groups = -(-rows // 8)
    indices = np.tile(cycle, count)
    padded = np.concatenate([indices, np.zeros(8 * groups - rows, kind)])
    data = bytes([8 * padded.itemsize]) + _varint(groups << 1 | 1) + padded.tobytes()
    return _by_index(distinct, rows, data, compress=True)


def _by_index(values: np.ndarray | Sequence[str], rows: int, data: bytes, *, compress: bool = False) -> Column:
    if isinstance(values, np.ndarray):
        kind, dictionary = DOUBLE, values.astype("<f8", copy=False).tobytes()
    else:
        texts = [value.encode() for value in values]
        kind, dictionary = BYTE_ARRAY, b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return Column(kind, rows, data, RLE_DICTIONARY, dictionary, len(values), compress=compress)


class ParquetWriter:
    """Writes groups of rows to a file; `close` completes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._groups: list[list[Field]] = []
        self._schema: list[list[Field]] = []
        self._rows = 0
        self._offset = 0
        self._write(MAGIC)

    def write(self, columns: Mapping[str, Column]) -> None:
        """Write a group of rows; every group has the same columns."""
        rows = next(iter(columns.values())).rows
        self._schema = self._schema or _schema(columns)
        start = self._offset
        chunks = [self._write_column(name, column) for name, column in columns.items()]
        self._groups.append([(1, ARRAY, _List(STRUCT, chunks)), (2, I64, self._offset - start), (3, I64, rows)])
        self._rows += rows

    def close(self) -> None:
        """Write the description of the file, with which it ends."""
        footer = _struct(
            [
                (1, I32, 1),
                (2, ARRAY, _List(STRUCT, self._schema)),
                (3, I64, self._rows),
                (4, ARRAY, _List(STRUCT, self._groups)),
                (6, BINARY, CREATED_BY),
            ]
        )
        self._write(footer + struct.pack("<I", len(footer)) + MAGIC)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._offset += len(content)

    def _write_column(self, name: str, column: Column) -> list[Field]:
        start = self._offset
        size = 0
        if column.dictionary:
            about: list[Field] = [(1, I32, column.distinct), (2, I32, PLAIN)]
            size += self._write_page(
                DICTIONARY_PAGE, column.dictionary, (7, STRUCT, about), compress=column.compress
            )
        first_data = self._offset
        values = column.rows if column.values is None else column.values
        about = [(1, I32, values), (2, I32, column.encoding), (3, I32, RLE), (4, I32, RLE)]
        size += self._write_page(DATA_PAGE, column.data, (5, STRUCT, about), compress=column.compress)
        path = [name] if column.values is None else [name, "list", "element"]
        chunk: list[Field] = [
            (1, I32, column.kind),
            (2, ARRAY, _List(I32, sorted({PLAIN, RLE, column.encoding}))),
            (3, ARRAY, _List(BINARY, path)),
            (4, I32, GZIP if column.compress else UNCOMPRESSED),
            (5, I64, values),
            (6, I64, size),
            (7, I64, self._offset - start),
            (9, I64, first_data),
        ]
        if column.dictionary:
            chunk.append((11, I64, start))
        return [(2, I64, start), (3, STRUCT, chunk)]

    def _write_page(self, kind: int, content: bytes, about: Field, *, compress: bool) -> int:
        """Write a page; returns its size before compression."""
        packed = _gzip(content) if compress else content
        header = _struct([(1, I32, kind), (2, I32, len(content)), (3, I32, len(packed)), about])
        self._write(header)
        self._write(packed)
        return len(header) + len(content)


def _schema(columns: Mapping[str, Column]) -> list[list[Field]]:
    elements: list[list[Field]] = [[(4, BINARY, "schema"), (5, I32, len(columns))]]
    for name, column in columns.items():
        if column.values is not None:
            elements.append([(3, I32, REQUIRED), (4, BINARY, name), (5, I32, 1), (6, I32, LIST)])
            elements.append([(3, I32, REPEATED), (4, BINARY, "list"), (5, I32, 1)])
            name = "element"
        element: list[Field] = [(1, I32, column.kind), (3, I32, REQUIRED), (4, BINARY, name)]
        elements.append([*element, (6, I32, UTF8)] if column.kind == BYTE_ARRAY else element)
    return elements


def _gzip(content: bytes) -> bytes:
    """Without a time, which the module gzip would write."""
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(content) + packer.flush()


def _struct(fields: Sequence[Field]) -> bytes:
    """A struct in Thrift's compact protocol."""
    parts = []
    before = 0
    for number, kind, value in fields:
        parts.append(bytes([(number - before) << 4 | kind]) + _value(kind, value))
        before = number
    return b"".join(parts) + b"\x00"


def _value(kind: int, value: object) -> bytes:
    if isinstance(value, _List):
        size = len(value.values)
        head = bytes([size << 4 | value.kind]) if size < 15 else bytes([0xF0 | value.kind]) + _varint(size)
        return head + b"".join(_value(value.kind, each) for each in value.values)
    if isinstance(value, list):
        return _struct(value)
    if isinstance(value, str):
        text = value.encode()
        return _varint(len(text)) + text
    assert isinstance(value, int)
    return _varint(value << 1)  # in zigzag; there are no negative numbers


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
