"""Clients that know the right answer, and the vital signs of the worker that they ask."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import httpx
import numpy as np
import psutil
from tritonclient.grpc import service_pb2

from avex_serve.audio.reader import decode
from tests.answers import as_json

SERVICE = "inference.GRPCInferenceService"
PATIENCE = 60  # seconds until a request that hangs fails
# What came of a request; anything else is text that says what was wrong.
RIGHT = "right"
REFUSED = "refused"  # with a status that says to come again
LOST = "lost"  # the connection broke, or there was none


def until(find):
    """What is found in time; fails if nothing is."""
    end = time.monotonic() + PATIENCE
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


class Question:
    """A recording, and what engines in this process say of it: the service has one of them at a time."""

    def __init__(self, audio, *engines):
        self.audio = audio
        self.model = engines[0].manifest.name
        self.documents = [as_json(engine.predict(*decode(audio))) for engine in engines]
        self.scores = [engine.score(*decode(audio)).scores.tobytes() for engine in engines]

    def message(self):
        """The question over gRPC."""
        request = service_pb2.ModelInferRequest(model_name=self.model)
        request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
        request.outputs.add(name="scores")
        request.raw_input_contents.append(len(self.audio).to_bytes(4, "little") + self.audio)
        return request

    def over_http(self, client):
        """Ask with an httpx client; what came of it."""
        try:
            answer = client.post("/predict", params={"model": self.model}, content=self.audio)
        except httpx.TransportError:
            return LOST
        if answer.status_code == 503 and "retry-after" in answer.headers and "error" in answer.json():
            return REFUSED
        right = answer.status_code == 200 and answer.json() in self.documents
        return RIGHT if right else f"{answer.status_code} {answer.text[:200]}"

    def over_grpc(self, channel):
        """Ask over a gRPC channel; what came of it."""
        try:
            data = rpc(channel, "ModelInfer", self.message().SerializeToString())
        except grpc.RpcError as error:
            status, details = error.code().name, error.details()
            if status == "RESOURCE_EXHAUSTED" or (status == "UNAVAILABLE" and "shutting down" in details):
                return REFUSED
            return LOST if status == "UNAVAILABLE" else f"{status} {details[:200]}"
        answer = service_pb2.ModelInferResponse.FromString(data)
        return RIGHT if answer.raw_output_contents[0] in self.scores else "other scores over gRPC"

    def check(self, server):
        """Ask once over each transport, and be answered rightly."""
        assert self.over_http(server.client) == RIGHT
        with grpc.insecure_channel(server.grpc) as channel:
            assert self.over_grpc(channel) == RIGHT


def rpc(channel, method, data, service=SERVICE):
    """The answer to a unary call, both as bytes."""
    return channel.unary_unary(f"/{service}/{method}")(data, timeout=PATIENCE)


class Load:
    """What many clients got, half of them over HTTP and half over gRPC."""

    def __init__(self):
        self.outcomes = Counter()
        self.seconds = defaultdict(list)  # by outcome
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def note(self, outcome, seconds):
        with self._lock:
            self.outcomes[outcome] += 1
            self.seconds[outcome].append(seconds)

    @property
    def total(self):
        return self.outcomes.total()

    def percentile(self, outcome, percent):
        """Milliseconds in which so many percent of the requests had that outcome."""
        return 1000 * float(np.percentile(self.seconds[outcome], percent))


@contextmanager
def load(server, question, clients, rate=None):
    """Ask with so many clients at once while the block runs.

    Args:
        server: which one.
        question: the question.
        clients: how many.
        rate: requests a second of all together; None: each asks again as soon as it is answered.
    """
    result = Load()
    ticks = itertools.count()
    began = time.monotonic()

    def wait():
        if rate is not None:
            result.stop.wait(began + next(ticks) / rate - time.monotonic())

    def ask(index):
        with grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            while True:
                wait()
                if result.stop.is_set():
                    return
                start = time.monotonic()
                outcome = question.over_grpc(channel) if index % 2 else question.over_http(client)
                result.note(outcome, time.monotonic() - start)
                if outcome == LOST:
                    time.sleep(0.05)

    limits = httpx.Limits(max_connections=clients)
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE, limits=limits) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        asking = [pool.submit(ask, index) for index in range(clients)]
        try:
            yield result
        finally:
            result.stop.set()
    for future in asking:
        future.result()


class Worker:
    """The process that serves."""

    def __init__(self, server):
        self.process = workers(server)[0]

    @property
    def memory(self):
        """Resident bytes."""
        return self.process.memory_info().rss

    @property
    def files(self):
        """Open files and connections."""
        return self.process.num_fds()

    @property
    def threads(self):
        return self.process.num_threads()


def workers(server):
    """The processes that serve, of a `bentoml serve`; one that was killed doesn't count."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "_bentoml_impl.worker.service" in _command(child)]


def _command(process):
    try:
        return process.cmdline()
    except (psutil.ZombieProcess, psutil.NoSuchProcess):
        return []
