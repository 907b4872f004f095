"""HTTP/2: frames that are out of place, lie about themselves, or are damaged."""

import struct

from tests import http2
from tests.clients import SERVICE
from tests.fuzz import messages, mutations

FORGED = "2026-01-01 [ERROR] forged"
PATHS = (
    *(f"/{SERVICE}/{method}".encode() for method in ("ModelInfer", "ModelInfer", "ServerReady", "ModelMetadata")),
    *(b"/grpc.health.v1.Health/Check", b"/grpc.health.v1.Health/Watch", f"/{SERVICE}/ModelStreamInfer".encode()),
    *(
        b"/\xff",
        b"",
        b"/",
        b"x",
        b"/a/b",
        b"/" + b"x" * 3000,
        f"/x\n{FORGED}\n".encode(),
        "/\u202e\U0001f426".encode(),
    ),
)
METADATA = (
    (b"x-request-id", f"a\n{FORGED}".encode()),
    (b"x-text", b"\xff\xfe"),
    (b"x-\xff", b"a"),
    (b"x-bin", b"!!"),
    (b"authorization", b"Bearer \xff"),
    (b"grpc-timeout", b"99999999999999S"),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-timeout", b"10S"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"\xff"),
    (b"grpc-accept-encoding", b"x" * 500),
    (b"content-type", b"text/plain"),
    (b"traceparent", b"00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-01"),
    (b"te", b""),
    (b":path", b"/again"),
    (b"", b""),
    (b"x" * 2000, b"y" * 20000),
)


def connection(random):
    """What a client may send on one connection."""
    data = random.choice((http2.PREFACE,) * 9 + (b"", http2.PREFACE[:10], mutations.spoilt(random, http2.PREFACE)))
    for number in range(random.randrange(1, 5)):
        stream = random.choice((2 * number + 1,) * 8 + (0, 1, 2, 2**31 - 1))
        match random.randrange(8):
            case 0 | 1 | 2:
                more = random.sample(METADATA, random.choice((0, 1, 1, 2)))
                message = random.choice((b"", messages.message(random)))
                data += http2.call(stream, random.choice(PATHS), message, *more, compressed=random.random() < 0.1)
            case 3:
                block = http2.head(random.choice(PATHS)) + random.choice(
                    (b"", b"\x40\x01a\x01b" + b"\xbe" * random.randrange(9000))
                )
                flags = random.choice((0, 1, 4, 5, 8, 13, 0x20, 0x2D, 255))
                data += http2.frame(http2.HEADERS, flags, stream, block[: http2.MAX_FRAME])
            case 4:
                length = random.choice((0, 5, 2**16, 2**31, 2**32 - 1))
                body = bytes([random.choice((0, 1, 2, 255))]) + struct.pack(">I", length) + random.randbytes(5)
                data += http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.head(random.choice(PATHS)))
                data += http2.frame(http2.DATA, random.choice((0, 1, 8, 9)), stream, body)
            case 5:
                payload = struct.pack(">HI", random.randrange(10), random.choice((0, 1, 2**14, 2**31, 2**32 - 1)))
                data += http2.frame(http2.SETTINGS, random.choice((0, 1)), stream, payload * random.randrange(50))
            case 6:
                kind, payload = random.choice((
                    (http2.PING, bytes(8)), (http2.WINDOW_UPDATE, b"\x7f\xff\xff\xff"), (http2.RST_STREAM, bytes(4)),
                    (http2.CONTINUATION, http2.fields(METADATA[0])), (5, bytes(9)), (2, bytes(5)), (7, bytes(8)),
                ))  # fmt: skip
                data += http2.frame(kind, random.choice((0, 1, 4)), stream, payload) * random.choice((1, 1, 2, 100))
            case 7:
                data += http2.frame(random.randrange(256), random.randrange(256), stream, random.randbytes(20))
    return mutations.spoilt(random, data) if random.random() < 0.3 else data
