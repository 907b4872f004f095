"""Answers in lines while they are made; the document of the same service and the engine are the oracles."""

import asyncio
import contextlib
import json
import socket
import time

import pytest
import uvloop

from avex_serve.errors import DeadlineError
from avex_serve.scheduling.request import Request, answering
from avex_serve.service.front import deliver
from tests.bundles import LABELS, make_probes_bundle
from tests.clients import Worker, until
from tests.service.conftest import encode, running_server

LINES = {"Accept": "application/x-ndjson"}
LONG = encode(58, 16000, 1, "WAV")  # many seconds of work for the slow bundle


def ask(server, audio, headers=LINES, **options):
    answer = server.post("/predict", content=audio, params=options, headers=headers)
    return answer, [json.loads(line) for line in answer.text.splitlines()]


def whole(lines):
    """Start, windows and end of an answer."""
    start, *windows, end = lines
    assert [start["event"], end["event"]] == ["start", "end"]
    assert {each["event"] for each in windows} <= {"window"}
    assert end["windows"] == len(windows)
    assert end["detections"] == sum(len(each["detections"]) for each in windows)
    return start, windows, end


OPTIONS = (
    {},
    {"top_k": 1, "overlap": 0.02},
    {"hop": 0.03, "threshold": 0.4},
    {"final_clip": "full", "top_k": 3},
    {"label": LABELS[1], "threshold": 0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lines_are_the_document(audio_server, recording, options):
    document = audio_server.post("/predict", content=recording, params=options).json()
    answer, lines = ask(audio_server, recording, **options)
    assert answer.headers["content-type"] == "application/x-ndjson"
    start, windows, end = whole(lines)
    for name in ("bundle", "version", "probe", "trained", "window", "overlap", "score_scale"):
        assert start[name] == document[name]
    assert [end["duration"], end["warnings"]] == [document["duration"], document["warnings"]]
    assert [one for each in windows for one in each["detections"]] == document["detections"]
    for window in windows:
        assert {(one["start"], one["end"]) for one in window["detections"]} <= {(window["start"], window["end"])}
    spans = audio_server.post("/embed", content=recording, params=cut(options)).json()["spans"]
    assert [[each["start"], each["end"]] for each in windows] == spans


def cut(options):
    return {name: value for name, value in options.items() if name in ("overlap", "hop", "final_clip")}


@pytest.mark.parametrize("score", ["max", "mean"])
def test_merged_detections_come_once_they_have_ended(audio_server, score):
    audio = encode(3, 16000, 1, "WAV")
    options = {"merge": 0, "merge_score": score, "threshold": 0.5}
    document = audio_server.post("/predict", content=audio, params=options).json()
    _, windows, _ = whole(ask(audio_server, audio, **options)[1])
    found = [one for each in windows for one in each["detections"]]
    order = lambda one: (one["start"], one["label"])  # noqa: E731
    assert sorted(found, key=order) == sorted(document["detections"], key=order)
    assert 0 < len(found) < len(audio_server.post("/predict", content=audio).json()["detections"])
    for window in windows[:-1]:
        assert all(one["end"] <= window["start"] for one in window["detections"])


def test_format_of_a_query_and_of_a_form(audio_server, wav):
    expected = ask(audio_server, wav)[1]
    for arguments in (
        {"content": wav, "params": {"format": "stream"}},
        {"files": {"audio": wav}, "data": {"format": "stream"}},
        {"content": wav, "headers": {"Accept": "text/html;q=0.1, application/x-ndjson, */*;q=0.8"}},
    ):
        answer = audio_server.post("/predict", **arguments)
        assert [json.loads(line) for line in answer.text.splitlines()] == expected


@pytest.mark.parametrize("accept", ["", "*/*", "application/json", "image/png", "application/x-ndjson;q=0", "a;q=x"])
def test_other_types_get_the_document(audio_server, wav, predict, accept):
    assert audio_server.post("/predict", content=wav, headers={"Accept": accept}).json() == predict(wav)


@pytest.mark.parametrize(
    ("audio", "options", "status"),
    [(b"nothing", {}, 400), (None, {"threshold": "2"}, 400), (None, {"label": "wren"}, 404), (None, {"x": 1}, 400)],
)
def test_what_is_wrong_before_the_first_window_is_a_status(audio_server, wav, audio, options, status):
    answer, (error,) = ask(audio_server, wav if audio is None else audio, **options)
    assert answer.status_code == status
    assert list(error) == ["error"]


def test_warnings_are_in_the_last_line(audio_server):
    audio = encode(1, 16000, 1, "WAV")
    _, _, end = whole(ask(audio_server, audio[: len(audio) // 2])[1])
    assert "ends" in end["warnings"][0]


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory, slow_bundle):
    """One slot, no queue, and tens of milliseconds for each window."""
    settings = {"AVEX_CONCURRENCY": "1", "AVEX_QUEUE": "0", "AVEX_THREADS": "1", "AVEX_LOG_FORMAT": "json"}
    folder = tmp_path_factory.mktemp("slow")
    with running_server(folder, AVEX_BUNDLE=str(slow_bundle), AVEX_RELOAD_SECONDS="0", **settings) as server:
        yield server


def test_lines_come_while_the_rest_is_made(slow_server):
    began = time.monotonic()
    with slow_server.client.stream("POST", "/predict", content=LONG[: len(LONG) // 8], headers=LINES) as answer:
        times = [time.monotonic() - began for _ in answer.iter_lines()]
    assert times[1] < times[-1] / 2


def test_a_partial_answer_says_so(slow_server):
    answer, lines = ask(slow_server, LONG, headers={**LINES, "Request-Timeout": "1"})
    assert answer.status_code == 200
    *windows, last = lines[1:]
    assert windows
    assert last["event"] == "error"
    assert last["partial"] is True
    assert last["end"] == windows[-1]["end"]
    assert "in time" in last["error"]
    assert until(lambda: logged(slow_server, answer))["status"] == "504"


def test_a_late_answer_says_so_also_if_the_timer_ends_early():
    """Uvloop counts whole milliseconds: of 300 timers about 20 end before their time."""

    async def never():
        await asyncio.sleep(60)
        yield []

    async def answer(seconds):
        request = Request(seconds=seconds)
        with answering(request), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.remaining):
                return await deliver(never(), None, "")
        return None

    async def answers():
        return [await answer(0.003 + number / 10**5) for number in range(300)]

    assert {type(error) for error in uvloop.run(answers())} == {DeadlineError}


def test_a_client_that_goes_ends_the_work(slow_server):
    until(lambda: slow_server.post("/predict", content=encode(0.1, 16000, 1, "WAV")).status_code == 200)
    with slow_server.client.stream("POST", "/predict", content=LONG, headers=LINES) as answer:
        lines = answer.iter_lines()
        assert [json.loads(next(lines))["event"] for _ in range(2)] == ["start", "window"]
        busy = slow_server.post("/predict", content=encode(0.1, 16000, 1, "WAV"))
        assert busy.status_code == 503
    line = until(lambda: logged(slow_server, answer))
    assert line["status"] == "499"
    assert line["batches"] < 300, "of 580"
    until(lambda: slow_server.post("/predict", content=encode(0.1, 16000, 1, "WAV")).status_code == 200)


def test_a_client_that_stops_reading_holds_no_slot(tmp_path):
    """Its socket is full after a while; then the work waits, and others are answered."""
    bundle = make_probes_bundle(tmp_path / "bundle")
    audio = encode(900, 16000, 1, "FLAC")
    settings = {"AVEX_CONCURRENCY": "1", "AVEX_QUEUE": "1", "AVEX_THREADS": "1", "AVEX_MAX_WINDOWS": "1000000"}
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(bundle), **settings) as server:
        worker = Worker(server)
        short = encode(0.1, 16000, 1, "WAV")
        expected = server.post("/predict", content=short).json()
        with contextlib.closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.http_port))
            path = "/predict?format=stream&threshold=0&hop=0.01"
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(audio)}\r\n\r\n".encode())
            before = seconds(worker)
            connection.sendall(audio)
            until(lambda: idle(worker, before))
            assert b"200" in connection.recv(100)
            assert server.post("/predict", content=short).json() == expected


def seconds(worker):
    """The CPU time that a worker has used."""
    return sum(worker.process.cpu_times()[:2])


def idle(worker, before):
    """Whether a worker computes nothing, which it did for a while since it had used that time."""
    now = seconds(worker)
    time.sleep(0.5)
    return now - before > 0.5 and seconds(worker) - now < 0.05


def logged(server, answer):
    """The line of the log about a request; None: there is none yet."""
    for line in server.log.splitlines():
        with contextlib.suppress(ValueError):
            document = json.loads(line)
            if document.get("request_id") == answer.headers["x-request-id"] and "status" in document:
                return document
    return None
