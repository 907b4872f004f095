"""`bentoml serve` on free ports of this machine, for as long as a block lasts."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from avex_serve.errors import AvexServeError

_START_SECONDS = 90  # that the server gets to come up
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A server that takes requests on 127.0.0.1."""

    http_port: int
    grpc_port: int
    pid: int  # of BentoML's supervisor, whose children answer
    log: Path


@contextlib.contextmanager
def running_server(bundle: Path, folder: Path, **variables: str) -> Iterator[Server]:
    """Serve a bundle on the CPU until the block ends.

    Args:
        bundle: what to serve.
        folder: for its log and BentoML's files.
        variables: more of the environment.

    Raises:
        AvexServeError: the server doesn't come up.
    """
    http_port, grpc_port = _free_ports(2)
    environment = {
        **os.environ,
        "AVEX_BUNDLE": str(bundle.resolve()),
        "AVEX_DEVICE": "cpu",  # the demo compares answers to the last bit
        "AVEX_GRPC_HOST": "127.0.0.1",
        "AVEX_GRPC_PORT": str(grpc_port),
        "BENTOML_HOME": str(folder / "bentoml"),  # two servers with one home disturb each other's metrics
        "BENTOML_DO_NOT_TRACK": "True",
        **variables,
    }
    command = [sys.executable, "-m", "bentoml", "serve", "avex_serve.service:AvexService"]
    command += ["--host", "127.0.0.1", "--port", str(http_port)]
    log = folder / "server.log"
    deadline = time.monotonic() + _START_SECONDS
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not _is_ready(http_port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AvexServeError(f"the server did not come up; its log:\n{log.read_text('utf-8', 'replace')}")
            time.sleep(0.1)
        yield Server(http_port, grpc_port, process.pid, log)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
