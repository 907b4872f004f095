"""What the header of a recording declares, where its samples are, and whether both agree with the file.

Headers are often wrong: a recorder lost power, a stream could not seek, a tool counted a byte too many. So
`read_header` compares the sizes that it finds with the file, and reports what it does about a difference.
Uncompressed samples (WAV, RF64, BW64, W64, AIFF, AU, CAF) are located exactly. For libsndfile `repaired` describes
FLAC, OGG and MP3 so that it reads them to their end.
"""

import io
import itertools
import os
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal, NamedTuple

from avex_serve.errors import AudioError
from avex_serve.scheduling.request import current

MAX_ZEROS: Final = 2**20  # bytes of zeros in front of a recording: taggers and recorders leave some
MAX_TAGS: Final = 8  # ID3 tags in front of a recording
MAX_CHUNKS: Final = 1000  # of a file; recorders write ten
ALIKE: Final = 4  # frames of MP3 that follow one another, by which a stream is known
MAX_STREAMS: Final = 1000  # of an OGG, one after another or at once
SURE_FRAMES: Final = 32  # of MP3, one after another: other files have runs of up to 11
MAX_METADATA: Final = 2**16  # bytes of a chunk of metadata that are kept
METADATA: Final = (b"guan", b"wamd", b"bext", b"LIST")
# What often follows the data, also cut: these, and tags that are no chunks.
BEHIND: Final = (
    *METADATA,
    b"iXML",
    b"id3 ",
    b"ID3 ",
    b"JUNK",
    b"junk",
    b"cue ",
    b"smpl",
    b"inst",
    b"PEAK",
    b"_PMX",
    b"fact",
)
RECORDINGS: Final = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS")
SLACK: Final = 64  # bytes that a header may count too many without a sign that audio is missing
STREAMED: Final = 2**16  # a writer that can't know the size writes 2 or 4 GiB, give or take a header
UNKNOWN: Final = 2**64 - 1  # size of data that a 64-bit header doesn't know
HEAD: Final = 2**12  # bytes of a file that are read once for all that its header needs
PIECE: Final = 2**20  # bytes that are read at once while a file is searched

Order = Literal["<", ">"]


class DamagedError(AudioError):
    """The format is known, and the file is damaged or ends too early to be decoded."""


# -- where the bytes are --------------------------------------------------------------------------------------------


class Source:
    """The bytes of a recording: in memory, or a file as long as it was when it was opened."""

    def __init__(self, content: bytes | int, start: int = 0) -> None:
        """Content: bytes, or the descriptor of a file; start: where the recording begins in it."""
        self._content = content
        self._start = start
        self._head = os.pread(content, HEAD, start) if isinstance(content, int) else b""
        self._opened = os.fstat(content) if isinstance(content, int) else None
        self.size = (len(content) if isinstance(content, bytes) else self._opened.st_size) - start  # type: ignore[union-attr]

    def read(self, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on; fewer at the end."""
        size = min(size, self.size - start)
        if size <= 0:
            return b""
        if start + size <= len(self._head):
            return self._head[start : start + size]
        start += self._start
        if isinstance(self._content, bytes):
            return self._content[start : start + size]
        return os.pread(self._content, size, start)

    def after(self, start: int) -> "Source":
        """The same bytes without the first ones."""
        return Source(self._content, self._start + start) if start else self

    @property
    def changed(self) -> bool:
        """Whether the file has been written to since it was opened."""
        if self._opened is None or isinstance(self._content, bytes):
            return False
        now = os.fstat(self._content)
        return (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns)


class Span(NamedTuple):
    """Bytes of a source."""

    start: int
    stop: int


class View(io.RawIOBase):
    """Parts of a source and bytes of our own, one after another, as a file for libsndfile."""

    def __init__(self, source: Source, parts: Sequence[Span | bytes]) -> None:
        """The parts in order."""
        self._source = source
        self._parts = [part for part in parts if (part.stop > part.start if isinstance(part, Span) else part)]
        sizes = [part.stop - part.start if isinstance(part, Span) else len(part) for part in self._parts]
        self._ends = list(itertools.accumulate(sizes))
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._ends[-1] if self._ends else 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move, but never before the start.

        libsndfile seeks there in damaged files. soundfile would print an exception with its traceback, and
        libsndfile sees by the position that it failed.
        """
        position = offset + (0, self._position, self.size)[whence]
        if position >= 0:
            self._position = position
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        """Fill the buffer as far as there are bytes."""
        filled = 0
        index = bisect_right(self._ends, self._position)
        while filled < len(buffer) and index < len(self._parts):
            part = self._parts[index]
            left = self._ends[index] - self._position
            count = min(left, len(buffer) - filled)
            if isinstance(part, Span):
                data = self._source.read(part.stop - left, count)
            else:
                data = part[len(part) - left :][:count]
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
            if len(data) < count:  # the file has become shorter
                break
            index += len(data) == left
        return filled


# -- what a header says ---------------------------------------------------------------------------------------------


class Pcm(NamedTuple):
    """Where uncompressed samples are, and their type."""

    start: int  # byte
    kind: Literal["u", "i", "f"]  # unsigned, signed, floating point
    width: int  # bytes of a sample
    order: Order


@dataclass
class Header:
    """What a header says, after the comparison with the file."""

    format: str
    sample_rate: int  # Hz
    channels: int
    frames: int | None  # samples of a channel; None: the header does not say
    pcm: Pcm | None = None  # None: compressed
    byte_rate: int = 0  # of the data, in bytes a second; 0: not known
    warnings: list[str] = field(default_factory=list)
    cut: bool = False  # the file ends within the audio that its header declares
    metadata: dict[str, bytes] = field(default_factory=dict)  # contents of chunks, and comments of FLAC and OGG
    # Where libsndfile has to begin, and the bytes of our own in front; MP3 and OGG are described by `repaired`.
    parts: Sequence[Span | bytes] = ()

    @property
    def duration(self) -> float | None:
        """In seconds; None: the header does not say."""
        return None if self.frames is None or self.sample_rate <= 0 else self.frames / self.sample_rate


class _Format(NamedTuple):
    pattern: re.Pattern[bytes]
    name: str


FORMATS: Final = tuple(
    _Format(re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"RIFF....WAVE|RIFX....WAVE", "WAV"),
        (rb"RF64....WAVE", "RF64"),
        (rb"BW64....WAVE", "BW64"),
        (rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb", "W64"),
        (rb"FORM....AIF[FC]", "AIFF"),
        (rb"\.snd|dns\.", "AU"),
        (rb"caff", "CAF"),
        (rb"fLaC", "FLAC"),
        (rb"OggS", "OGG"),
        (rb"....ftyp", "M4A"),
        (rb"\x1a\x45\xdf\xa3", "WebM"),
        (rb"\xff[\xf0\xf1\xf8\xf9]", "AAC"),
        (rb"\xff[\xe0-\xff]", "MP3"),
    )
)


def locate(source: Source) -> tuple[Source, str]:
    """The recording in a file without tags and zeros in front of it, and the name of its format.

    libsndfile opens many more formats, and prints what it finds in some of them on the standard output.

    Raises:
        AudioError: none of the formats that we read; the message gives the reason.
    """
    start = 0
    for _ in range(MAX_TAGS):
        head = source.read(start, 16)
        if head.startswith(b"ID3") and len(head) >= 10:
            start += 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            if start >= source.size:
                raise DamagedError("it is truncated: the file ends within the tag in front of the audio")
        elif head.startswith(bytes(4)):
            zeros = source.read(start, MAX_ZEROS)
            start += len(zeros) - len(zeros.lstrip(b"\0"))
            if start == source.size:
                raise DamagedError("it holds nothing but zeros; the recorder reserved the file and never wrote it")
        elif len(head) < 12 and head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM"):
            raise DamagedError("it is truncated: the file ends within its header")
        else:
            for each in FORMATS:
                if each.pattern.match(head):
                    return _checked(source.after(start), each.name)
            break
    # A recorder of streams may begin within a frame of MP3.
    found = _find_frames(source.read(start, PIECE // 16))
    if found is None:
        raise AudioError("unknown format")
    return _checked(source.after(start + found), "MP3", found)


def _checked(source: Source, name: str, skipped: int = 0) -> tuple[Source, str]:
    """A recording and its format, unless it only begins like an MP3, by the 11 bits that begin each frame."""
    if name == "MP3" and not _is_mp3(source, skipped):
        raise AudioError("unknown format")
    return source, name


def read_header(source: Source) -> tuple[Source, Header]:
    """The header of a recording, which may begin behind tags, and where it begins.

    M4A, AAC and WebM have none here: `avex_serve.audio.reader` asks PyAV for theirs.

    Raises:
        AudioError: an unknown format, or a header that can't be used; the message gives the reason.
    """
    try:
        source, name = locate(source)
        if name in ("WAV", "RF64", "BW64", "W64", "AIFF", "CAF"):
            return source, _read_chunks(source, name)
        if name == "AU":
            return source, _read_au(source)
        if name == "FLAC":
            return source, _read_flac(source)
        if name == "OGG":
            return source, _read_ogg(source)
        if name == "MP3":
            return source, _read_mp3(source)
    except (struct.error, IndexError):
        raise DamagedError("it is truncated: the file ends within its header") from None
    return source, Header(name, 0, 0, None, parts=(Span(0, source.size),))


# -- chunks: WAV and its relatives, AIFF, CAF -----------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a format writes its chunks."""

    first: int  # byte of the first chunk
    id_bytes: int
    size_bytes: int
    order: Order
    pad: int  # chunks begin at multiples of this
    counts_head: bool  # whether the size of a chunk has that of its head in it


def _layout(source: Source, name: str) -> _Layout:
    if name == "W64":
        return _Layout(40, 16, 8, "<", 8, True)
    if name == "AIFF":
        return _Layout(12, 4, 4, ">", 2, False)
    if name == "CAF":
        return _Layout(8, 4, 8, ">", 1, False)
    return _Layout(12, 4, 4, ">" if source.read(0, 4) == b"RIFX" else "<", 2, False)


class _Chunk(NamedTuple):
    id: bytes
    start: int  # of its content
    size: int  # as it says


def _chunk(source: Source, position: int, layout: _Layout) -> _Chunk | None:
    """The chunk at a position; None: none can begin there."""
    width = layout.id_bytes + layout.size_bytes
    head = source.read(position, width)
    if len(head) < width or not all(32 <= byte < 127 for byte in head[:4]):
        return None
    size = int.from_bytes(head[layout.id_bytes :], "little" if layout.order == "<" else "big")
    return _Chunk(head[:4], position + width, max(0, size - width) if layout.counts_head else size)


def _next(source: Source, end: int, layout: _Layout) -> int:
    """Where a chunk follows one that ends there: after padding, unless the writer forgot it."""
    padded = -(-end // layout.pad) * layout.pad
    return (
        end if padded != end and _chunk(source, padded, layout) is None and _chunk(source, end, layout) else padded
    )


def _follows(source: Source, end: int, layout: _Layout) -> bool:
    """Whether a chunk follows there, a whole one or one that is often there, or a tag."""
    position = _next(source, end, layout)
    chunk = _chunk(source, position, layout)
    if chunk is None:
        return source.read(position, 3) in (b"ID3", b"TAG")
    return chunk.id in BEHIND or chunk.id[:3] in (b"ID3", b"TAG") or chunk.start + chunk.size <= source.size + 1


def _read_chunks(source: Source, name: str) -> Header:
    layout = _layout(source, name)
    position = layout.first
    long_size: int | None = None  # of the data, in RF64 and BW64
    form: bytes | None = None
    metadata: dict[str, bytes] = {}
    data: _Chunk | None = None
    extent: _Extent | None = None
    header: Header | None = None
    for _ in range(MAX_CHUNKS):
        chunk = _chunk(source, position, layout)
        if chunk is None:
            break
        end = chunk.start + chunk.size
        if chunk.id in (b"fmt ", b"COMM", b"desc") and form is None:
            form = source.read(chunk.start, min(chunk.size, 64))
        elif chunk.id == b"ds64":
            long_size = struct.unpack("<Q", source.read(chunk.start + 8, 8))[0]
        elif chunk.id in (b"data", b"SSND") and data is None:
            if form is None:
                raise DamagedError("its header has no format before the data")
            skipped = {"AIFF": 8, "CAF": 4}.get(name, 0)  # offset and size of blocks; the count of edits
            data = _Chunk(chunk.id, chunk.start + skipped, max(0, chunk.size - skipped))
            header = _FORMS[name](form, layout.order, data.start)
            extent = _extent(source, data, long_size, header, layout)
            end = data.start + extent.size
        elif chunk.id in METADATA:
            _keep(metadata, chunk.id, source.read(chunk.start, min(chunk.size, MAX_METADATA)), layout.order)
        position = _next(source, end, layout)
    if header is None or data is None or extent is None:
        reason = "the file ends within its header" if position >= source.size else "its header has no data"
        raise DamagedError(f"it is truncated: {reason}")
    header.format, header.metadata = name, metadata
    header.warnings += extent.warnings
    header.cut = extent.cut
    if header.pcm is not None:
        header.frames = extent.size // (header.pcm.width * header.channels)
    elif header.byte_rate:
        header.frames = round(extent.size / header.byte_rate * header.sample_rate)
    header.parts = _whole(source, data, extent.size, name)
    return header


def _whole(source: Source, data: _Chunk, size: int, name: str) -> Sequence[Span | bytes]:
    """The file for libsndfile, with the size of the data that is there."""
    if name != "WAV" or size >= 2**32 - STREAMED:
        return (Span(0, source.size),)
    order: Literal["little", "big"] = "big" if source.read(0, 4) == b"RIFX" else "little"
    head = bytearray(source.read(0, data.start))
    head[4:8] = (data.start - 8 + size).to_bytes(4, order)
    head[data.start - 4 : data.start] = size.to_bytes(4, order)
    return (bytes(head), Span(data.start, data.start + size))


def _keep(metadata: dict[str, bytes], name: bytes, content: bytes, order: Order) -> None:
    """Keep a chunk of metadata, a LIST of INFO by its entries."""
    if name != b"LIST":
        metadata.setdefault(name.decode(), content)
    elif content[:4] == b"INFO":
        position = 4
        while position + 8 <= len(content):
            entry, size = struct.unpack(f"{order}4sI", content[position : position + 8])
            if not any(entry):
                return
            metadata.setdefault(entry.decode("latin-1"), content[position + 8 : position + 8 + size])
            position += 8 + size + size % 2


def _wav_form(form: bytes, order: Order, start: int) -> Header:
    code, channels, rate, byte_rate, align, bits = struct.unpack(f"{order}HHIIHH", form[:16])
    if code == 0xFFFE and len(form) >= 26:
        code = struct.unpack(f"{order}H", form[24:26])[0]
    width = -(-bits // 8) or (align // channels if channels else 0)
    kind: Literal["u", "i", "f"] | None = {1: "u" if width == 1 else "i", 3: "f"}.get(code)
    header = _form("WAV", rate, channels, kind, width, order, start)
    if header.pcm is None:
        header.byte_rate = byte_rate
    return header


def _aiff_form(form: bytes, order: Order, start: int) -> Header:
    channels, _, bits = struct.unpack(">HIH", form[:8])
    exponent, mantissa = struct.unpack(">HQ", form[8:18])
    rate = round(mantissa * 2.0 ** min(64, (exponent & 0x7FFF) - 16383 - 63))
    codec = form[18:22]
    width = -(-bits // 8)
    if codec in (b"fl32", b"FL32", b"fl64", b"FL64"):
        return _form("AIFF", rate, channels, "f", width, ">", start)
    kind: Literal["i"] | None = "i" if codec in (b"", b"NONE", b"twos", b"sowt", b"in24", b"in32") else None
    return _form("AIFF", rate, channels, kind, width, "<" if codec == b"sowt" else ">", start)


def _caf_form(form: bytes, order: Order, start: int) -> Header:
    rate, codec, flags, _, _, channels, bits = struct.unpack(">d4sIIIII", form[:32])
    kind: Literal["i", "f"] | None = ("f" if flags & 1 else "i") if codec == b"lpcm" else None
    rate = round(rate) if 0 <= rate < 2**32 else 0
    return _form("CAF", rate, channels, kind, -(-bits // 8), "<" if flags & 2 else ">", start)


_FORMS: Final = {
    **dict.fromkeys(("WAV", "RF64", "BW64", "W64"), _wav_form),
    "AIFF": _aiff_form,
    "CAF": _caf_form,
}
_WIDTHS: Final = {"u": (1,), "i": (1, 2, 3, 4, 8), "f": (4, 8)}


def _form(
    name: str, rate: int, channels: int, kind: Literal["u", "i", "f"] | None, width: int, order: Order, start: int
) -> Header:
    if channels == 0:
        raise DamagedError("its header says that it has no channels")
    if kind is None or width not in _WIDTHS[kind]:
        return Header(name, rate, channels, None)
    return Header(name, rate, channels, None, Pcm(start, kind, width, order), rate * channels * width)


class _Extent(NamedTuple):
    """How many bytes of data there are."""

    size: int
    warnings: list[str]
    cut: bool = False


def _extent(source: Source, data: _Chunk, long_size: int | None, header: Header, layout: _Layout) -> _Extent:
    """Compare the size that a header declares for its data with what is in the file."""
    present = source.size - data.start
    frame = header.pcm.width * header.channels if header.pcm else 1

    def seconds(size: int) -> str:
        return f"{size / header.byte_rate:.2f} s" if header.byte_rate else f"{size} bytes"

    wide = layout.size_bytes == 8
    sizes = [data.size]
    if long_size is not None:  # RF64: the 64-bit size counts, unless it was never written or can't be
        sizes.insert(0, long_size)
        wide = True
    if not any(sizes) and (present == 0 or _to_the_end(source, data.start, layout)):
        return _Extent(0, [])
    sizes = [size for size in sizes if 0 < size <= present or not _placeholder(size, wide)]
    declared = next((size for size in sizes if size <= present), sizes[0] if sizes else None)
    if declared is None:
        size = present - _zeros_at_end(source, data.start)
        size += -size % frame if size + -size % frame <= present else 0
        warnings = [
            "the header was never finished and does not say how long the recording is: it was read to the end of "
            f"the file, {seconds(size)}"
        ]
        if present - size > SLACK:
            warnings.append(f"the last {present - size} bytes of the file are zeros, and were left out")
        return _Extent(size, warnings)
    if declared > present:
        missing = declared - present
        if missing < frame and present % frame == 0:
            return _Extent(present, [])
        if missing <= SLACK and present % frame == 0:
            return _Extent(present, [f"the header declares {missing} bytes more than the file has"])
        text = (
            f"the recording ends early: its header declares {seconds(declared)}, and the file has {seconds(present)}"
        )
        return _Extent(present, [text], cut=True)
    rest = present - declared
    end = data.start + declared
    if (other := source.read(_next(source, end, layout), 4)) in RECORDINGS:
        text = (
            f"another recording ({other.decode()}) follows in the file and was left out; send it as a separate file"
        )
        return _Extent(declared, [text])
    if rest <= frame or _follows(source, end, layout):
        return _Extent(declared, [])
    if not wide and (wraps := rest >> 32):
        size = declared + (wraps << 32)
        return _Extent(size, [f"the header's 32 bits can't say the length; {seconds(size)} were found in the file"])
    zeros = _zeros_at_end(source, end)
    if rest - zeros <= SLACK:
        return _Extent(declared, [])
    size = present - zeros
    return _Extent(
        size, [f"the header declares {seconds(declared)}, and the file goes on; {seconds(size)} were read"]
    )


def _placeholder(size: int, wide: bool) -> bool:
    """Whether writers leave that size in place of one that they don't know yet."""
    near = [2**32, 2**31] + [2**63, 2**64] * wide
    return size in (0, 0x00FFFFFF) or any(abs(size - each) <= STREAMED for each in near) or size >= 2**63 - STREAMED


def _to_the_end(source: Source, position: int, layout: _Layout) -> bool:
    """Whether chunks follow from there to the end of the file."""
    for _ in range(MAX_CHUNKS):
        chunk = _chunk(source, position, layout)
        if chunk is None:
            return False
        position = _next(source, chunk.start + chunk.size, layout)
        if position >= source.size:
            return position <= source.size + 1
    return False


def _zeros_at_end(source: Source, start: int) -> int:
    """How many bytes of zeros end the file, from `start` on."""
    position = source.size
    while position > start:
        size = min(PIECE, position - start)
        piece = source.read(position - size, size)
        if kept := len(piece.rstrip(b"\0")):
            return source.size - (position - size + kept)
        position -= size
    return source.size - start


def _read_au(source: Source) -> Header:
    order: Order = ">" if source.read(0, 4) == b".snd" else "<"
    start, size, code, rate, channels = struct.unpack(f"{order}5I", source.read(4, 20))
    kinds: dict[int, tuple[Literal["i", "f"], int]] = {
        2: ("i", 1), 3: ("i", 2), 4: ("i", 3), 5: ("i", 4), 6: ("f", 4), 7: ("f", 8),
    }  # fmt: skip
    kind, width = kinds.get(code, (None, 0))
    header = _form("AU", rate, channels, kind, width, order, start)
    extent = _extent(source, _Chunk(b"data", start, size), None, header, _Layout(0, 4, 4, order, 1, False))
    header.warnings, header.cut = extent.warnings, extent.cut
    if header.pcm is not None:
        header.frames = extent.size // (width * channels)
    header.parts = (Span(0, source.size),)
    return header


# -- FLAC -----------------------------------------------------------------------------------------------------------


def _read_flac(source: Source) -> Header:
    """The header, with a total of 0 for libsndfile: then it decodes what is there, not what was promised."""
    info = source.read(0, 42)
    packed = int.from_bytes(info[18:26], "big")  # 20 bits rate, 3 channels, 5 sample size, 36 total
    total = packed & (2**36 - 1)
    if len(info) < 42:
        raise DamagedError("it is truncated: the file ends within its header")
    metadata: dict[str, bytes] = {}
    position, last = 4, False
    for _ in range(MAX_CHUNKS):
        head = source.read(position, 4)
        if last or len(head) < 4:
            break
        last, size = bool(head[0] & 0x80), int.from_bytes(head[1:], "big")
        if head[0] & 0x7F == 4:  # VORBIS_COMMENT
            metadata |= _comments(source.read(position + 4, min(size, MAX_METADATA)))
        elif head[0] & 0x7F == 2:  # APPLICATION, here a chunk of the WAV that was compressed
            content = source.read(position + 4, min(size, MAX_METADATA))
            if content[:4] == b"riff" and (name := content[4:8]) in METADATA:
                _keep(metadata, name, content[12:], "<")
        position += 4 + size
    head = info[:21] + (packed >> 36 << 36).to_bytes(8, "big")[3:] + info[26:]
    return Header(
        "FLAC",
        packed >> 44,
        (packed >> 41 & 7) + 1,
        total or None,
        warnings=[] if total else ["the header was never finished: it does not say how long the recording is"],
        metadata=metadata,
        parts=(head, Span(42, source.size)),
    )


def ends_with_tag(source: Source) -> bool:
    """Whether a tag or zeros end the file, as taggers and recorders leave them behind any format."""
    tail = source.read(max(0, source.size - 160), 160)
    return tail[-128:-125] == b"TAG" or b"APETAGEX" in tail or not tail.strip(b"\0")


def _comments(content: bytes) -> dict[str, bytes]:
    """Vorbis comments by upper-case name."""
    found: dict[str, bytes] = {}
    position = 4 + int.from_bytes(content[:4], "little")
    count = int.from_bytes(content[position : position + 4], "little")
    position += 4
    for _ in range(min(count, MAX_CHUNKS)):
        size = int.from_bytes(content[position : position + 4], "little")
        name, _, value = content[position + 4 : position + 4 + size].partition(b"=")
        if value:
            found.setdefault(name.decode("latin-1").upper(), value)
        position += 4 + size
    return found


# -- OGG ------------------------------------------------------------------------------------------------------------


class _Page(NamedTuple):
    flags: int
    granule: int
    serial: int
    number: int
    stop: int  # after its last byte


def _page(source: Source, position: int, data: bytes) -> _Page | None:
    """The page at a position whose first bytes are `data`; None: no whole page is there."""
    if len(data) < 27 or data[:4] != b"OggS":
        return None
    flags, granule, serial, number, _, count = struct.unpack("<xBQIIIB", data[4:27])
    stop = position + 27 + count + sum(data[27 : 27 + count])
    if len(data) < 27 + count or stop > source.size:
        return None
    return _Page(flags, granule, serial, number, stop)


_REVERSED: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _sound_page(page: bytes) -> bool:
    """Whether the checksum of a page fits: zlib's, bit by bit in the other order, from 0 and not inverted."""
    data = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    value = zlib.crc32(data, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(_REVERSED) == page[22:26]


def _read_ogg(source: Source) -> Header:
    """The header of the first stream, and the length by the last page; that of chained streams is not known here."""
    head = source.read(0, 512)
    packet = head[27 + head[26] :]
    skipped, granules = 0, 1  # granules before the first sample, and granules for each sample
    if packet[1:7] == b"vorbis":
        channels, rate = struct.unpack("<BI", packet[11:16])
    elif packet[:8] == b"OpusHead":
        channels, skipped, original = struct.unpack("<BHI", packet[9:16])
        rate = next((each for each in (8000, 12000, 16000, 24000) if original <= each), 48000)  # as libsndfile
        granules = 48000 // rate
    elif packet[1:5] == b"FLAC":
        packed = int.from_bytes(packet[27:35], "big")
        channels, rate = (packed >> 41 & 7) + 1, packed >> 44
    else:
        raise AudioError("an OGG that holds neither Vorbis, Opus nor FLAC")
    frames: int | None = None
    start = max(0, source.size - 2**16)
    tail = source.read(start, 2**16)
    first = _page(source, 0, head[:282])
    position = tail.rfind(b"OggS")
    while position >= 0 and first is not None:
        page = _page(source, start + position, tail[position : position + 282])
        if page is not None and page.granule != UNKNOWN:
            frames = max(0, page.granule - skipped) // granules if page.serial == first.serial else None
            break
        position = tail.rfind(b"OggS", 0, position)
    return Header("OGG", rate, channels, frames)


def ogg_links(source: Source) -> tuple[list[Span], str | None]:
    """The streams that follow one another in an OGG file, and why the last one ends early (None: it is whole)."""
    links: list[Span] = []
    start = position = 0
    ended, in_header = False, True
    numbers: dict[int, int] = {}
    fault, pages = None, 0
    while position < source.size:
        data = source.read(position, 27 + 255)
        page = _page(source, position, data)
        if (pages := pages + 1) % 1000 == 0:
            current().checkpoint()
        if page is None:
            fault = "it is cut within a page" if data[:4] == b"OggS" else "what follows is no OGG"
            if not data.strip(b"\0"):
                fault = None if ended else "the rest of the file is zeros"
            break
        if not _sound_page(source.read(position, page.stop - position)):
            fault = "a page is damaged"
            break
        if page.flags & 2:  # begins a stream
            if not in_header:
                if len(links) + 1 == MAX_STREAMS:
                    fault = f"more than {MAX_STREAMS} streams follow one another"
                    break
                links.append(Span(start, position))
                start, numbers = position, {}
            in_header = True
        else:
            in_header = False
            if page.number != numbers.get(page.serial, page.number - 1) + 1:
                fault = "a page is missing"
                break
        numbers[page.serial] = page.number
        if len(numbers) > MAX_STREAMS:
            fault = f"it has more than {MAX_STREAMS} streams at once"
            break
        ended = bool(page.flags & 4)
        position = page.stop
    links.append(Span(start, position))
    return links, fault or (None if ended else "its last page is missing")


# -- MP3 ------------------------------------------------------------------------------------------------------------

_KBPS: Final = {  # by version (1: MPEG 1) and layer, ISO/IEC 11172-3 and 13818-3
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Frame(NamedTuple):
    """What the second and third byte of a frame of MP3 say."""

    size: int  # bytes
    rate: int  # Hz
    samples: int
    layer: int
    version: int  # 1, or 2 for MPEG 2 and 2.5


@cache
def _frame(second: int, third: int) -> _Frame | None:
    """What the second and third byte of a frame say; None: no frame begins with them."""
    version, layer = (
        (None, None, 2, 1)[second >> 3 & 3] or (2 if not second >> 3 & 3 else None),
        4 - (second >> 1 & 3),
    )
    rate_index, rate_bits = third >> 2 & 3, third >> 4
    if second < 0xE0 or version is None or layer == 4 or rate_index == 3 or rate_bits in (0, 15):
        return None
    rate = (44100, 48000, 32000)[rate_index] // {3: 1, 2: 2, 0: 4}[second >> 3 & 3]
    kbps = _KBPS[version, layer if version == 1 or layer == 1 else 2][rate_bits - 1]
    padding = third >> 1 & 1
    if layer == 1:
        return _Frame((12000 * kbps // rate + padding) * 4, rate, 384, 1, version)
    samples = 576 if layer == 3 and version == 2 else 1152
    return _Frame(samples // 8 * 1000 * kbps // rate + padding, rate, samples, layer, version)


def _alike(first: bytes, other: bytes) -> bool:
    """Whether two heads of frames belong to one stream: version, layer, rate, and mono or not."""
    return (
        (first[1] ^ other[1]) & 0xFE == 0
        and (first[2] ^ other[2]) & 0x0C == 0
        and ((first[3] >> 6 == 3) == (other[3] >> 6 == 3))
    )


def _find_frames(data: bytes, count: int = ALIKE) -> int | None:
    """Where that number of frames of MP3 follow one another; None: nowhere."""
    runs: dict[int, int] = {}  # frames that follow one another from there on
    start = data.find(b"\xff")
    while start >= 0:
        chain: list[int] = []
        position, more = start, 0
        while len(chain) + more < count:
            head = data[position : position + 4]
            if len(head) < 4 or head[0] != 255 or not _alike(data[start : start + 4], head):
                break
            frame = _frame(head[1], head[2])
            if frame is None or (more := runs.get(position, 0)):
                break
            chain.append(position)
            position += frame.size
        if len(chain) + more >= count:
            return start
        runs.update((each, len(chain) + more - index) for index, each in enumerate(chain))
        start = data.find(b"\xff", start + 1)
    return None


def _is_mp3(source: Source, skipped: int) -> bool:
    """Whether frames of MP3 are most of a file, or so many that they are no accident.

    Executables and other data may hold a few bytes that look like frames.

    Args:
        source: the file from its first frame on.
        skipped: bytes of other data in front of it.
    """
    first = source.read(0, 4)
    if len(first) < 4 or _frame(first[1], first[2]) is None:
        # A free bit rate or damage, of which `_mp3_info` informs.
        return first[2:3] < b"\x10" or _find_frames(source.read(0, PIECE // 16)) is not None
    if _mp3_info(source)[1].frames is not None:
        return True
    position = count = size = 0
    other = skipped  # bytes
    while position < source.size and count < SURE_FRAMES:
        current().checkpoint()
        if tag := _no_audio(source, position):
            position += tag
            other -= tag
            continue
        stop, found, _ = _walk(source, position, first, SURE_FRAMES)
        size += stop - position
        count += found
        position = stop
        if not found:
            break
    if count >= SURE_FRAMES or 2 * size >= source.size + other:
        return True
    # Damage at the beginning: a long run of the same kind follows.
    rest = source.read(position, PIECE // 8)
    start = _find_frames(rest, SURE_FRAMES)
    return start is not None and _alike(first, rest[start : start + 4])


class _Info(NamedTuple):
    """What the frame in front of an MP3 declares (Xing, Info or VBRI)."""

    frames: int | None
    size: int  # bytes of that frame
    name_at: int  # where its name is; 0: VBRI, or no such frame


def _side_bytes(head: bytes) -> int:
    """Bytes between the head of a frame of layer III and its audio."""
    mono, mpeg1 = head[3] >> 6 == 3, head[1] >> 3 & 3 == 3
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)


def _mp3_info(source: Source) -> tuple[_Frame, _Info]:
    head = source.read(0, 4)
    frame = _frame(head[1], head[2]) if len(head) == 4 else None
    if frame is None:
        raise AudioError("its first frame of MP3 is damaged, or of a free bit rate")
    data = source.read(0, min(frame.size, 200))
    at = 4 + _side_bytes(head)
    if frame.layer == 3 and data[at : at + 4] in (b"Xing", b"Info"):
        flags, frames = struct.unpack(">II", data[at + 4 : at + 12])
        return frame, _Info(frames if flags & 1 else None, frame.size, at)
    if frame.layer == 3 and data[36:40] == b"VBRI":
        return frame, _Info(struct.unpack(">I", data[50:54])[0], frame.size, 0)
    return frame, _Info(None, 0, 0)


def _read_mp3(source: Source) -> Header:
    frame, info = _mp3_info(source)
    channels = 1 if source.read(3, 1)[0] >> 6 == 3 else 2
    samples = info.frames and info.frames * frame.samples
    if samples and info.name_at:  # LAME and Lavf say how many samples of padding begin and end it
        tag = source.read(info.name_at + 120, 24)
        if tag[:4] in (b"LAME", b"Lavf", b"Lavc"):
            padding = int.from_bytes(tag[21:24], "big")
            samples -= (padding >> 12) + (padding & 0xFFF)
    return Header("MP3", frame.rate, channels, samples)


class Mp3Frames(NamedTuple):
    """The frames of an MP3, for libsndfile."""

    parts: Sequence[Span | bytes]
    frames: int  # of MP3 that are there
    declared: int | None  # that are declared
    samples: int  # of a frame
    fault: str | None  # why the rest is left out; None: nothing is


def mp3_frames(source: Source) -> Mp3Frames:
    """Find the frames of an MP3, and describe them for libsndfile.

    libsndfile stops at the number of frames that the file declares. Without one it guesses from the first frame. So
    it gets a frame in front that declares the number that is there. Tags and zeros between frames are left out.
    """
    frame, info = _mp3_info(source)
    first = source.read(0, 4)
    spans: list[Span] = []
    count = 0
    fault = None
    position = info.size
    while position < source.size:
        current().checkpoint()
        if skipped := _no_audio(source, position):
            position += skipped
            continue
        stop, found, cut = _walk(source, position, first)
        if found and len(spans) < MAX_CHUNKS:
            spans.append(Span(position, stop))
            count += found
            position = stop
            continue
        if found:
            fault = f"other data divides it into more than {MAX_CHUNKS} pieces"
        elif cut:
            fault = "its last frame is cut"
        elif source.size - position > 4:
            fault = "what follows is no MP3, or of another kind"
        break
    size = sum(span.stop - span.start for span in spans)
    if info.name_at:
        head = bytearray(source.read(0, info.size))
        flags = head[info.name_at + 7]
        if flags & 1 and count > (info.frames or 0):
            head[info.name_at + 8 : info.name_at + 12] = count.to_bytes(4, "big")
        if flags & 2:  # libmpg123 prints a warning if this differs from the file
            at = info.name_at + 8 + 4 * (flags & 1)
            head[at : at + 4] = min(size + info.size, 2**32 - 1).to_bytes(4, "big")
        front = bytes(head)
    if not info.name_at or not front[info.name_at + 7] & 1:
        front = _xing(first, count) if frame.layer == 3 else b""
    return Mp3Frames((front, *spans), count, info.frames, frame.samples, fault)


def _xing(first: bytes, count: int) -> bytes:
    """A frame that declares the number of frames that follow."""
    content = bytes(_side_bytes(first)) + b"Xing" + struct.pack(">II", 1, count)
    for bits in range(1, 15):  # the smallest frame with room
        head = bytes([255, first[1] | 1, first[2] & 0x0D | bits << 4, first[3]])
        frame = _frame(head[1], head[2])
        if frame is not None and frame.size >= 4 + len(content):
            return (head + content).ljust(frame.size, b"\0")
    return b""


def _walk(source: Source, position: int, first: bytes, most: int | None = None) -> tuple[int, int, bool]:
    """Follow whole frames from there on: where they stop, how many there are, and whether the file cuts the next."""
    count = 0
    start, data = position, b""
    while count != most:
        at = position - start
        if at + 4 > len(data):
            current().checkpoint()
            start, data, at = position, source.read(position, PIECE), 0
            if len(data) < 4:
                return position, count, bool(data)
        if data[at] != 255 or (frame := _frame(data[at + 1], data[at + 2])) is None:
            return position, count, False
        if not _alike(first, data[at : at + 4]):
            return position, count, False
        if position + frame.size > source.size:
            return position, count, True
        position += frame.size
        count += 1
    return position, count, False


def _no_audio(source: Source, position: int) -> int:
    """Bytes of a tag or of zeros that begin there, between the frames of an MP3; 0: something else is there."""
    head = source.read(position, 32)
    if head.startswith(b"ID3") and len(head) >= 10:
        return 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    if head.startswith(b"TAG"):
        return 128
    if head.startswith(b"APETAGEX"):
        size = int.from_bytes(head[12:16], "little")
        return size + 32 if head[23] & 0x20 else 32
    if head.startswith(b"LYRICSBEGIN"):
        return source.size - position
    if head.startswith(b"\0"):
        zeros = source.read(position, PIECE)
        return len(zeros) - len(zeros.lstrip(b"\0"))
    return 0
