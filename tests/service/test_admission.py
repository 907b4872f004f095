"""One admission limit for HTTP and gRPC, met by real clients; a recording that takes a minute is the load."""

import contextlib
import io
import socket
import threading
import time

import grpc
import httpx
import numpy as np
import pytest
import soundfile
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2

from tests.bundles import SAMPLE_RATE, WINDOW
from tests.clients import until
from tests.service.conftest import encode, running_server


def silence(frames):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(frames, np.float32), SAMPLE_RATE, format="FLAC")
    return file.getvalue()


PATIENCE = 30  # seconds until a test that hangs fails
SHORT = encode(0.1, SAMPLE_RATE, 1, "WAV")
LONG = silence(4000 * WINDOW)  # minutes of work in a small body
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def server(tmp_path_factory, slow_bundle):
    """One slot and two places in the queue."""
    with running_server(
        tmp_path_factory.mktemp("busy"), AVEX_BUNDLE=str(slow_bundle), AVEX_CONCURRENCY="1", AVEX_QUEUE="2"
    ) as server:
        yield server


def infer_request(audio):
    request = service_pb2.ModelInferRequest(model_name="slow")
    request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(len(audio).to_bytes(4, "little") + audio)
    return request.SerializeToString()


class Leaver:
    """A client that asks about a recording over HTTP and can leave before it hears the answer."""

    def __init__(self, server, audio=LONG):
        self._socket = socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE)
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(audio)}\r\n\r\n"
        self._socket.sendall(head.encode() + audio)

    def answered(self):
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return self._socket.recv(1000, socket.MSG_PEEK)
        return b""

    def leave(self):
        self._socket.close()


@contextlib.contextmanager
def load(server, clients=3):
    """So many long requests that are not answered."""
    leavers = [Leaver(server) for _ in range(clients)]
    try:
        yield leavers
    finally:
        for each in leavers:
            each.leave()


def refusal_under(server, clients, new_client=None):
    """The answer to one more; a client that was refused itself, since this one came before it, asks again."""
    new_client = new_client or (lambda: Leaver(server))

    def ask():
        for index, each in enumerate(clients):
            if each.answered():
                each.leave()
                clients[index] = new_client()
                time.sleep(0.2)  # it goes first
        answer = server.post("/predict", content=SHORT)
        return answer if answer.status_code == 503 else None

    return until(ask)


def all_places_are_free(server):
    """Three at once find their place."""
    answers = []

    def ask():
        answers.append(httpx.post(f"{server.url}/predict", content=SHORT, timeout=PATIENCE).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers == [200, 200, 200]


def test_beyond_the_queue_both_transports_refuse_at_once(server):
    with load(server) as leavers, grpc.insecure_channel(server.grpc) as channel:
        refusal = refusal_under(server, leavers)
        assert refusal.headers["retry-after"] == "1"
        assert refusal.json() == {"error": "the service is busy: 1 requests at work and 2 waiting; try again later"}

        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(infer_request(SHORT), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == refusal.json()["error"]

        # A body is not waited for.
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=PATIENCE) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(INFER)(never(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        for path in (
            "/livez",
            "/readyz",
            "/v2/health/live",
            "/v2/health/ready",
            "/v2",
            "/v2/models/slow",
            "/metrics",
        ):
            assert server.get(path).status_code == 200
        assert server.post("/v2/repository/index").json()[0]["name"] == "slow"
        assert server.post("/v2/repository/models/slow/load").status_code == 403
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        assert channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")(b"", timeout=PATIENCE)
    until(lambda: all_places_are_free(server))


def never():
    threading.Event().wait(PATIENCE)
    yield b""


CHECK = "/grpc.health.v1.Health/Check"
METADATA = "/inference.GRPCInferenceService/ModelMetadata"


@contextlib.contextmanager
def idle_calls(server, method, count):
    """So many calls whose clients send no message, each with a connection of its own."""
    with contextlib.ExitStack() as stack:
        left = threading.Event()

        def nothing():
            left.wait(2 * PATIENCE)
            yield from ()

        stack.callback(left.set)
        calls = []
        for _ in range(count):
            own = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(server.grpc, own))
            calls.append(channel.stream_unary(method).future(nothing(), timeout=2 * PATIENCE))
        yield calls


def test_idle_calls_hold_up_nobody(server):
    metadata = service_pb2.ModelMetadataRequest(name="slow").SerializeToString()
    good = {INFER: infer_request(SHORT), METADATA: metadata, CHECK: b""}
    idle = {INFER: 8, CHECK: 1}  # so many may be slow at once
    with contextlib.ExitStack() as stack:
        calls = {method: stack.enter_context(idle_calls(server, method, slow + 9)) for method, slow in idle.items()}
        channel = stack.enter_context(grpc.insecure_channel(server.grpc))
        for _ in range(2):
            for method, data in good.items():
                assert channel.unary_unary(method)(data, timeout=PATIENCE / 2)
            # Of those that idle on, only so many stay.
            for method, slow in idle.items():
                ended = until(lambda method=method, slow=slow: ended_calls(calls[method], len(calls[method]) - slow))
                assert {call.code() for call in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def ended_calls(calls, count):
    ended = [call for call in calls if call.done()]
    return ended if len(ended) >= count else None


class Caller:
    """As `Leaver`, over gRPC."""

    def __init__(self, channel):
        self._call = channel.unary_unary(INFER).future(infer_request(LONG))

    def answered(self):
        return self._call.done()

    def leave(self):
        self._call.cancel()


def test_calls_over_grpc_take_the_places_of_http(server):
    with grpc.insecure_channel(server.grpc) as channel:
        callers = [Caller(channel) for _ in range(3)]
        refusal_under(server, callers, lambda: Caller(channel))
        for each in callers:
            each.leave()
    until(lambda: all_places_are_free(server))


def test_short_requests_are_answered_while_a_long_one_is_at_work(server):
    with load(server, 1) as (long,), grpc.insecure_channel(server.grpc) as channel:
        for _ in range(2):
            assert server.post("/predict", content=SHORT).status_code == 200
            assert channel.unary_unary(INFER)(infer_request(SHORT), timeout=PATIENCE)
        assert long.answered() == b""


def test_clients_that_leave_free_their_places(server):
    with load(server) as leavers:
        refusal_under(server, leavers)
    until(lambda: all_places_are_free(server))


def test_deadline_of_the_client(server):
    answer = server.client.post("/predict", content=LONG, headers={"request-timeout": "0.3"})
    assert answer.status_code == 504
    assert "Request-Timeout" in answer.json()["error"]
    assert "AVEX_TIMEOUT_SECONDS" in answer.json()["error"]
    assert "not ready in time" in answer.json()["error"]
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(INFER)(infer_request(LONG), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: all_places_are_free(server))


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "nan", "inf", "1s"])
def test_time_limit_that_is_none(server, text):
    answer = server.client.post("/predict", content=SHORT, headers={"request-timeout": text})
    assert answer.status_code == 400
    assert "Request-Timeout is" in answer.json()["error"]


def test_time_limit_of_the_service(tmp_path, slow_bundle):
    with running_server(tmp_path, AVEX_BUNDLE=str(slow_bundle), AVEX_TIMEOUT_SECONDS="0.5") as server:
        assert server.post("/predict", content=LONG).status_code == 504
        answer = server.client.post("/predict", content=LONG, headers={"request-timeout": "20"})
        assert answer.status_code == 504
        with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(INFER)(infer_request(LONG), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "not ready in time" in caught.value.details()
        assert server.post("/predict", content=SHORT).status_code == 200
