"""The worst traffic known of each kind of attack, and what it costs a service.

    python -m tests.fuzz.worst          measure each kind, and print the table of docs/securing.md

Each kind is one client. It runs against a service that nobody else asks.
"""

import argparse
import contextlib
import gzip
import json
import socket
import struct
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from avex_serve import open_bundle
from tests.bundles import make_audio_bundle
from tests.clients import Question, Worker
from tests.service.conftest import RECORDINGS, running_server

LIVE = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
MIB = 2**20
PAUSE = 0.005  # seconds between two looks at the memory
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, CONTINUATION, DATA, PING = 1, 4, 9, 0, 6
MODEL = "tiny"
PATH = f"/v2/models/{MODEL}/infer"
INFER = "/inference.GRPCInferenceService/ModelInfer"
CHECK = "/grpc.health.v1.Health/Check"


def send(port, data, times=1, seconds=10.0):
    """Send on one connection, reading along, until all is sent, the peer closes or time is over; bytes sent."""
    sent, end = 0, time.monotonic() + seconds
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
        reader = threading.Thread(target=read_all, args=(connection,))
        reader.start()
        with contextlib.suppress(OSError):
            for _ in range(times):
                connection.sendall(data)
                sent += len(data)
                if time.monotonic() > end:
                    break
            connection.shutdown(socket.SHUT_WR)
        reader.join(seconds)
    return sent


def read_all(connection):
    with contextlib.suppress(OSError):
        while connection.recv(2**16):
            pass


def post(server, path, body, headers=None, times=1, at_once=1):
    """Send requests; bytes sent."""

    def ask(_):
        with httpx.Client(base_url=server.url, timeout=120) as client, contextlib.suppress(httpx.TransportError):
            client.post(path, content=body, headers=headers)
        return len(body)

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(ask, range(times)))


# -- HTTP/2 by hand -------------------------------------------------------------------------------------------------


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(data):
    """An HPACK string without Huffman's code."""
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, number = b"", len(data) - 127
    while number > 127:
        rest, number = rest + bytes([number & 127 | 128]), number >> 7
    return b"\x7f" + rest + bytes([number]) + data


def head(path, *more):
    pairs = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"a"),
             (b"content-type", b"application/grpc"), (b"te", b"trailers"), *more]  # fmt: skip
    return b"".join(b"\x10" + literal(name) + literal(value) for name, value in pairs)


def call(stream, path, message=None, *more, flag=0):
    """The frames of a call, with a message or with none."""
    data = frame(HEADERS, 5 if message is None else 4, stream, head(path.encode("latin-1"), *more))
    if message is not None:
        body = bytes([flag]) + struct.pack(">I", len(message)) + message
        pieces = [body[at : at + 2**14] for at in range(0, len(body), 2**14)]
        data += b"".join(frame(DATA, int(piece is pieces[-1]), stream, piece) for piece in pieces)
    return data


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


# -- the kinds ------------------------------------------------------------------------------------------------------


def pipelined(server):
    """Thousands of requests on one connection, sent before the first is answered."""
    return send(server.http_port, LIVE * 2000, times=300)


def large_head(server):
    """A head of 200 MiB."""
    return send(server.http_port, b"GET / HTTP/1.1\r\nA: " + b"a" * MIB, times=200)


def content_length(server):
    """A length of 4,400 digits."""
    line = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"0" * 4400 + b"4\r\n\r\nabcd"
    return sum(send(server.http_port, line, seconds=5) for _ in range(20))


def chunks_of_a_byte(server):
    """A body of two million chunks of a byte each."""
    start = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return send(server.http_port, start + b"1\r\na\r\n" * 2_000_000)


def many_requests(server):
    """30,000 small requests, one after another."""
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda _: send(server.http_port, LIVE * 16, times=470), range(4)))


def upgrade(server):
    """Another request hidden in the body of one that offers an upgrade."""
    inner = b"GET /v2/models/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    line = b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
    return sum(send(server.http_port, line % len(inner) + inner, seconds=2) for _ in range(20))


def silent_uploads(server):
    """Twenty bodies of 10 MiB whose last byte never comes."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    sent = 0
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), 5))
            connection.sendall(head % (10 * MIB) + bytes(10 * MIB - 1))
            sent += 10 * MIB
        time.sleep(1)
    return sent


def form(server):
    """A form of 16 MiB that consists of beginnings of its boundary."""
    junk = b"\r\n--BOUNDAR" * (16 * MIB // 11)
    start = b'--BOUNDARY\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
    body = start + junk + b"\r\n--BOUNDARY--\r\n"
    return post(server, "/predict", body, {"Content-Type": "multipart/form-data; boundary=BOUNDARY"})


def json_of(server, data):
    tensor = {"name": "waveform", "shape": [1, 32000], "datatype": "FP32", "data": "DATA"}
    document = json.dumps({"inputs": [tensor]}).replace('"DATA"', data)
    return post(server, PATH, document.encode())


def json_numbers(server):
    """4 million numbers in JSON."""
    return json_of(server, "[" + ",".join(["1"] * (4 * MIB - 1000)) + "]")


def json_lists(server):
    """2 million lists of a number each, in JSON."""
    return json_of(server, "[" + ",".join(["[1]"] * (2 * MIB - 1000)) + "]")


def json_text_among_numbers(server):
    """A text of 4 MiB among 2 million numbers, in JSON."""
    return json_of(server, '["' + "a" * (4 * MIB) + '"' + ",0" * (2 * MIB - 1000) + "]")


def json_faults(server):
    """A list of 2.5 million empty inputs, in JSON."""
    return post(server, PATH, b'{"inputs":[' + b",".join([b"{}"] * (5 * MIB // 2)) + b"]}")


def json_nesting(server):
    """4 million lists in one another, in JSON."""
    return json_of(server, "[" * (4 * MIB - 1000) + "]" * (4 * MIB - 1000))


def json_parameters(server):
    """A parameter that is a list of 2.5 million lists, in JSON."""
    lists = b",".join([b"[]"] * (5 * MIB // 2))
    return post(server, PATH, b'{"inputs":[],"parameters":{"mine":[' + lists + b"]}}")


def binary_elements(server):
    """A binary tensor of 20 million recordings of a byte each."""
    tensor = {"name": "waveform", "shape": [20_000_000], "datatype": "BYTES"}
    raw = b"\1\0\0\0a" * 20_000_000
    tensor["parameters"] = {"binary_data_size": len(raw)}
    document = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))}
    return post(server, PATH, document + raw, headers)


def midi_dumps(server):
    """Files of a format that nobody asked for, 100 of them."""
    body = bytes.fromhex("f07e00010000184850020045580c1b553823100a31") + bytes(range(128)) * 25
    return post(server, "/predict", body, times=100)


def grpc_path(server):
    """Paths that are no text, 20 calls."""
    data = PREFACE + frame(SETTINGS, 0, 0) + call(1, "/\xff")
    return sum(send(server.grpc_port, data, seconds=1) for _ in range(20))


def grpc_methods(server):
    """2,000 methods that don't exist, with names of 3,000 bytes."""
    sent = 0
    for start in range(0, 2000, 100):
        frames = b"".join(call(2 * index + 1, f"/{start + index}" + "x" * 3000) for index in range(100))
        sent += send(server.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + frames, seconds=1)
    return sent


def grpc_compressed(server):
    """20 messages of 127 MiB, compressed to 130 kB each."""
    packed = gzip.compress(bytes(127 * MIB), 6)
    data = PREFACE + frame(SETTINGS, 0, 0) + call(1, CHECK, packed, (b"grpc-encoding", b"gzip"), flag=1)
    with ThreadPoolExecutor(10) as pool:
        return sum(pool.map(lambda _: send(server.grpc_port, data, seconds=5), range(20)))


def grpc_message(server, message):
    return send(server.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + call(1, INFER, message), seconds=10)


def grpc_inputs(server):
    """5 million empty inputs."""
    return grpc_message(server, field(1, MODEL.encode()) + b"*\0" * (5 * MIB))


def grpc_packed(server):
    """40 million packed integers."""
    contents = field(5, field(3, b"\1" * (40 * MIB)))
    return grpc_message(server, field(1, MODEL.encode()) + field(5, field(1, b"waveform") + contents))


def grpc_idle_calls(server):
    """5,000 calls that begin and send nothing."""
    frames = b"".join(frame(HEADERS, 4, 2 * index + 1, head(INFER.encode())) for index in range(5000))
    return send(server.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + frames, seconds=5)


def grpc_pings(server):
    """A million pings."""
    return send(server.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, bytes(8)) * 1000, times=1000)


def grpc_continuations(server):
    """A header block in 100,000 frames."""
    begin = frame(HEADERS, 0, 1, b"\x10" + literal(b"a") + literal(b"b"))
    more = frame(CONTINUATION, 0, 1, (b"\x10" + literal(b"a") + literal(b"b")) * 100)
    return send(server.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + begin + more * 1000, times=100)


KINDS = (
    pipelined, large_head, content_length, chunks_of_a_byte, many_requests, upgrade, silent_uploads, form,
    json_numbers, json_lists, json_text_among_numbers, json_faults, json_nesting, json_parameters, binary_elements,
    midi_dumps, grpc_path, grpc_methods, grpc_compressed, grpc_inputs, grpc_packed, grpc_idle_calls, grpc_pings,
    grpc_continuations,
)  # fmt: skip


@dataclass
class Cost:
    """What a kind of traffic cost."""

    kind: object
    sent: int  # bytes
    grown: int  # bytes of memory above idle, at the peak
    wait: float  # seconds, the longest of /livez


def measure(server, question, kind):
    """Run it, and ask honestly afterwards."""
    question.check(server)
    worker = Worker(server)
    idle, peak, wait, over = worker.memory, 0, 0.0, threading.Event()

    def watch_memory():
        nonlocal peak
        while not over.wait(PAUSE):
            peak = max(peak, worker.memory)

    def watch_live():
        nonlocal wait
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.wait(0.02):
                start = time.monotonic()
                assert client.get("/livez").status_code == 200
                wait = max(wait, time.monotonic() - start)

    with ThreadPoolExecutor(2) as pool:
        watching = [pool.submit(watch_memory), pool.submit(watch_live)]
        try:
            sent = kind(server)
        finally:
            over.set()
        for each in watching:
            each.result()
    question.check(server)
    assert Worker(server).process == worker.process
    return Cost(kind, sent, max(0, peak - idle), wait)


def table(costs):
    """The table of docs/securing.md."""
    lines = ["| what a client sends | sent | memory above idle | longest wait of `/livez` |", "|---|---|---|---|"]
    lines += [
        f"| {cost.kind.__doc__.rstrip('.')} | {cost.sent / MIB:.1f} MiB | {cost.grown / MIB:.0f} MiB "
        f"| {1000 * cost.wait:.0f} ms |"
        for cost in costs
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="names of kinds; all if there is none")
    names = parser.parse_args().kinds
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_audio_bundle(Path(folder) / "tiny")
        with open_bundle(bundle) as engine:
            question = Question(engine, RECORDINGS["stereo 44.1 kHz"])
        for kind in KINDS:
            if not names or kind.__name__ in names:
                with running_server(Path(folder) / kind.__name__, AVEX_BUNDLE=str(bundle)) as server:
                    costs.append(measure(server, question, kind))
                    print(costs[-1], flush=True)
    print(table(costs))


if __name__ == "__main__":
    main()
