"""The forms of an answer to `/predict`: a JSON document, lines of JSON while it is made, or a table.

The option ``format`` names the form, or else the header ``Accept``. Other types in that header are ignored, since
libraries send their own, and the answer is JSON.
"""

import hashlib
import json
import os
from asyncio import timeout
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import tzinfo
from functools import partial
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from avex_serve.annotations.formats import FORMATS
from avex_serve.annotations.table import Annotation, Recording, Table
from avex_serve.archive.choice import Choice, describe, in_zone
from avex_serve.archive.plan import ResultSet, plan_passes
from avex_serve.audio.reader import AudioStream
from avex_serve.audio.recorder import NO_TIME, find_origin, parse_zone
from avex_serve.bundles.manifest import ProbeInfo
from avex_serve.errors import AvexServeError, InputError
from avex_serve.inference import pipeline
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Answer, Audio, Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import Detection, Prediction, known
from avex_serve.inference.scores import ScoreScale
from avex_serve.scheduling.admission import Pieces
from avex_serve.scheduling.request import current
from avex_serve.service.front import LAST_SECONDS, Front, deliver

DOCUMENT: Final = "json"
LINES: Final = "stream"
LINES_TYPE: Final = "application/x-ndjson"
TABLES: Final = {name: each for name, each in FORMATS.items() if each.media_type is not None}
NAMES: Final = (DOCUMENT, LINES, *TABLES)
OPTIONS: Final = ("format", "file", "timezone")  # of which form the answer has
# What `Accept` may name. `text/csv` is the table of all columns, and of other tables only Raven's has a type.
ACCEPTED: Final = {
    "application/json": DOCUMENT,
    LINES_TYPE: LINES,
    "text/csv": "csv",
    "text/tab-separated-values": "raven",
    "application/vnd.apache.parquet": "parquet",
    "application/*": DOCUMENT,
    "*/*": DOCUMENT,
}
MAX_NAME: Final = 4096  # characters of a recording's name, as of a path on Linux
NO_NAME: Final = "recording"
ROW_BYTES: Final = 2048  # memory for a row of a table until its text is made, without the recording's name
WARNINGS: Final = "Avex-Warnings"  # header: a JSON list of sentences, as in the document
MAX_WARNINGS: Final = 4000  # characters of that header


class Form(NamedTuple):
    """Which form a client wants, and what a table needs."""

    format: str
    file: str  # name or path of the recording
    zone: tzinfo | None  # of a time that has none


def choose(pairs: Iterable[tuple[str, str]], accept: str, file: str | None) -> tuple[Form, list[tuple[str, str]]]:
    """The form that a request asks for, and its other options.

    Args:
        pairs: all options.
        accept: the header.
        file: the recording's name in a form; None: it has none.

    Raises:
        InputError: an unknown format or zone, an option that is given twice, or a name that can't be.
    """
    rest, chosen = [], dict[str, str]()
    for name, text in pairs:
        if name not in OPTIONS:
            rest.append((name, text))
        elif name in chosen:
            raise InputError(f"{name} is given more than once; send it once")
        elif text not in ("", "null"):
            chosen[name] = text
    wanted = chosen.get("format") or _accepted(accept)
    if wanted not in NAMES:
        raise InputError(f"format is {wanted[:80]!r}; expected one of {', '.join(NAMES)}")
    name = chosen.get("file") or file or NO_NAME
    if len(name) > MAX_NAME or "\0" in name:
        raise InputError(f"file is no name of a recording; expected at most {MAX_NAME} characters, none of them 0")
    return Form(wanted, name, _zone(chosen.get("timezone"))), rest


def _accepted(accept: str) -> str:
    """The best of the types in the header, by their weights and then by their order."""
    best, found = 0.0, DOCUMENT
    for part in accept.split(",") if accept else ():
        kind, *parameters = (each.strip().lower() for each in part.split(";"))
        weight = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        try:
            quality = float(weight)
        except ValueError:
            continue
        if kind in ACCEPTED and quality > best:
            best, found = quality, ACCEPTED[kind]
    return found


def _zone(text: str | None) -> tzinfo | None:
    try:
        return None if text is None else parse_zone(text)
    except ValueError as error:
        raise InputError(f"timezone: {error}") from None


# -- lines ----------------------------------------------------------------------------------------------------------

Seconds = Annotated[float, Meta(description="seconds from the beginning of the recording")]


class Start(msgspec.Struct, tag_field="event", tag="start", kw_only=True):
    """The first line: what the answer is about."""

    bundle: str
    version: str
    probe: str
    trained: Annotated[bool, Meta(description="False: the head has random weights")]
    window: Annotated[float, Meta(description="length of a window in seconds")]
    overlap: Annotated[float, Meta(description="seconds that neighbouring windows share")]
    score_scale: ScoreScale


class Window(msgspec.Struct, tag_field="event", tag="window", kw_only=True):
    """A line for each window, also where nothing was found."""

    start: Seconds
    end: Seconds
    detections: Annotated[
        list[Detection], Meta(description="of this window; with merge those that have ended, with their own times")
    ]


class End(msgspec.Struct, tag_field="event", tag="end", kw_only=True):
    """The last line of a whole answer."""

    duration: Annotated[float, Meta(description="of the recording, in seconds")]
    windows: Annotated[int, Meta(description="lines of windows")]
    detections: Annotated[int, Meta(description="in all of them")]
    warnings: Annotated[tuple[str, ...], Meta(description="reasons to doubt the answer, a sentence each")]


class Failure(msgspec.Struct, tag_field="event", tag="error", kw_only=True):
    """The last line of an answer that is only a part."""

    error: str
    partial: Annotated[bool, Meta(description="True: windows are missing")] = True
    end: Annotated[float, Meta(description="seconds of the recording, up to which there are lines")]


EVENTS: Final = (Start, Window, End, Failure)


@dataclass
class _Lines:
    """An answer as lines, and how far it has been made."""

    end: float = 0.0

    def make(self, repository: Repository, audio: Audio, query: Query) -> Pieces:
        """The lines; errors as of `pipeline.open_answer`."""
        windows = detections = 0
        with pipeline.open_answer(repository, audio, query) as answer:
            for window in answer:
                (found,) = window.detections
                line = _line(Window(start=window.start, end=window.end, detections=known(found)))
                if windows == 0:  # what is wrong with the request or the recording's begin is answered by a status
                    line = _line(_start(answer)) + line
                yield line
                self.end = window.end
                windows += 1
                detections += len(found)
            document = answer.document(0, [])
        yield _line(
            End(
                duration=document.duration,
                windows=windows,
                detections=detections,
                warnings=document.warnings,
            )
        )

    def failure(self, error: AvexServeError) -> bytes:
        """The last line of an answer that is only a part."""
        return _line(Failure(error=str(error), end=self.end))


def _start(answer: Answer) -> Start:
    document = answer.document(0, [])
    return Start(**{name: getattr(document, name) for name in Start.__struct_fields__})


def _line(event: msgspec.Struct) -> bytes:
    return msgspec.json.encode(event) + b"\n"


async def send_lines(front: Front, route: str, audio: Audio, query: Query) -> Response:
    """An answer as lines; errors that come before its first line are raised."""
    lines = _Lines()
    make = partial(lines.make, front.repository, audio, query)
    return await send_pieces(front, route, make, LINES_TYPE, lines.failure)


async def send_pieces(
    front: Front,
    route: str,
    make: Callable[[], Pieces],
    media_type: str,
    failure: Callable[[AvexServeError], bytes] | None = None,
) -> Response:
    """An answer in pieces; errors that come before its first one are raised.

    Args:
        front: of the worker.
        route: for messages.
        make: makes the pieces, in the thread of the request.
        media_type: of the answer.
        failure: the end of an answer that is only a part; None: the connection is closed.
    """
    pieces = front.admission.stream(make)
    first = await anext(pieces)
    return _Stream(first, pieces, route, media_type, failure)


class _Stream(Response):
    """Sends pieces while they are made."""

    def __init__(
        self,
        first: list[bytes],
        pieces: AsyncGenerator[list[bytes], None],
        route: str,
        media_type: str,
        failure: Callable[[AvexServeError], bytes] | None,
    ) -> None:
        # nginx would keep pieces back.
        super().__init__(headers={"X-Accel-Buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._first = first
        self._pieces = pieces
        self._route = route
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all pieces, or those that there are and the reason why the rest is missing."""
        unsent = [*self._first]  # until the client has room for them, which an error may come before

        async def body(pieces: list[bytes], *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": more})

        async def some(pieces: list[bytes]) -> None:
            unsent.extend(pieces)
            await body(unsent)
            unsent.clear()

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if (error := await deliver(self._pieces, some, self._route)) is None:
            await body(unsent, more=False)
            return
        if self._failure is not None:
            async with timeout(LAST_SECONDS):  # a client that doesn't read must not keep the request
                await body([*unsent, self._failure(error)], more=False)
        raise error


# -- tables ---------------------------------------------------------------------------------------------------------


async def send_table(front: Front, form: Form, data: bytes, audio: Audio, query: Query) -> Response:
    """An answer as a table, which has the bytes that `avex-serve tables` writes for the recording."""
    content, warnings = await front.admission.run(partial(_table, front.repository, form, data, audio, query))
    kind = TABLES[form.format].media_type
    return Response(content, media_type=kind, headers=_warning_header(warnings))


def _warning_header(warnings: Iterable[str]) -> Mapping[str, str]:
    """The reasons to doubt the table, for which it has no place."""
    kept: list[str] = []
    for warning in warnings:
        if len(json.dumps([*kept, warning])) > MAX_WARNINGS:
            break
        kept.append(warning)
    return {WARNINGS: json.dumps(kept)} if kept else {}


def _table(
    repository: Repository, form: Form, data: bytes, audio: Audio, query: Query
) -> tuple[bytes, tuple[str, ...]]:
    with pipeline.open_answer(repository, audio, query) as answer:
        (prediction,) = answer.collect()
        size = ROW_BYTES + 4 * len(form.file)
        current().extend_answer(size * len(prediction.detections), "raise threshold or lower top_k")
        recording, doubts = _recording(form, data, answer.rows.stream)
        rows = [(recording, _annotations(answer, prediction))]
        (head,) = answer.heads
        about = describe([result_set(answer.rows.source, head.engine, head.head, query)], _choice(form, query))
        table = Table([recording], rows, about, head.calibrator is not None)
    return TABLES[form.format].content(table), tuple(dict.fromkeys((*prediction.warnings, *doubts)))


def _recording(form: Form, data: bytes, stream: AudioStream) -> tuple[Recording, list[str]]:
    """The recording as a table describes it, and the warnings of its name and header."""
    header = stream.header
    assert header is not None
    duration = stream.samples / stream.sample_rate
    origin = find_origin(os.path.basename(form.file), header.metadata, duration)  # noqa: PTH119 - of a client
    doubts = [warning for warning in origin.warnings if warning != NO_TIME]
    recording = Recording(
        path=form.file,
        digest=hashlib.sha256(data).hexdigest(),
        duration=duration,
        sample_rate=stream.sample_rate,
        channels=header.channels,
        start=in_zone(origin.moment, form.zone),
        latitude=origin.latitude,
        longitude=origin.longitude,
    )
    return recording, doubts


def _annotations(answer: Answer, prediction: Prediction) -> list[Annotation]:
    bandwidth = answer.rows.source.audio_spec.sample_rate / 2
    origin = (prediction.bundle, prediction.version, prediction.probe)
    return [
        Annotation(one.start, one.end, one.label, one.score, bandwidth, *origin, one.probability)
        for one in prediction.detections
    ]


def result_set(source: Engine, engine: Engine, head: ProbeInfo, query: Query) -> ResultSet:
    """What a run of the same bundles would call its results, with the one head.

    Args:
        source: the audio bundle.
        engine: of the head, the same or one that reads its embeddings.
        head: the one that answered.
        query: the options that change scores.
    """
    engines = [source] if engine is source else [source, engine]
    sets = (results for each in plan_passes(engines, query) for results in each.sets)
    found = next(each for each in sets if (each.bundle, each.version) == engine.model and each.probes)
    probes = tuple(probe for probe in found.probes if probe.name == head.name)
    return msgspec.structs.replace(found, probes=probes)


def _choice(form: Form, query: Query) -> Choice:
    return Choice(
        threshold=query.threshold,
        top_k=query.top_k,
        labels=query.label,
        merge_gap=query.merge,
        zone=form.zone,
        merge_mean=query.merge_score == "mean",
    )
