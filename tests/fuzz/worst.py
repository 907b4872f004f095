"""The worst traffic known of each kind of attack, and what it costs a service.

    python -m tests.fuzz.worst                              measure each kind, and print the table
    python -m tests.fuzz.worst --write docs/securing.md     and put it in place of the one there

Each kind runs against a service that nobody else asks, on an idle machine.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from avex_serve import open_bundle
from tests import http2
from tests.bundles import make_audio_bundle
from tests.clients import SERVICE, Question, Worker, rpc
from tests.service.conftest import RECORDINGS, running_server

LIVE = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
MIB = 2**20
PAUSE = 0.005  # seconds between two looks at the memory
MODEL = "tiny"
PATH = f"/v2/models/{MODEL}/infer"
INFER = f"/{SERVICE}/ModelInfer".encode()
CHECK = b"/grpc.health.v1.Health/Check"
BEGIN, END = "<!-- worst traffic -->", "<!-- end of worst traffic -->"


def send(port, data, times=1, seconds=10.0):
    """Send on one connection and read along, until the peer closes it or time is over; bytes sent."""
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
        reader.join(max(0, end - time.monotonic()))
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        reader.join()
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


def call(server, message, method="ModelInfer"):
    """Send a message as a client of gRPC does; bytes sent."""
    with grpc.insecure_channel(server.grpc) as channel, contextlib.suppress(grpc.RpcError):
        rpc(channel, method, message)
    return len(message)


def field(number, content):
    """A field of a protobuf message."""
    return http2.varint(number << 3 | 2) + http2.varint(len(content)) + content


# -- the kinds ------------------------------------------------------------------------------------------------------


def nothing(server):
    """Nothing, for 5 s: what the machine itself lets `/livez` wait."""
    time.sleep(5)
    return 0


def pipelined(server):
    """Thousands of requests on one connection, sent before the first is answered."""
    return send(server.http_port, LIVE * 2000, times=300)


def large_head(server):
    """A head of 200 MiB."""
    return send(server.http_port, b"GET / HTTP/1.1\r\nA: " + b"a" * MIB, times=200)


def content_length(server):
    """A length of 4,400 digits."""
    line = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"0" * 4400 + b"4\r\n\r\nabcd"
    return sum(send(server.http_port, line, seconds=0.5) for _ in range(20))


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
    return sum(send(server.http_port, line % len(inner) + inner, seconds=0.5) for _ in range(20))


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
    data = http2.PREFACE + http2.call(1, b"/\xff")
    return sum(send(server.grpc_port, data, seconds=0.5) for _ in range(20))


def grpc_methods(server):
    """2,000 methods that don't exist, with names of 3,000 bytes."""
    sent = 0
    for start in range(0, 2000, 100):
        frames = [http2.call(2 * index + 1, b"/%d" % (start + index) + b"x" * 3000) for index in range(100)]
        sent += send(server.grpc_port, http2.PREFACE + b"".join(frames), seconds=1)
    return sent


def grpc_compressed(server):
    """20 messages of 56 MiB, compressed to 57 kB each."""
    packed = gzip.compress(bytes(56 * MIB))
    data = http2.PREFACE + http2.call(1, CHECK, packed, (b"grpc-encoding", b"gzip"), compressed=True)
    with ThreadPoolExecutor(10) as pool:
        return sum(pool.map(lambda _: send(server.grpc_port, data, seconds=3), range(20)))


def grpc_inputs(server):
    """5 million empty inputs."""
    return call(server, field(1, MODEL.encode()) + b"*\0" * (5 * MIB))


def grpc_packed(server):
    """40 million packed integers."""
    contents = field(5, field(3, b"\1" * (40 * MIB)))
    return call(server, field(1, MODEL.encode()) + field(5, field(1, b"waveform") + contents))


def grpc_idle_calls(server):
    """5,000 calls that begin and send nothing."""
    block = http2.head(INFER)
    frames = [http2.frame(http2.HEADERS, http2.END_HEADERS, 2 * index + 1, block) for index in range(5000)]
    return send(server.grpc_port, http2.PREFACE + b"".join(frames), seconds=5)


def grpc_pings(server):
    """A million pings."""
    pings = http2.frame(http2.PING, 0, 0, bytes(8)) * 1000
    return send(server.grpc_port, http2.PREFACE + pings, times=1000)


def grpc_continuations(server):
    """A header block in 100,000 frames."""
    begin = http2.frame(http2.HEADERS, 0, 1, http2.fields((b"a", b"b")))
    more = http2.frame(http2.CONTINUATION, 0, 1, http2.fields((b"a", b"b")) * 100) * 1000
    return send(server.grpc_port, http2.PREFACE + begin + more, times=100)


KINDS = (
    nothing, pipelined, large_head, content_length, chunks_of_a_byte, many_requests, upgrade, silent_uploads, form,
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
    idle, peak, over = worker.memory, 0, threading.Event()

    def watch_memory():
        nonlocal peak
        while not over.wait(PAUSE):
            peak = max(peak, worker.memory)

    with ThreadPoolExecutor(1) as pool, pinging(server.url) as wait:
        watching = pool.submit(watch_memory)
        try:
            sent = kind(server)
        finally:
            over.set()
        watching.result()
    question.check(server)
    assert Worker(server).process == worker.process
    return Cost(kind, sent, max(0, peak - idle), wait.value)


@contextlib.contextmanager
def pinging(url):
    """The longest wait of `/livez` while the block runs, in seconds; asked by a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    longest, begun, over = context.Value("d", 0.0), context.Event(), context.Event()
    process = context.Process(target=_ping, args=(url, longest, begun, over))
    process.start()
    begun.wait()
    try:
        yield longest
    finally:
        over.set()
        process.join()
    assert process.exitcode == 0


def _ping(url, longest, begun, over):
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/livez")
        begun.set()
        while not over.wait(0.02):
            start = time.monotonic()
            assert client.get("/livez").status_code == 200
            longest.value = max(longest.value, time.monotonic() - start)


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
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    arguments = parser.parse_args()
    names = arguments.kinds
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_audio_bundle(Path(folder) / "tiny")
        with open_bundle(bundle) as engine:
            question = Question(RECORDINGS["stereo 44.1 kHz"], engine)
        for kind in KINDS:
            if not names or kind.__name__ in names:
                with running_server(Path(folder) / kind.__name__, AVEX_BUNDLE=str(bundle)) as server:
                    costs.append(measure(server, question, kind))
                    print(table(costs[-1:]).splitlines()[-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
    print(table(costs))
    if arguments.write is not None:
        page = arguments.write.read_text()
        new = f"{BEGIN}\n{table(costs)}\n{END}"
        arguments.write.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: new, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
