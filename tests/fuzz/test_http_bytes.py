"""Bytes that are almost HTTP: each connection ends in time, no answer blames the service, and its memory stays."""

import asyncio
import contextlib
import itertools
import random
import re

from tests.clients import Worker
from tests.fuzz import mutations
from tests.fuzz.attacks import METHODS, PATHS
from tests.fuzz.test_fuzz import COUNT, SEED

INPUTS = 30 * COUNT  # 9000 by default
AT_ONCE = 50  # connections
ANSWER_SECONDS = 0.3  # for what may be incomplete to be answered, before the client sends no more
END_SECONDS = 10  # from then on, for the connection to be closed
GROWTH = 64 * 2**20  # bytes of the worker: allocators, not requests
# A status line of ours: text that an answer repeats has no line break.
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:date|content-type): ")

AUDIO = mutations.RECORDINGS[0]
NUMBERS = (
    b"0", b"1", b"00", b"0" * 4400 + b"4", b"-1", b"+4", b"4 ", b"4,4", b"4, 5", b"0x4", b"4_0", b"", b"\xb2",
    b"4\t", b"18446744073709551615", b"18446744073709551616", b"9" * 5000, b"1e3", b"nan", b"2147483648",
    b"134217729",
)  # fmt: skip
CODINGS = (
    b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"xchunked", b"identity", b"chunked\x0b", b"",
    b",", b" chunked", b"chunked;q=1",
)  # fmt: skip
CHUNK_SIZES = (
    b"0", b"1", b"5", b"ffffffffffffffff", b"10000000000000000", b"-1", b"0x5", b"5;a=b", b"5;" + b"a" * 300,
    b"000005", b"5 ", b"", b"g", b"5\n", b"5;\n", b"fffffff",
)  # fmt: skip
TARGETS = (
    b"*", b"//", b"/%", b"/%ff%00", b"/%ed%a0%80", b"/predict%0a", b"/predict?" + b"a&" * 3000,
    b"/predict?top_k=%ff%fe", b"/predict?top_k=1&top_k=2", b"http://a/livez", b"http://[/livez", b"http://\xff/",
    b"a:443", b"/\xff", b"/a b", b"", b"/predict#x", b"/../../etc/passwd", b"/v2/models/%2e%2e/config",
    b"/" + b"a" * 70_000, b"?", b"/v2/models/\x7f/ready", b"/livez/", b"/v2/models/" + b"%F0%9F%90%A6" * 50,
)  # fmt: skip
VERSIONS = (
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.2",
    b"HTTP/3",
    b"http/1.1",
    b"HTTP/1.1 ",
    b"",
    b"HTTP/1.10",
)
HEADERS = (
    b"Connection: close", b"Connection: keep-alive, close, upgrade", b"Connection: \xff", b"Expect: 100-continue",
    b"Expect: x", b"Host: b", b"Host: [::", b"Request-Timeout: 1e308", b"Request-Timeout: 1e-320",
    b"Request-Timeout: nan", b"Request-Timeout: " + b"9" * 5000, b"Request-Timeout: \xb2",
    b"Authorization: Bearer \xff", b"Authorization:", b"X-Request-Id: \xff\xfe", b"X-Request-Id: " + b"a" * 5000,
    b"Traceparent: 00-\xff-\xff-01", b"Baggage: a=\xff%ff;%", b"Origin: \xff\xff",
    b"Access-Control-Request-Method: \xff", b"Content-Type: \xff/\xff",
    b"Content-Type: multipart/form-data; boundary=\xff", b"Content-Encoding: \xff", b"Cookie: \xff",
    b"Inference-Header-Content-Length: " + b"9" * 5000, b"Inference-Header-Content-Length: \xb2",
    b"Range: bytes=\xff-", b"X: " + b"a" * 70_000, b"X:" + b" " * 60_000 + b"\x00", b"X: a\r\n folded",
    b"X: a\r\n\tfolded", b"X", b": x", b" X: a", b"X : a", b"X: \x00", b"X: a\rb", b"X: a\nY: b", b"\xff: a",
    b"X\x00: a", b"a" * 70_000 + b": b", b"Trailer: X", b"\r\n".join([b"a:"] * 300),
    b"\r\n".join([b"a: b"] * 15_000), b"Te: trailers", b"Sec-WebSocket-Version: 13",
)  # fmt: skip
UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\nSec-WebSocket-Version: 13",
    b"Connection: upgrade\r\nUpgrade: \xff",
    b"Connection: Upgrade\r\nUpgrade: a\r\nUPGRADE: b",
    b"Upgrade: websocket",
    b"Connection: upgrade",
)


def hostile_http(random):
    """What a client may send on one connection: requests of which some are malformed."""
    count = random.choice((1, 1, 1, 1, 2, 2, 3, 10, 40))
    data = b"".join(_request(random, hostile=random.random() < 0.6) for _ in range(count))
    if random.random() < 0.25:
        data = mutations.spoilt(random, data)
    return data


def _request(random, hostile):
    method, target = random.choice((*METHODS, *["POST", "GET"] * 7)).encode(), random.choice(PATHS).encode()
    version, headers, body = b"HTTP/1.1", [b"Host: a"], b""
    if method == b"POST" or random.random() < 0.2:
        body = random.choice(
            (AUDIO, AUDIO, b"", b"{}", b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", random.randbytes(500))
        )
    framing, body = _framed(random, body, hostile and random.random() < 0.4)
    headers += framing
    if hostile:
        match random.randrange(6):
            case 0:
                method = random.choice((b"CONNECT", b"PRI", b"get", b"", b"\xff", b"A" * 300, b"TRACE", b"QUERY"))
            case 1:
                target = random.choice(TARGETS)
            case 2:
                version = random.choice(VERSIONS)
            case 3:
                headers.insert(random.randrange(len(headers) + 1), random.choice(UPGRADES))
            case _:
                for _ in range(random.choice((1, 1, 2, 4))):
                    headers.insert(random.randrange(len(headers) + 1), random.choice(HEADERS))
    end = random.choice((b"\n", b"\r", b"\r\r\n")) if hostile and random.random() < 0.05 else b"\r\n"
    return end.join([b" ".join((method, target, version)), *headers, b"", body])


def _framed(random, body, hostile):
    """The headers that say where the body ends, and the body as it is sent."""
    length = b"Content-Length: %d" % len(body)
    if random.random() < 0.6 and not hostile:
        return [length] if body else [], body
    if not hostile:
        return [b"Transfer-Encoding: chunked"], _chunked(random, body)
    match random.randrange(6):
        case 0:
            return [b"Content-Length: " + random.choice(NUMBERS)], body
        case 1:
            return [length, b"Content-Length: " + random.choice(NUMBERS)], body
        case 2:
            return random.sample([length, b"Transfer-Encoding: " + random.choice(CODINGS)], 2), _chunked(
                random, body
            )
        case 3:
            return [b"Transfer-Encoding: " + random.choice(CODINGS)], _chunked(random, body)
        case 4:
            wrong = b"%b\r\n%b\r\n" % (random.choice(CHUNK_SIZES), body[:5])
            return [b"Transfer-Encoding: chunked"], wrong + _chunked(random, body)
        case _:
            trailers = random.choice(
                (b"X: a\r\n", b"X\r\n", b"Content-Length: 3\r\n", b"X: a\r\n" * 300, b"a" * 70_000)
            )
            return [b"Transfer-Encoding: chunked"], _chunked(random, body)[:-2] + trailers + b"\r\n"


def _chunked(random, body):
    size = random.choice((1, 7, 300, 4000))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def _answers(port, data):
    """What the service answers; fails unless it closes the connection in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        with contextlib.suppress(OSError):
            writer.write(data)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await writer.drain()
                    while len(STATUS.findall(answer)) < data.count(b"Host: a") and (
                        piece := await reader.read(2**16)
                    ):
                        answer += piece
            writer.write_eof()
            async with asyncio.timeout(END_SECONDS):
                while piece := await reader.read(2**16):
                    answer += piece
    finally:
        writer.transport.abort()
    return answer


def _check(data, answer):
    assert not answer or STATUS.match(answer) or answer.startswith(b"HTTP/1.1 100 "), answer[:500]
    for status in map(int, STATUS.findall(answer)):
        late = status == 504 and b"request-timeout" in data.lower()
        assert status < 500 or status == 503 or late, answer[:2000]


async def _send(port, numbers):
    async def client():
        for number in numbers:
            data = hostile_http(random.Random(f"{SEED} {number}"))
            try:
                _check(data, await _answers(port, data))
            except Exception as error:
                error.add_note(f"input {number}: {data[:3000]!r}")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(client())


def test_hostile_bytes(besieged, question):
    worker = Worker(besieged)
    numbers = iter(range(INPUTS))
    asyncio.run(_send(besieged.http_port, itertools.islice(numbers, INPUTS // 6)))  # to warm up
    question.check(besieged)
    memory = worker.memory
    asyncio.run(_send(besieged.http_port, numbers))
    question.check(besieged)
    assert worker.memory <= memory + GROWTH
    assert Worker(besieged).process == worker.process
