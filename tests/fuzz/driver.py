"""Sends hostile inputs to a service, and keeps those that it doesn't stand.

An input is what a client sends on one connection, or a bundle in the folder of those that are served. The service
stands it if the connection is answered or closed in time, no answer blames the service for anything but overload,
its worker lives on and needs no more memory, its log and metrics hold nothing that the client wrote, and the next
honest request is answered rightly.
"""

import asyncio
import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from avex_serve import open_bundle
from tests import http2
from tests.bundles import make_audio_bundle, make_embedding_bundle
from tests.clients import Question, Worker
from tests.fuzz import bundles, documents, forms, frames, http, messages, recordings
from tests.service.conftest import RECORDINGS, running_server

CORPUS = Path(__file__).with_name("corpus")
BATCH = 500  # inputs between two honest requests
AT_ONCE = 100  # connections
QUIET_SECONDS = 0.3  # for what may be incomplete to be answered, before the client says that nothing more comes
END_SECONDS = 20  # for a connection to be answered and closed
MIB = 2**20
MAX_KEPT = 5  # inputs of a batch
GROWTH = 100 * MIB  # by which a worker may be larger than after the warm-up, pools and caches included
MAX_ROUTES = 40  # of metrics
FORGED = frames.FORGED.encode()
GRPC_STATUS = re.compile(rb"grpc-status[\x01\x02](\d+)")
FRAME_HEAD = 9  # bytes of a frame of HTTP/2 before its content
# UNKNOWN, ABORTED, INTERNAL, UNAVAILABLE, DATA_LOSS: they blame the service.
BLAMES = {b"2", b"10", b"13", b"14", b"15"}


class Kind(NamedTuple):
    """A kind of inputs."""

    generate: Callable[[random.Random], bytes]
    port: str  # of a server: the name of the attribute
    whole: bool  # whether each is one request whose end is clear, so that it must be answered


KINDS = {
    "http": Kind(http.connection, "http_port", False),
    "targets": Kind(http.target, "http_port", True),
    "recordings": Kind(recordings.request, "http_port", True),
    "forms": Kind(forms.request, "http_port", True),
    "documents": Kind(documents.request, "http_port", True),
    "frames": Kind(frames.connection, "grpc_port", False),
    "messages": Kind(messages.connection, "grpc_port", True),
    "bundles": Kind(bundles.damaged, "", True),
}


class Fault(AssertionError):
    """What a service didn't stand."""


class Siege:
    """A service that is sent hostile inputs."""

    def __init__(self, server, question, folder):
        self.server = server
        self._question = question
        self._bundle = folder / bundles.NAME
        self._worker = Worker(server)
        self._memory = 0
        self._read = 0  # bytes of the log

    def warm_up(self):
        """Send some inputs of each kind, and remember how much memory the worker needs from then on."""
        for name in KINDS:
            self.send(name, inputs(name, "warm", 100 if name != "bundles" else 10))
        self._memory = self._worker.memory

    def send(self, name, data):
        """Send inputs of a kind.

        Raises:
            Fault: with the files that keep the inputs that the service didn't stand.
        """
        data = list(data)
        for start in range(0, len(data), BATCH):
            batch = data[start : start + BATCH]
            faults = self._play(name, batch)
            if not faults and (fault := self.fault()):
                faults = self._culprits(name, batch) or {b"".join(batch): f"all of these together: {fault}"}
            if faults:
                few = list(faults.items())[:MAX_KEPT]
                lines = [f"{keep(name, culprit)}: {reason[:500]}" for culprit, reason in few]
                raise Fault("\n".join([f"{len(faults)} inputs", *lines]))

    def _culprits(self, name, batch):
        """Those of a batch that have the fault when they are sent alone."""
        found = {}
        for data in batch:
            faults = self._play(name, [data])
            if fault := next(iter(faults.values()), None) or self.fault():
                found[data] = fault
                if not self._lives():
                    break
        return found

    def _play(self, name, batch):
        """Send inputs at once; reasons of the faults by input."""
        if name == "bundles":
            return self._load(batch)
        return asyncio.run(_connect(KINDS[name], getattr(self.server, KINDS[name].port), batch))

    def _load(self, batch):
        faults = {}
        for data in batch:
            bundles.write(self._bundle, data)
            answer = self.server.post(f"/v2/repository/models/{bundles.NAME}/load")
            if answer.status_code >= 500:
                faults[data] = f"{answer.status_code} {answer.text[:200]}"
        return faults

    def _lives(self):
        with contextlib.suppress(Exception):
            return Worker(self.server).process == self._worker.process
        return False

    def fault(self):
        """What is wrong with the service, in words; None: nothing."""
        try:
            self._question.check(self.server)
            metrics = self.server.get("/metrics").text
        except Exception as error:  # noqa: BLE001 - the reason is reported
            return f"an honest request: {error!r}"
        if not self._lives():
            return "the worker has ended"
        if self._memory and (grown := self._worker.memory - self._memory) > GROWTH:
            return f"the worker has grown by {grown // MIB} MiB"
        with self.server.log_path.open("rb") as file:
            file.seek(self._read)
            log = file.read()
        self._read += len(log)
        if b"Traceback" in log or not log.isascii() or b"\n" + FORGED[:18] in log:
            return f"its log has a traceback, or text of clients as it came: {log[-1000:]}"
        counted = [line for line in metrics.splitlines() if line.startswith("avex_requests_total")]
        if bad := [line for line in counted if re.search(r'status="(INTERNAL|UNKNOWN|5(?!03|04|07)\d\d)"', line)]:
            return bad[0]
        if len({line.partition('route="')[2].partition('"')[0] for line in counted}) > MAX_ROUTES:
            return "its metrics have a series for each path"
        return None


@contextlib.contextmanager
def siege(folder, **variables):
    """A siege of a service that serves an audio bundle and an embedding bundle."""
    served = folder / "bundles"
    served.mkdir()
    make_embedding_bundle(served / "offline")
    bundle = make_audio_bundle(served / "tiny")
    with open_bundle(bundle) as engine:
        question = Question(RECORDINGS["stereo 44.1 kHz"], engine)
    variables = {"AVEX_QUEUE": "1000", "AVEX_MODEL_CONTROL": "explicit", "AVEX_RELOAD_SECONDS": "0", **variables}
    with running_server(folder / "server", AVEX_BUNDLE=str(served), **variables) as server:
        yield Siege(server, question, served)


def inputs(name, seed, count):
    """Inputs of a kind."""
    return (KINDS[name].generate(random.Random(f"{seed} {name} {number}")) for number in range(count))


def corpus(name):
    """The inputs of a kind that are kept."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def keep(name, data):
    """The file of the corpus that keeps an input."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# -- connections ----------------------------------------------------------------------------------------------------


async def _connect(kind, port, batch):
    """Send each input on a connection; reasons of the faults by input."""
    faults, left = {}, iter(batch)
    is_http = kind.port == "http_port"

    async def client():
        for data in left:
            try:
                answer = await _exchange(port, data, _http_is_over if is_http else _grpc_is_over, kind.whole)
                fault = (_http_fault if is_http else _grpc_fault)(data, answer, kind.whole)
            except TimeoutError:
                fault = f"not answered and closed within {END_SECONDS} s"
            except OSError as error:
                fault = f"no connection: {error!r}"
            if fault:
                faults[data] = fault

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(client())
    return faults


async def _exchange(port, data, is_over, whole):
    """What is answered before the client says that nothing more comes, if the connection is then closed in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        async with asyncio.timeout(END_SECONDS):
            with contextlib.suppress(OSError):  # the server has closed it
                writer.write(data)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if whole else QUIET_SECONDS):
                        while not is_over(data, answer, whole) and (piece := await reader.read(2**16)):
                            answer += piece
                writer.write_eof()
                while await reader.read(2**16):
                    pass
    finally:
        writer.transport.abort()
    return answer


def _http_is_over(data, answer, whole):
    return not whole and len(http.STATUS.findall(answer)) >= data.count(http.HOST)


def _http_fault(data, answer, whole):
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n") if whole else answer
    if not http.STATUS.match(answer) and (whole or (answer and not answer.startswith(b"HTTP/1.1 100 "))):
        return f"no answer: {answer[:200]}"
    for line in http.STATUS.finditer(answer):
        late = line[1] == b"504" and b"request-timeout" in data.lower()
        if int(line[1]) >= 500 and line[1] != b"503" and not late:
            return f"{answer[line.start() :][:1000]}"
    head, _, body = answer.partition(b"\r\n\r\n")
    if whole and body and b"content-type: application/json" in head:
        try:
            json.loads(body, parse_constant=_no_json)
        except ValueError as error:
            return f"no JSON: {error}, {body[:200]}"
    return None


def _no_json(name):
    raise ValueError(name)


def _grpc_is_over(_, answer, whole):
    """Whether the server has ended the only call of the connection."""
    at = 0
    while whole and at + FRAME_HEAD <= len(answer):
        kind, flags = answer[at + 3], answer[at + 4]
        if (kind == http2.HEADERS and flags & http2.END_STREAM) or kind == http2.RST_STREAM:
            return True
        at += FRAME_HEAD + int.from_bytes(answer[at : at + 3])
    return False


def _grpc_fault(_, answer, whole):
    """What is no HTTP/2 never reaches the service, and gRPC's own library may answer INTERNAL."""
    statuses = GRPC_STATUS.findall(answer)
    if whole and (not statuses or statuses[0] in BLAMES):
        return f"status {statuses}: {answer[-500:]}"
    return None
