"""The page for people, and the two questions that it alone asks.

    GET  /             its document, for browsers; see `about.home`
    GET  /page/NAME    its modules and styles, from a table of files: see `avex_serve.page.assets`
    POST /wav          a recording as WAV at its own rate, in formats that the page does not decode
    POST /tables       detections as a table, in the formats of `avex-serve tables`

The service keeps nothing between them. A table is made from what the page sends: no inference is repeated, and it
holds the detections that pass the thresholds that the user sees.
"""

import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from avex_serve.annotations.formats import FORMATS
from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.archive.choice import Choice, describe
from avex_serve.archive.plan import ResultSet
from avex_serve.audio.containers import Header, Source, read_header
from avex_serve.audio.reader import Channel
from avex_serve.audio.recorder import find_origin
from avex_serve.audio.windows import FinalClip
from avex_serve.errors import AudioError, InputError, NotFoundError, StorageError
from avex_serve.inference.pipeline import Audio, Query, source_of
from avex_serve.inference.repository import Repository
from avex_serve.page.assets import assets
from avex_serve.page.waves import encode_stream
from avex_serve.scheduling.admission import Pieces
from avex_serve.scheduling.request import current
from avex_serve.service.front import Front
from avex_serve.service.http.forms import result_set

DOCUMENT: Final = "service.html"
ASSETS: Final = "/page/{name:path}"
WAV: Final = "/wav"
WAV_TYPE: Final = "audio/wav"
TABLES: Final = "/tables"
ROW_BYTES: Final = 1024  # memory for a row of a table until it is sent; measured, rounded up
FOLDER: Final = "/recordings"  # of recordings whose folder is not known, where a format writes paths below it
NAME_BYTES: Final = 251  # of a recording, after which a file is named: Linux allows 255
EARLIEST: Final = (1980, 1, 1, 0, 0, 0)  # of a file in a ZIP: the same table has the same bytes

Number = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class Described(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A recording of a table: its detections as columns, which take less JSON than documents."""

    # Of the file, without a folder: formats of several files are named after it, and must stay in their folder.
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^/\0]*$")]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256 of the file
    head: bytes = b""  # the part of the file with its metadata, base64
    duration: Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # seconds
    labels: list[str]
    label: list[int]  # positions in `labels`
    start: list[Number]  # seconds
    end: list[Number]
    score: list[Number]


class TableRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The JSON body of ``/tables``."""

    format: str
    model: str
    version: str | None = None
    folder: str = ""  # where the recordings are on the user's computer; it is written and never read
    threshold: Number | None = None  # what the detections were selected by, for the table's description
    thresholds: dict[str, Number] = {}
    probe: str | None = None
    overlap: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0  # this and the next two: as they were asked for
    final_clip: FinalClip = "remainder"
    channel: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | Literal["mix"] = "mix"
    recordings: Annotated[list[Described], msgspec.Meta(min_length=1)]

    def query(self) -> Query:
        """The options that change scores."""
        return Query(overlap=self.overlap, final_clip=self.final_clip, channel=self.channel)


# -- files of the page ----------------------------------------------------------------------------------------------


def is_public(front: Front, route: str, scope: Scope) -> bool:
    """Whether a request to this route needs no key: it gets files of the page, which asks for the key itself."""
    return route == ASSETS or (route == "/" and shows_page(front, Headers(scope=scope)))


def shows_page(front: Front, headers: Headers) -> bool:
    """Whether / is the page: for browsers, unless the setting forbids it. Programs get JSON.

    Programs accept no particular type, any type, or JSON.
    """
    types = [part.partition(";")[0].strip() for part in headers.get("accept", "").split(",")]
    return front.settings.page == "on" and "text/html" in types and "application/json" not in types


def document(request: Request) -> Response:
    """The page."""
    return assets()[DOCUMENT].answer(request)


async def asset(front: Front, request: Request) -> Response:
    """A file of the page; NotFoundError if there is none of that name, or no page."""
    found = assets().get(request.path_params["name"]) if front.settings.page == "on" else None
    if found is None:
        raise NotFoundError("the page has no such file")
    return found.answer(request)


# -- recordings -----------------------------------------------------------------------------------------------------


def decode(audio: Audio, channel: Channel) -> Pieces:
    """A recording as WAV, in pieces; errors as of `parsing.open_recording`, and while it is decoded."""
    request = current()
    with audio(channel) as stream:
        for piece in encode_stream(stream, stream.sample_rate, stream.frames):
            request.checkpoint()
            yield piece


# -- tables ---------------------------------------------------------------------------------------------------------


def write_table(repository: Repository, asked: TableRequest) -> tuple[bytes, str]:
    """A table, and the name of its file; a format of several files becomes a ZIP.

    Raises:
        InputError: an unknown format, or columns that don't fit together.
        NotFoundError: no such model or probe.
        TooLargeError: more rows than the request may have.
    """
    if (form := FORMATS.get(asked.format)) is None:
        raise InputError(f"format is {asked.format[:80]!r}; expected one of {', '.join(FORMATS)}")
    names = [each.name for each in asked.recordings]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two recordings are called {twice[:80]}; make a table of each")
    rows = sum(len(each.start) for each in asked.recordings)
    current().extend_answer(ROW_BYTES * rows, "send fewer recordings at once, or raise the threshold")
    one = len(asked.recordings) == 1 and form.media_type is not None
    folder = asked.folder or ("" if one or form.text is not None else FOLDER)
    with repository.lease(asked.model, asked.version) as engine:
        head = engine.probe(asked.probe)
        with source_of(repository, engine, head) as (source, _):
            results = result_set(source, engine, head, asked.query())
            bandwidth = source.audio_spec.sample_rate / 2
        described = sorted(((_recording(each, folder), each) for each in asked.recordings), key=_path)
        table = Table(
            [recording for recording, _ in described],
            [(recording, _annotations(each, results, head.name, bandwidth)) for recording, each in described],
            describe([results], Choice(threshold=asked.thresholds or asked.threshold)),
            head.calibration is not None,
        )
    if one:
        name = f"{described[0][1].name}.txt" if "." not in form.target else form.target
        return form.content(table), name
    is_folder = "." not in form.target
    if is_folder and (long := next((name for name in names if len(name.encode()) > NAME_BYTES), None)):
        raise InputError(f"{long[:80]} is too long for a file that is named after it; choose CSV")
    with tempfile.TemporaryDirectory(prefix="avex-table-") as place:
        target = Path(place) / form.target
        try:
            form.write(table, target)
            return (_zipped(target), f"{form.target}.zip") if target.is_dir() else (target.read_bytes(), form.target)
        except (OSError, StorageError):
            raise StorageError("the table can't be written to disk; choose CSV") from None


def _path(pair: tuple[Recording, Described]) -> str:
    return pair[0].path


def _recording(described: Described, folder: str) -> Recording:
    header = _header(described.head)
    origin = find_origin(described.name, header.metadata, described.duration)
    path = f"{folder.rstrip('/')}/{described.name}" if folder else described.name
    return Recording(
        path=path,
        digest=described.digest,
        duration=described.duration,
        sample_rate=header.sample_rate,
        channels=header.channels,
        start=origin.moment,
        latitude=origin.latitude,
        longitude=origin.longitude,
    )


def _header(head: bytes) -> Header:
    try:
        return read_header(Source(head))[1]
    except AudioError:
        return Header("", 0, 1, None)


def _annotations(each: Described, results: ResultSet, probe: str, bandwidth: float) -> Sequence[Annotation]:
    if not len(each.label) == len(each.start) == len(each.end) == len(each.score):
        raise InputError(f"{each.name[:80]}: label, start, end and score have different lengths")
    if each.label and not 0 <= min(each.label) <= max(each.label) < len(each.labels):
        raise InputError(f"{each.name[:80]}: label {max(each.label)} is not one of {len(each.labels)} labels")
    names = [each.labels[label] for label in each.label]
    (head,) = results.probes
    probabilities: Sequence[float | None] = [None] * len(names)
    if (calibrator := head.calibrator) is not None:
        if strange := next((name for name in names if name not in calibrator.places), None):
            raise InputError(f"{each.name[:80]}: the probe has no label {strange[:80]!r}")
        probabilities = calibrator.of_labels(names, each.score)
    columns = zip(each.start, each.end, names, each.score, probabilities, strict=True)
    return [
        Annotation(start, end, name, score, bandwidth, results.bundle, results.version, probe, probability)
        for start, end, name, score, probability in columns
    ]


def _zipped(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            archive.writestr(zipfile.ZipInfo(name, EARLIEST), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()
