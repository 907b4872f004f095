"""Sends recordings to a server, over as many connections as it is told. See `worker.serve` for what is spoken.

python worker_client.py http|grpc PORT CONNECTIONS

It does little more than to send bytes and to wait, since it shares the cores with the server: answers stay
undecoded, and connections stay open during a turn.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from queue import SimpleQueue

import grpc
import numpy as np
from worker import serve

from avex_serve.service.grpc.messages import SERVICE, message_class

IDLE_SECONDS = 2.0  # while others have their turn; the server closes what has been idle for 5
Send = Callable[[np.ndarray], object]  # an encoded recording, (bytes,) uint8; raises unless it is answered


def http_connection(port: int) -> Send:
    """A connection that posts to ``/predict``."""
    connection = HTTPConnection("127.0.0.1", port)
    used = time.monotonic()

    def send(recording: np.ndarray) -> None:
        nonlocal used
        if time.monotonic() - used > IDLE_SECONDS:
            connection.close()  # the next request opens it again
        connection.request("POST", "/predict", body=memoryview(recording))
        answer = connection.getresponse()
        if answer.status != 200:
            raise ConnectionError(f"{answer.status}: {answer.read()!r}")
        answer.read()
        used = time.monotonic()

    return send


def grpc_connection(port: int) -> Send:
    """A connection that calls ``ModelInfer``."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # or channels to one address share a connection
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
    method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    (model,) = models(channel)

    def send(recording: np.ndarray) -> None:
        request = message_class("ModelInferRequest")(model_name=model)
        tensor = request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(recording.tobytes())
        request.outputs.add(name="scores")
        method(request.SerializeToString())

    return send


def models(channel: grpc.Channel) -> list[str]:
    """Names of what is served."""
    index = channel.unary_unary(f"/{SERVICE}/RepositoryIndex")
    answer = message_class("RepositoryIndexResponse").FromString(index(b""))
    return [model.name for model in answer.models]


def main(transport: str, port: int, connections: int) -> None:
    """Connect, and send."""
    connect = {"http": http_connection, "grpc": grpc_connection}[transport]
    idle: SimpleQueue[Send] = SimpleQueue()
    for _ in range(connections):
        idle.put(connect(port))
    pool = ThreadPoolExecutor(connections)

    def ask(recording: np.ndarray) -> None:
        send = idle.get()
        send(recording)
        idle.put(send)

    def answer(batch: np.ndarray) -> np.ndarray:
        return np.array(list(pool.map(ask, batch)))

    serve(answer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
