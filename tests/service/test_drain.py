"""SIGTERM under load: what was accepted is answered, what comes later is refused, and it ends in time."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import psutil
import pytest
import tritonclient.grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from avex_serve.audio.reader import decode
from avex_serve.service.drain import CLOSING_SECONDS
from tests.answers import as_json
from tests.service.conftest import encode, running_server

LIMITS = {"AVEX_MAX_WINDOWS": "1000000"}
OVERLAP = 0.09  # a window every 10 ms: seconds of work


@pytest.fixture(scope="module")
def long():
    """A recording that takes a while."""
    return encode(120, 16000, 1, "WAV")


def in_progress(server):
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("avex_requests_in_progress"))


def wait_until_in_progress(server, count):
    deadline = time.monotonic() + 30
    while in_progress(server) < count + 1:  # the question itself is one
        assert time.monotonic() < deadline
        time.sleep(0.02)


def infer(server, recording, overlap=0.0):
    audio = tritonclient.grpc.InferInput("waveform", [1], "BYTES")
    audio.set_data_from_numpy(np.array([recording], dtype=np.object_))
    wanted = [tritonclient.grpc.InferRequestedOutput("scores")]
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer("tiny", [audio], outputs=wanted, parameters={"overlap": overlap})
        return answer.as_numpy("scores")


def predict(server, recording, **options):
    return httpx.post(f"{server.url}/predict", content=recording, params=options, timeout=60)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_accepted_is_answered(tmp_path, audio_bundle, audio_engine, long, wav, workers):
    (tmp_path / "bentoml.yml").write_text(f"services:\n  AvexService:\n    workers: {workers}\n")
    expected = as_json(audio_engine.predict(*decode(long), overlap=OVERLAP, top_k=1, threshold=0.6))
    expected_scores = audio_engine.score(*decode(long), overlap=OVERLAP).scores
    short = as_json(audio_engine.predict(*decode(wav)))
    outcomes = []
    over = threading.Event()

    def load_http(server):
        with httpx.Client(base_url=server.url, timeout=60) as client:  # one connection, kept alive
            while not over.is_set():
                try:
                    answer = client.post("/predict", content=wav)
                except httpx.ConnectError:
                    outcomes.append("no connection")
                    time.sleep(0.05)
                    continue
                right = answer.status_code == 200 and answer.json() == short
                outcomes.append("right" if right else answer.status_code)
                if not right:
                    time.sleep(0.05)

    def load_grpc(server):
        expected = audio_engine.score(*decode(wav)).scores
        while not over.is_set():
            try:
                np.testing.assert_array_equal(infer(server, wav), expected)
                outcomes.append("right")
            except tritonclient.grpc.InferenceServerException as error:
                outcomes.append(error.status())
                time.sleep(0.05)

    with (
        running_server(
            tmp_path, AVEX_BUNDLE=str(audio_bundle), BENTOML_CONFIG=str(tmp_path / "bentoml.yml"), **LIMITS
        ) as server,
        ThreadPoolExecutor(8) as pool,
        grpc.insecure_channel(server.grpc) as channel,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(over.set)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest())  # an open stream must not hold the end up
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        by_http = [pool.submit(predict, server, long, overlap=OVERLAP, top_k=1, threshold=0.6) for _ in range(2)]
        by_grpc = [pool.submit(infer, server, long, OVERLAP) for _ in range(2)]
        wait_until_in_progress(server, 4)
        loads = [pool.submit(load, server) for load in (load_http, load_http, load_grpc)]
        while "right" not in outcomes:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        if workers == 1:  # with two, the other one may have ended already
            for path in ("/readyz", "/v2/health/ready"):
                assert server.get(path).status_code == 503
            assert server.get("/livez").status_code == 200
            refused = predict(server, wav)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "shutting down" in refused.json()["error"]
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="UNAVAILABLE"):
                infer(server, wav)
        for future in by_http:
            assert future.result().json() == expected
        for future in by_grpc:
            np.testing.assert_array_equal(future.result(), expected_scores)
        assert server.process.wait(30) == 0
        over.set()
        for load in loads:
            load.result()
        with contextlib.suppress(grpc.RpcError):
            watch.cancel()
    assert set(outcomes) <= {"right", 503, "no connection", "StatusCode.UNAVAILABLE"}
    assert {"right", "StatusCode.UNAVAILABLE"} <= set(outcomes)


def test_no_connection_is_reset(tmp_path, audio_bundle, wav):
    """Each client is answered or refused at once, also one whose connection no worker accepts any more."""
    with (
        running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle)) as server,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(lives):
            """Answers until the connection is refused; any other error fails the test."""
            answers = []
            client = httpx.Client(timeout=30) if lives else httpx
            with contextlib.suppress(httpx.ConnectError):
                while True:
                    answers.append(client.post(f"{server.url}/predict", content=wav))
            return answers

        asking = [pool.submit(ask, lives) for lives in (False, False, True, True)]
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        answers = [answer for each in asking for answer in each.result()]
        assert server.process.wait(30) == 0
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503}
    assert {(answer.headers["retry-after"], answer.headers["connection"]) for answer in refused} == {("1", "close")}
    assert all("shutting down" in answer.json()["error"] for answer in refused)
    by_supervisor = [answer for answer in refused if "x-request-id" not in answer.headers]
    assert by_supervisor  # as each of them asks again within milliseconds, and the worker takes longer to end


def test_time_is_bounded(tmp_path, audio_bundle):
    endless = encode(1200, 16000, 1, "WAV")
    with (
        running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_DRAIN_SECONDS="0.5", **LIMITS) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        request = pool.submit(predict, server, endless, overlap=OVERLAP)
        wait_until_in_progress(server, 1)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            request.result()
        server.process.wait(30)
        assert "AVEX_DRAIN_SECONDS (0.5) are over: 1 requests are cut off" in server.log


ENDLESS = """
import asyncio, threading
from avex_serve.service.drain import Drain

async def main():
    drain = Drain(0.1)
    drain.on_signals(lambda: None)
    threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()
    print("ready", flush=True)
    await asyncio.sleep(0.5)

asyncio.run(main())
"""


def test_thread_that_never_ends():
    """Python waits for threads when it ends; the process is gone all the same."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(CLOSING_SECONDS + 10) == 1
        assert "in <listcomp>" in process.stderr.read()  # where the thread is


INTERRUPTED = """
import asyncio, signal
from contextvars import ContextVar
from avex_serve.service.drain import Drain

request = ContextVar("request", default="of no request")

async def handle():
    request.set("of a request")
    signal.raise_signal(signal.SIGTERM)  # Python handles it here

async def main():
    ended = asyncio.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    Drain(0.1).on_signals(lambda: print(request.get()))
    await asyncio.create_task(handle())
    await ended.wait()

asyncio.run(main())
"""


def test_signal_that_interrupts_a_request():
    """The log would show the line of the shutdown with the id of that request."""
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "of no request\n"


def test_worker_without_supervisor(tmp_path, audio_bundle):
    """Workers whose supervisor was killed end, too."""
    with running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_DRAIN_SECONDS="1") as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("_bentoml_impl.worker.service" in member.cmdline() for member in family)
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(family, 20)
        assert not alive
        assert "the supervisor of this worker has ended" in server.log


def test_supervisor_listens_on_the_ports_of_the_service_alone(audio_server):
    """BentoML's supervisor would run any command for whoever connects to its control port."""
    (process,) = [each for each in psutil.process_iter() if each.pid == audio_server.process.pid]
    listening = {c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {audio_server.http_port}
