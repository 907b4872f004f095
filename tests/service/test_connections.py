"""Connections of HTTP, byte by byte: each is answered or closed, and none fills the service or misleads it."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import threading
import time

import pytest
import uvicorn

from avex_serve.service import bento
from tests.clients import Worker, until
from tests.service.conftest import free_ports, running_server

PATIENCE = 10  # seconds until a test that hangs fails
MIB = 2**20
# The status line of an answer: text that an answer repeats has no line break.
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:date|content-type): ")
LIVE = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
INNER = b"GET /v2/models/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE)


def rest(connection):
    """What is sent until the connection is closed, which must be in time."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            answer += piece
    return answer


def exchange(server, *pieces):
    """Statuses and bytes that the service answers to a connection, until it closes it."""
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.05 * (len(pieces) > 1))
        answer = rest(connection)
    return [int(status) for status in STATUS.findall(answer)], answer


def chunked(body):
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


# Several requests at once


def test_requests_sent_at_once_are_answered_in_turn(audio_server, wav):
    post = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(wav) + wav
    statuses, answer = exchange(audio_server, (post + LIVE) * 3 + LAST)
    assert statuses == [200] * 7
    bodies = [line.split(b"HTTP/1.1")[0] for line in answer.splitlines() if line.startswith(b"{")]
    assert [json.loads(body) for body in bodies] == [audio_server.post("/predict", content=wav).json()] * 3


def test_beyond_a_bound_the_connection_ends_with_the_answers(audio_server):
    statuses, answer = exchange(audio_server, LIVE * 100)
    assert statuses == [200] * (1 + bento.MAX_WAITING)
    assert answer.count(b"connection: close") == 1


def test_requests_before_a_malformed_one_are_answered(audio_server):
    statuses, _ = exchange(audio_server, LIVE * 3 + b"\x00\x01\r\n\r\n")
    assert statuses[:3] == [200] * 3
    assert set(statuses[3:]) <= {400}


@pytest.mark.parametrize("path", [b"/x", b"/livez", b"/predict?" + b"a" * 3000])
def test_requests_without_end_fill_nothing(audio_server, path):
    """Whoever never stops sending is cut off, whether the answers are read or not."""
    worker = Worker(audio_server)
    audio_server.get("/livez")
    before, request = worker.memory, b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path
    for reads in (True, False):
        with connect(audio_server) as connection:
            reader = threading.Thread(target=rest, args=[connection])
            if reads:
                reader.start()
            with contextlib.suppress(OSError):
                for _ in range(20):
                    connection.sendall(request * (MIB // len(request)))
            if reads:
                reader.join()
    assert worker.memory <= before + 40 * MIB


def test_health_is_answered_before_what_many_connections_ask(tmp_path, audio_bundle):
    """Whatever arrives in one turn of the event loop: the worker is stopped meanwhile."""
    ask = b"%b HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with (
        running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle)) as server,
        contextlib.ExitStack() as stack,
    ):
        connections = [stack.enter_context(connect(server)) for _ in range(200)]
        for connection in connections:  # all are accepted
            connection.sendall(LIVE)
            assert b"200" in connection.recv(2**16)
        process = Worker(server).process
        process.suspend()
        try:
            for number, connection in enumerate(connections[1:]):
                connection.sendall(ask % b"GET /nothing/%d" % number)
            connections[0].sendall(ask % b"POST /livez")  # refused, and so in the log
        finally:
            process.resume()
        for connection in connections:
            rest(connection)
        order = re.findall(r" http (GET|POST) /(?:nothing|livez)", server.log)
    assert len(order) == len(connections)
    assert order.index("POST") < len(connections) / 4


def test_a_collection_of_garbage_stops_requests_for_moments(tmp_path, audio_bundle):
    """It looks at nothing that the start has left, which takes a tenth of a second."""
    (tmp_path / "counted.py").write_text(
        "import gc, os, threading\n"
        "from avex_serve.service import AvexService\n"
        "def count():\n"
        "    print('objects', os.getpid(), len(gc.get_objects()), flush=True)\n"
        "    timer = threading.Timer(0.5, count)\n"
        "    timer.daemon = True\n"
        "    timer.start()\n"
        "count()\n"
    )
    service = ("counted:AvexService",)
    with running_server(tmp_path / "server", tmp_path, service, AVEX_BUNDLE=str(audio_bundle)) as server:
        line = f"objects {Worker(server).process.pid} "
        seen = len(server.log)
        until(lambda: line in server.log[seen:])
        counts = re.findall(f"{line}(\\d+)", server.log)
    assert int(counts[0]) > 50_000
    assert int(counts[-1]) < 20_000


def test_answered_requests_leave_nothing(audio_server):
    def ask(count, depth=16):
        with connect(audio_server) as connection:
            for _ in range(count // depth):
                connection.sendall(LIVE * depth)
                answered = 0
                while answered < depth:
                    answered += len(STATUS.findall(piece := connection.recv(2**16)))
                    assert piece

    ask(1000)
    worker = Worker(audio_server)
    before = worker.memory
    ask(5000)
    assert worker.memory <= before + 8 * MIB  # BentoML's timers alone: 60 MB


def test_client_that_sends_several_requests_and_leaves(audio_server, wav):
    """Nothing is written to a connection that is closed: the fixture looks for tracebacks."""
    post = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(wav) + wav
    for _ in range(20):
        with connect(audio_server) as connection:
            connection.sendall((post + LIVE) * 5)
    assert audio_server.post("/predict", content=wav).status_code == 200


# Where a body ends

FRAMINGS = {
    "zeros before a length": (b"Content-Length: " + b"0" * 4400 + b"5", b"abcde", 400, True),
    "zeros alone": (b"Content-Length: " + b"0" * 4400, b"", 400, True),
    "space after a length": (b"Content-Length: 0 ", b"", 400, True),
    "more than 64 bits": (b"Content-Length: 18446744073709551621", b"abcde", 400, False),
    "64 bits": (b"Content-Length: 18446744073709551615", b"abcde", 413, None),
    "negative": (b"Content-Length: -1", b"abcde", 400, False),
    "no number": (b"Content-Length: abc", b"abcde", 400, False),
    "two lengths": (b"Content-Length: 5\r\nContent-Length: 6", b"abcde", 400, False),
    "length and chunks": (b"Content-Length: 5\r\nTransfer-Encoding: chunked", chunked(b"abcde"), 400, False),
    "another encoding": (b"Transfer-Encoding: gzip", chunked(b"abcde"), 400, False),
    "chunked twice": (b"Transfer-Encoding: chunked, gzip", chunked(b"abcde"), 400, False),
    "bytewise chunks": (b"Transfer-Encoding: chunked", b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n", 400, True),
    "trailers": (b"Transfer-Encoding: chunked", chunked(b"abcde")[:-2] + b"A: b\r\n\r\n", 400, True),
    "size that is none": (b"Transfer-Encoding: chunked", b"x\r\nabcde\r\n", 400, False),
    "size beyond 64 bits": (b"Transfer-Encoding: chunked", b"1" * 17 + b"\r\nabcde\r\n", 400, False),
    "chunk that is longer than its size": (b"Transfer-Encoding: chunked", b"3\r\nabcde\r\n0\r\n\r\n", 400, False),
}


@pytest.mark.parametrize(("header", "body", "status", "goes_on"), FRAMINGS.values(), ids=FRAMINGS)
def test_where_a_body_ends(audio_server, header, body, status, goes_on):
    """The next request of the connection is answered, or the connection is closed; never is a body a request."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n\r\n"
    if goes_on is None:  # the rest of the body may come
        with connect(audio_server) as connection:
            connection.sendall(head + body)
            assert STATUS.match(connection.recv(2**16))[1] == b"%d" % status
        return
    statuses, answer = exchange(audio_server, head + body, LAST)
    assert statuses == ([status, 200] if goes_on else [status])
    assert b"error" in answer
    assert audio_server.get("/livez").status_code == 200


def test_body_of_a_refused_request_is_no_request(audio_server):
    head = b"PUT /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(INNER)
    assert exchange(audio_server, head, INNER, LAST)[0] == [405, 200]


# Upgrades

OFFERS = {
    "curl": b"Accept: */*\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    "Java": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    b"Upgrade: h2c",
    "WebSocket": b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13",
    "several": b"Connection: upgrade\r\nUpgrade: a\r\nupgrade: b, c/1",
}  # fmt: skip


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_an_upgrade_is_ignored(audio_server, wav, offer, framing):
    """The body belongs to the request, also where it arrives later and looks like a request itself."""
    for body, status in ((wav, 200), (INNER, 400)):
        length = b"Content-Length: %d" % len(body) if framing == "length" else b"Transfer-Encoding: chunked"
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\n" + length + b"\r\n\r\n"
        sent = body if framing == "length" else chunked(body)
        for pieces in ((head + sent + LAST,), (head, sent[:30], sent[30:] + LAST), (LIVE + head + sent + LAST,)):
            statuses, answer = exchange(audio_server, *pieces)
            assert statuses == [200] * pieces[0].startswith(LIVE) + [status, 200]
            if body is wav:
                assert audio_server.post("/predict", content=wav).content in answer


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_an_upgrade_without_a_body(audio_server, offer):
    request = LIVE[:-2] + offer + b"\r\n\r\n"
    assert exchange(audio_server, request * 3 + LAST)[0] == [200] * 4
    head = b"GET /v2/models/smuggled HTTP/1.1\r\nHost: a\r\n" + offer + b"\r\n\r\n"
    assert exchange(audio_server, head, LAST)[0] == [404, 200]


def test_curl_that_offers_http2(audio_server, wav, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav)
    arguments = ["--http2", "-sS", "--data-binary", f"@{path}", f"{audio_server.url}/predict"]
    done = subprocess.run(["curl", *arguments, "--next", *arguments], capture_output=True, check=True)
    assert done.stdout.decode() == 2 * audio_server.post("/predict", content=wav).text


# Refusals while the client is still sending

EARLY = {
    "malformed form": (b"Content-Length: 33554432\r\nContent-Type: multipart/form-data; boundary=b", b"--x", 400),
    "too large": (b"Content-Length: 999999999", b"", 413),
    "malformed chunk": (b"Transfer-Encoding: chunked", b"xyz\r\n", 400),
    "too large a head": (b"X: " + b"a" * 2**17, b"", 431),
}


@pytest.mark.parametrize("keeps", [b"keep-alive", b"close"])
@pytest.mark.parametrize(("header", "start", "status"), EARLY.values(), ids=EARLY)
def test_an_early_refusal_reaches_a_client_that_reads_last(audio_server, header, start, status, keeps):
    """Bytes that nobody reads would make the kernel reset the connection, and the client would lose the answer."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: " + keeps + b"\r\n" + header + b"\r\n\r\n" + start
    with connect(audio_server) as connection:
        connection.sendall(head)
        for _ in range(32):
            connection.sendall(b"a" * MIB)
        connection.shutdown(socket.SHUT_WR)
        assert STATUS.match(rest(connection))[1] == b"%d" % status


def test_a_refused_client_that_never_stops_is_disconnected(monkeypatch):
    monkeypatch.setattr(bento, "LINGER_SECONDS", 0.5)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 400, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body"})

    with serving(app) as port, socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000 * PATIENCE:
                sent += connection.send(bytes(10))
                time.sleep(0.01)
    assert sent < 1000 * PATIENCE


# What is no request

NO_REQUESTS = {
    "bytes": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "tunnel": b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
    "address that is none": b"GET http://[/livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "path that isn't ASCII": b"GET /\xc3\xbc HTTP/1.1\r\nHost: a\r\n\r\n",
    "header without a name": b"GET /livez HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "NUL in a header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
}


@pytest.mark.parametrize("data", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_no_request(audio_server, data):
    statuses, answer = exchange(audio_server, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert statuses == [400]
    assert b"connection: close" in head
    assert "valid HTTP request" in json.loads(body)["error"]


def test_too_many_headers(audio_server):
    headers = b"a: b\r\n" * bento.MAX_HEADERS
    statuses, answer = exchange(audio_server, LIVE[:-2] + headers + b"\r\n")
    assert statuses == [431]
    assert b"256 headers" in answer
    assert exchange(audio_server, LAST[:-2] + headers[: -6 * 2] + b"\r\n")[0] == [200]


ODD = {
    "path": (b"GET /v2/models/%ff%00%ed%a0%80/ready?x=%ff%00&%ed%a0%80", b"", 404),
    "query": (b"POST /predict?top_k=%ed%a0%80", b"", 400),
    "absolute": (b"GET http://elsewhere/livez", b"", 200),
    "everything": (b"OPTIONS *", b"", 404),
    "id": (b"GET /livez", b"X-Request-Id: \xff\xfe", 200),
    "key": (b"GET /livez", b"Authorization: Bearer \xff", 200),
    "trace": (b"GET /v2", b"Traceparent: 00-\xff-\xff-01\r\nBaggage: \xff=%ff;", 200),
    "origin": (b"OPTIONS /predict", b"Origin: \xff\r\nAccess-Control-Request-Method: \xff", 405),
    "host": (b"GET /livez/", b"Host: [::\xff", 307),
    "long time": (b"POST /predict", b"Request-Timeout: 1e308", 400),
    "short time": (b"POST /predict", b"Request-Timeout: 1e-320", 504),
    "no time": (b"POST /predict", b"Request-Timeout: \xb2", 400),
    "time of many digits": (b"POST /predict", b"Request-Timeout: " + b"9" * 5000, 400),
    "type": (b"POST /predict", b"Content-Type: multipart/form-data; boundary=\xff", 400),
    "encoding": (b"POST /predict", b"Content-Encoding: \xff", 415),
}


@pytest.mark.parametrize(("line", "header", "status"), ODD.values(), ids=ODD)
def test_odd_values(audio_server, line, header, status):
    data = line + b" HTTP/1.1\r\nHost: a\r\n" + (header + b"\r\n" if header else b"") + b"\r\n"
    assert exchange(audio_server, data + LAST)[0] == [status, 200]


# Faults of our own, and clients that don't read

FAULTY = """
from avex_serve.service import AvexService
from avex_serve.service.http.app import Routes

find = Routes.find

def faulty(self, front, scope):
    if scope["path"] == "/fault":
        raise RuntimeError("fault of a layer")
    return find(self, front, scope)

Routes.find = faulty
"""


def test_a_fault_of_ours_is_answered_and_logged(tmp_path, audio_bundle):
    (tmp_path / "faulty.py").write_text(FAULTY)
    variables = {"cwd": tmp_path, "service": ("faulty:AvexService",), "AVEX_BUNDLE": str(audio_bundle)}
    answers = []

    def ask():
        with running_server(tmp_path / "server", **variables) as server:
            answers.append(exchange(server, LIVE.replace(b"livez", b"fault"), LAST))

    with pytest.raises(AssertionError, match="RuntimeError: fault of a layer"):  # the log has a traceback
        ask()
    ((statuses, answer),) = answers
    assert statuses == [500, 200]  # on one connection
    assert b'{"error":"unexpected error' in answer


@contextlib.contextmanager
def serving(app):
    """The port of a server with our protocol, in this process."""
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, http=bento.BoundedHttp, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("reads", [True, False])
def test_client_that_does_not_read_is_disconnected(monkeypatch, reads):
    monkeypatch.setattr(bento, "STALL_SECONDS", 0.3)
    size, sent = 40 * MIB, threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        for _ in range(40):
            await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
        await send({"type": "http.response.body"})
        sent.set()
        await asyncio.sleep(0)

    with serving(app) as port, socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(LIVE)
        received = 0
        if reads:  # slowly
            while received < size:
                received += len(connection.recv(MIB))
                time.sleep(0.02)
        else:
            assert sent.wait(PATIENCE)  # the application isn't held up
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(MIB):
                    received += len(piece)
        assert (received >= size) == reads
