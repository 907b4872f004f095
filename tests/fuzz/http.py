"""HTTP: bytes that are almost requests, and requests of odd targets, options and headers."""

import re
from urllib.parse import quote

from tests.fuzz import mutations
from tests.fuzz.mutations import MODEL

# A status line of ours: text that an answer repeats has no line break.
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:date|content-type): ")
HOST = b"Host: a"  # one in each request

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
PATHS = (
    "/", "/livez", "/readyz", "/metrics", "/docs.json", "/v2", f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/config",
    f"/v2/models/{MODEL}/infer", f"/v2/models/{MODEL}/versions/1/infer", "/v2/repository/index", "/classify",
    f"/v2/repository/models/{MODEL}/load", f"/v2/models/{MODEL}/trace/setting", "/predict", "/embed", "/predict_all",
    "/schema.json", "/healthz", "/x", "/wav", "/tables",
    "/page/page.css", "/page/service/main.js", "/page/../x", f"/predict?model={MODEL}", f"/embed?model={MODEL}",
)  # fmt: skip
OPTIONS = (
    "threshold", "top_k", "overlap", "probe", "model", "version", "output", "audio", "x", "",
    "hop", "label", "merge", "merge_score", "format", "file", "timezone",
)  # fmt: skip
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
    b"a:443", b"/\xff", b"/a b", b"", b"/predict#x", b"/../../etc/passwd", b"/page/../../../etc/passwd",
    b"/page/%2e%2e/assets.py",
    b"/page//etc/passwd", b"/page/%00", b"/page/" + b"../" * 500, b"/v2/models/%2e%2e/config",
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


def connection(random):
    """What a client may send on one connection: requests of which some are malformed."""
    count = random.choice((1, 1, 1, 1, 2, 2, 3, 10, 40))
    data = b"".join(_request(random, hostile=random.random() < 0.6) for _ in range(count))
    if random.random() < 0.25:
        data = mutations.spoilt(random, data)
    return data


def _request(random, hostile):
    method, target = random.choice((*METHODS, *["POST", "GET"] * 7)).encode(), random.choice(PATHS).encode()
    version, headers, body = b"HTTP/1.1", [HOST], b""
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


def target(random):
    """A request with a damaged path, odd options and an odd header."""
    path = mutations.spoilt(random, random.choice(PATHS).encode()).lstrip(b"/")
    path = quote(path, safe=random.choice(("", "/", "/%")))
    line = f"{random.choice(METHODS)} /{path}{query(random)}".encode()
    body = random.choice((b"", b"", b"{}", AUDIO))
    odd = random.choice(HEADERS)
    return mutations.request(line, body, [tuple(odd.split(b": ", 1))] if odd.count(b": ") == 1 else [])


def query(random):
    """Options, as the query of a target."""
    pairs = [(random.choice(OPTIONS), str(random.choice(mutations.VALUES))) for _ in range(random.randrange(4))]
    if random.random() < 0.7:
        pairs.append(("model", MODEL))
    random.shuffle(pairs)
    return "?" + "&".join(f"{quote(name)}={quote(value, errors='replace')}" for name, value in pairs)
