"""HTTP/2 by hand, for what no gRPC client sends."""

import contextlib
import socket
import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
MAX_FRAME = 2**14
REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"a"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def varint(number):
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def text(data):
    """A string of HPACK, uncompressed."""
    return (bytes([len(data)]) if len(data) < 127 else b"\x7f" + varint(len(data) - 127)) + data


def fields(*pairs):
    """A header block that the peer doesn't index."""
    return b"".join(b"\x10" + text(name) + text(value) for name, value in pairs)


def head(path, *more):
    """The header block of a gRPC call."""
    return fields((b":path", path), *REQUEST, *more)


def call(stream, path, message=b"", *more, compressed=False):
    """The frames of a whole call."""
    body = bytes([compressed]) + struct.pack(">I", len(message)) + message
    pieces = [body[start : start + MAX_FRAME] for start in range(0, len(body), MAX_FRAME)]
    return (
        frame(HEADERS, END_HEADERS, stream, head(path, *more))
        + b"".join(frame(DATA, 0, stream, piece) for piece in pieces)
        + frame(DATA, END_STREAM, stream)
    )


def send(port, *data, seconds=10):
    """Send the pieces on a connection; what comes back until the server closes it, which it does at the end."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection, contextlib.suppress(OSError):
        for piece in data:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(2**16):
            answer += piece
    return answer
