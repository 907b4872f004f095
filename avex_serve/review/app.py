"""The web application of ``avex-serve review``: its routes answer the pages in JSON.

No route opens a path that a client names: recordings have numbers, and files of the pages are in a table.
"""

import csv
import io
import json
import secrets
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import urlencode

import msgspec
import numpy as np
from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avex_serve.annotations.reviews import COLUMNS, Decision, Review, Subject, agreed
from avex_serve.archive.density import densities_table
from avex_serve.archive.report import REVIEW
from avex_serve.audio.reader import Channel
from avex_serve.calibration.scales import Calibrator
from avex_serve.errors import AvexServeError, InputError, NotFoundError, TooLargeError
from avex_serve.inference.scores import ScoreScale
from avex_serve.page.assets import HEADERS, assets
from avex_serve.page.waves import WaveFile, find_range
from avex_serve.review import progress
from avex_serve.review.book import Answer, Book, check_annotator
from avex_serve.review.pool import Pool, Queue
from avex_serve.review.retraining import Retraining
from avex_serve.review.strategies import STRATEGIES

LARGEST_BODY: Final = 2**16  # bytes
MOST_ITEMS: Final = 5000  # of a queue that are sent at once
MOST_DIGITS: Final = 16  # of a number in a path
OPEN_FILES: Final = 64  # recordings whose headers are remembered
PAGE: Final = "review.html"
# Reports hold their style, pictures and sounds, and no script.
REPORT_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


class Json(JSONResponse):
    """JSON of ASCII alone, so that file names of any bytes can be in it."""

    def render(self, content: Any) -> bytes:
        """The document; ValueError for numbers that JSON doesn't know."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


Text = Annotated[str, Meta(max_length=1000)]
Body = TypeVar("Body", bound=Struct)
Handler = Callable[[Request], Awaitable[Response]]


class ScoredPool(NamedTuple):
    """Windows with the scores of a head, which have the same numbers whatever the head."""

    pool: Pool
    scale: ScoreScale = "sigmoid"  # of the scores
    probe: str = ""  # empty: they are of a table
    calibrator: Calibrator | None = None  # of the head


@dataclass
class Material:
    """What is reviewed."""

    title: str
    scored: ScoredPool
    book: Book
    channel: Channel = "mix"
    target_precision: float = 0.9
    similar: Callable[[int], np.ndarray] | None = None  # (N,) of all windows to one; None: no embeddings
    probes: Callable[[], Sequence[str]] = tuple  # whose scores can be chosen
    rescore: Callable[[str], ScoredPool] | None = None  # the same windows with the scores of another head
    report: Path | None = None  # of the run; the file need not exist
    retraining: Retraining = field(
        default_factory=lambda: Retraining(
            None, (), "Tables can't be retrained on: review the results of avex-serve run."
        )
    )
    lock: threading.Lock = field(default_factory=threading.Lock)


class QueueRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Which windows the page wants next; fields as of `Queue`."""

    annotator: Text
    label: Text
    strategy: Text = "highest"
    seed: Annotated[int, Meta(ge=0)] = 0
    lowest: float | None = None
    highest: float | None = None
    sites: list[Text] | None = None
    first: date | None = None
    last: date | None = None
    hours: tuple[int, int] | None = None
    per_recording: int | None = None
    middle: float | None = None
    example: int | None = None  # a window
    skip: Literal["mine", "all", "new", "none"] = (
        "mine"  # what is left out: reviewed by me, by anybody; not by others
    )
    count: Annotated[int, Meta(ge=1, le=MOST_ITEMS)] = 100


class AnswerRequest(Struct, forbid_unknown_fields=True):
    """A decision about a label."""

    label: Text
    decision: Decision


class DecisionRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Decisions about a window that belong together."""

    annotator: Text
    window: int
    answers: Annotated[list[AnswerRequest], Meta(min_length=1, max_length=20)]
    comment: Text = ""


class ScoresRequest(Struct, forbid_unknown_fields=True):
    """Whose scores are reviewed."""

    probe: Text


class NoRequest(Struct, forbid_unknown_fields=True):
    """A body that says nothing: ``{}``."""


class UndoRequest(Struct, forbid_unknown_fields=True):
    """Whose last decision is withdrawn."""

    annotator: Text


def make_routes(material: Material) -> list[BaseRoute]:
    """All routes; those of `make_app` need its token."""
    routes = _Routes(material)
    table: list[tuple[str, str, Handler]] = [
        ("/", "GET", routes.page),
        ("/page/{name:path}", "GET", routes.static),
        ("/api/start", "GET", routes.start),
        ("/api/queue", "POST", routes.queue),
        ("/api/item", "GET", routes.item),
        ("/api/decide", "POST", routes.decide),
        ("/api/undo", "POST", routes.undo),
        ("/api/counts", "GET", routes.counts),
        ("/api/label", "GET", routes.label),
        ("/api/recordings/{number}.wav", "GET", routes.recording),
        ("/api/reviews.csv", "GET", routes.reviews),
        ("/api/densities.csv", "GET", routes.densities),
        ("/api/scores", "POST", routes.scores),
        ("/api/retraining", "GET", routes.retraining),
        ("/api/retraining/start", "POST", routes.start_retraining),
        ("/api/retraining/cancel", "POST", routes.cancel_retraining),
        ("/retrained/{number:int}/{which}", "GET", routes.retrained),
        ("/report", "GET", routes.report),
    ]
    return [Route(path, handler, methods=[method]) for path, method, handler in table]


def make_app(material: Material, token: str, hosts: Sequence[str]) -> ASGIApp:
    """The application.

    Args:
        material: what is reviewed.
        token: that the address of the first request must have.
        hosts: the values of the header Host that are answered, such as ``127.0.0.1:8766``.
    """
    app = Starlette(
        routes=make_routes(material),
        exception_handlers={AvexServeError: _answer_error},  # type: ignore[dict-item]
    )
    return _Guard(app, token, hosts)


class _Guard:
    """Answers only who has the token, at an address of this machine, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts
        self._name = f"avex_review_{hosts[0].rpartition(':')[2]}"  # cookies don't know ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._refuse(request)
        await (self._app if answer is None else answer)(scope, receive, add_headers)

    def _refuse(self, request: Request) -> Response | None:
        """The answer to a request that isn't passed on."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts or origin not in (None, f"http://{host}"):  # a page of another site asks
            return PlainTextResponse("this address is not answered", 403)
        given = request.query_params.get("token")
        if (
            given is not None
            and request.method == "GET"
            and secrets.compare_digest(given.encode(), self._token.encode())
        ):
            others = [(name, value) for name, value in request.query_params.multi_items() if name != "token"]
            response = RedirectResponse(f"/?{urlencode(others)}" if others else "/", 303)
            response.set_cookie(self._name, self._token, httponly=True, samesite="lax")
            return response
        cookie = request.cookies.get(self._name, "")
        if not secrets.compare_digest(cookie.encode(), self._token.encode()):
            return PlainTextResponse("open the address that avex-serve review printed: it holds a token", 403)
        return None


async def _answer_error(_: Request, error: AvexServeError) -> Response:
    return Json({"error": str(error)}, error.http_status)


class _Routes:
    def __init__(self, material: Material) -> None:
        self._material = material
        self._book = material.book
        self._similar: tuple[int, np.ndarray] | None = None
        self._open = lru_cache(OPEN_FILES)(self._open_recording)

    @property
    def _pool(self) -> Pool:
        return self._material.scored.pool

    # -- pages -----------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return assets()[PAGE].answer(request)

    async def static(self, request: Request) -> Response:
        asset = assets().get(request.path_params["name"])
        if asset is None:
            raise NotFoundError("no such file")
        return asset.answer(request)

    # -- what there is ---------------------------------------------------------------------------------------------

    async def start(self, _: Request) -> Response:
        pool, book = self._pool, self._book
        await run_in_threadpool(book.refresh)
        days = sorted(sound.start.date().isoformat() for sound in pool.sounds if sound.start is not None)
        strategies = [name for name in STRATEGIES if name != "nearest" or self._material.similar is not None]
        return Json(
            {
                "title": self._material.title,
                "labels": pool.labels,
                "sites": pool.sites,
                "dates": [days[0], days[-1]] if days else None,
                "strategies": strategies,
                "scale": self._material.scored.scale,
                "probe": self._material.scored.probe,
                "probes": await run_in_threadpool(self._material.probes),
                "report": self._material.report is not None and self._material.report.is_file(),
                "middle": pool.middle,
                "target_precision": self._material.target_precision,
                "windows": int(pool.recording.size),
                "recordings": len(pool.sounds),
                "annotators": sorted({review.annotator for review in book.reviews} - {""}),
                "folder": str(book.folder),
            }
        )

    async def queue(self, request: Request) -> Response:
        wanted = await _read(request, QueueRequest)
        check_annotator(wanted.annotator)
        return Json(await run_in_threadpool(self._queue, wanted))

    def _queue(self, wanted: QueueRequest) -> dict[str, Any]:
        label = self._pool.label_index(wanted.label)
        self._book.refresh()
        left_out, only = self._reviewed(wanted)
        queue = Queue(
            strategy=wanted.strategy,
            seed=wanted.seed,
            lowest=wanted.lowest,
            highest=wanted.highest,
            sites=wanted.sites,
            first=wanted.first,
            last=wanted.last,
            hours=wanted.hours,
            per_recording=wanted.per_recording,
            middle=wanted.middle,
            similarity=None if wanted.example is None else self._similarity(wanted.example),
        )
        windows, scores = self._pool.select(label, queue, left_out)
        if only is not None:
            kept = np.isin(windows, np.fromiter(only, np.int64, len(only)))
            windows, scores = windows[kept], scores[kept]
        first = zip(windows[: wanted.count].tolist(), scores[: wanted.count].tolist(), strict=True)
        known = self._decisions(wanted.annotator)
        items = [self._item(window, wanted.label, score, known) for window, score in first]
        return {"items": items, "total": int(windows.size)}

    def _reviewed(self, wanted: QueueRequest) -> tuple[set[int], set[int] | None]:
        """Windows that are left out of a queue, and those that it is limited to."""
        mine: set[int] = set()
        others: set[int] = set()
        for review in self._book.reviews:
            if review.label == wanted.label:
                window = self._pool.find(review.file, review.start)
                if window is not None:
                    (mine if review.annotator == wanted.annotator else others).add(window)
        return {
            "mine": (mine, None),
            "all": (mine | others, None),
            "new": (mine, others),
            "none": (set(), None),
        }[wanted.skip]

    def _similarity(self, window: int) -> np.ndarray:
        if self._material.similar is None:
            raise NotFoundError("the run has no embeddings; run the same command again with --embeddings")
        self._check_window(window)
        with self._material.lock:
            if self._similar is None or self._similar[0] != window:
                self._similar = (window, self._material.similar(window))
            return self._similar[1]

    async def item(self, request: Request) -> Response:
        path, label = request.query_params.get("file", ""), request.query_params.get("label", "")
        try:
            start = float(request.query_params.get("start", ""))
        except ValueError:
            raise InputError("start: expected seconds, such as 12.5") from None
        window = self._pool.window_at(path, start + 1e-3)
        if window is None:
            raise NotFoundError(f"no window at {start:g} s of {path}")
        self._pool.label_index(label)
        known = self._decisions(request.query_params.get("annotator", ""))
        return Json(self._item(window, label, self._score(window, label), known))

    def _score(self, window: int, label: str) -> float:
        if label not in self._pool.labels:
            return np.nan
        return float(self._pool.scores_of(self._pool.label_index(label), np.array([window]))[0])

    def _decisions(self, annotator: str) -> dict[int, list[Review]]:
        """The decisions of an annotator by window."""
        found: dict[int, list[Review]] = defaultdict(list)
        for review in self._book.reviews:
            if review.annotator == annotator:
                window = self._pool.find(review.file, review.start)
                if window is not None:
                    found[window].append(review)
        return found

    def _item(self, window: int, label: str, score: float, known: Mapping[int, Sequence[Review]]) -> dict[str, Any]:
        """A window to review, as the page shows it."""
        place = int(self._pool.recording[window])
        sound = self._pool.sounds[place]
        start, end = self._pool.spans[window].tolist()
        moment = None if sound.start is None else (sound.start + timedelta(seconds=start)).isoformat(" ", "seconds")
        return {
            "window": window,
            "label": label,
            "score": score if np.isfinite(score) else None,
            "probability": self._probability(label, score),
            "recording": place,
            "file": sound.path,
            "site": sound.site,
            "time": moment,
            "start": start,
            "end": end,
            "decisions": [_shown(review) for review in known.get(window, ())],
        }

    def _probability(self, label: str, score: float) -> float | None:
        calibrator = self._material.scored.calibrator
        if calibrator is None or label not in calibrator.places or not np.isfinite(score):
            return None
        return calibrator.of_labels([label], [score])[0]

    # -- decisions -------------------------------------------------------------------------------------------------

    async def decide(self, request: Request) -> Response:
        given = await _read(request, DecisionRequest)
        self._check_window(given.window)
        path, start, end = self._span(given.window)
        answers = [
            Answer(Subject(path, start, end, each.label), each.decision, given.comment) for each in given.answers
        ]
        await run_in_threadpool(self._book.write, given.annotator, answers)
        return Json({"saved": len(answers)})

    async def undo(self, request: Request) -> Response:
        given = await _read(request, UndoRequest)
        check_annotator(given.annotator)
        withdrawn = await run_in_threadpool(self._book.undo, given.annotator)
        if not withdrawn:
            return Json({"item": None, "withdrawn": []})
        first = withdrawn[0]
        window = self._pool.find(first.file, first.start)
        item = None
        if window is not None:
            known = self._decisions(given.annotator)
            item = self._item(window, first.label, self._score(window, first.label), known)
        return Json({"item": item, "withdrawn": [_shown(review) for review in withdrawn]})

    async def counts(self, _: Request) -> Response:
        def count() -> dict[str, Any]:
            self._book.refresh()
            reviews = self._book.reviews
            return {
                "labels": progress.count_labels(reviews),
                "agreement": [each._asdict() for each in progress.agreement(reviews)],
            }

        return Json(await run_in_threadpool(count))

    async def label(self, request: Request) -> Response:
        name = request.query_params.get("name", "")
        self._pool.label_index(name)
        found = await run_in_threadpool(
            progress.describe_label,
            self._pool,
            self._material.scored.scale,
            name,
            self._book.reviews,
            self._material.target_precision,
        )
        return Json(found)

    async def reviews(self, request: Request) -> Response:
        """All decisions as one table, or those that the annotators agree on."""
        reviews = self._book.reviews
        rows: list[Sequence[Any]]
        if "agreed" in request.query_params:
            rows = [(*subject, decision, "", "", "") for subject, decision in agreed(reviews).items()]
        else:
            rows = [each[: len(COLUMNS)] for each in reviews]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        return _table(text.getvalue(), "reviews.csv")

    async def densities(self, _: Request) -> Response:
        """The call densities of all labels and sites as one table."""
        found = await run_in_threadpool(progress.label_densities, self._pool, self._book.reviews)
        return _table(densities_table(found), "densities.csv")

    # -- other scores ----------------------------------------------------------------------------------------------

    async def scores(self, request: Request) -> Response:
        wanted = await _read(request, ScoresRequest)
        if self._material.rescore is None:
            raise NotFoundError("tables have no scores of other heads")
        self._material.scored = await run_in_threadpool(self._material.rescore, wanted.probe)
        return Json({"probe": self._material.scored.probe})

    async def retraining(self, _: Request) -> Response:
        def describe() -> dict[str, Any]:
            found, scored = self._material.retraining.describe(), self._material.probes()
            return found | {"heads": [each | {"scores": each["name"] in scored} for each in found["heads"]]}

        return Json(await run_in_threadpool(describe))

    async def start_retraining(self, request: Request) -> Response:
        await _read(request, NoRequest)
        if not self._book.reviews:
            raise InputError("nothing is decided yet; review some windows first")
        await run_in_threadpool(self._material.retraining.start)
        return await self.retraining(request)

    async def cancel_retraining(self, request: Request) -> Response:
        await _read(request, NoRequest)
        await run_in_threadpool(self._material.retraining.cancel)
        return await self.retraining(request)

    async def retrained(self, request: Request) -> Response:
        """The report of a retrained head, or of the head before it on the same windows."""
        which = request.path_params["which"]
        if which not in ("after", "before"):
            raise NotFoundError("no such report")
        found = self._material.retraining.report(request.path_params["number"], before=which == "before")
        return await self._send_report(found)

    async def report(self, _: Request) -> Response:
        """The report of the run, whose links then lead to this page, whatever its port."""
        return await self._send_report(self._material.report)

    async def _send_report(self, path: Path | None) -> Response:
        try:
            content = b"" if path is None else await run_in_threadpool(path.read_bytes)
        except FileNotFoundError:
            content = b""
        if not content:
            raise NotFoundError("there is no such report")
        here = content.replace(f'href="{REVIEW}'.encode(), b'href="/?')
        return Response(here, media_type="text/html; charset=utf-8", headers=REPORT_HEADERS)

    # -- recordings ------------------------------------------------------------------------------------------------

    async def recording(self, request: Request) -> Response:
        text = request.path_params["number"]
        # Starlette's own numbers end in an error of the service if they have 5000 digits.
        number = int(text) if text.isdecimal() and len(text) < MOST_DIGITS else len(self._pool.sounds)
        if number >= len(self._pool.sounds):
            raise NotFoundError(f"no recording {text[:MOST_DIGITS]}")
        return await run_in_threadpool(self._stretch, number, request.headers.get("range"))

    def _stretch(self, number: int, wanted: str | None) -> Response:
        wave = self._open(number)
        if wanted is None:
            raise InputError("expected a header Range: recordings are sent in stretches")
        first, last = find_range(wanted, wave.size)
        return Response(
            wave.read(first, last),
            206,
            {"Content-Range": f"bytes {first}-{last}/{wave.size}", "Accept-Ranges": "bytes"},
            "audio/wav",
        )

    def _open_recording(self, number: int) -> WaveFile:
        return WaveFile(self._pool.sounds[number].path, self._material.channel)

    def _check_window(self, window: int) -> None:
        if not 0 <= window < self._pool.recording.size:
            raise NotFoundError(f"no window {window}")

    def _span(self, window: int) -> tuple[str, float, float]:
        start, end = self._pool.spans[window].tolist()
        return self._pool.sounds[int(self._pool.recording[window])].path, round(start, 9), round(end, 9)


def _table(content: str, name: str) -> Response:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="text/csv; charset=utf-8", headers=disposition)


def _shown(review: Review) -> dict[str, str]:
    return {"label": review.label, "decision": review.decision, "comment": review.comment}


async def _read(request: Request, kind: type[Body]) -> Body:
    """The body of a request, checked; InputError for another."""
    if request.headers.get("content-type") != "application/json":
        raise InputError("expected a body of type application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise TooLargeError(f"a body of more than {LARGEST_BODY} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise InputError(f"the body: {error}") from None
