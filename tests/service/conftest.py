"""Servers, started as a user starts them, and recordings to send."""

import contextlib
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bentoml
import httpx
import numpy as np
import pytest
import soundfile

from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from tests.answers import as_json
from tests.bundles import make_slow_bundle

START_SECONDS = 60
STOP_SECONDS = 30
SERVICE = "avex_serve.service:AvexService"
BENTOML = Path(sys.executable).with_name("bentoml")


@dataclass(frozen=True)
class Server:
    """A running server."""

    http_port: int
    grpc_port: int
    log_path: Path
    client: httpx.Client
    process: subprocess.Popen
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def post(self, path, **arguments):
        return self.client.post(path, **arguments)

    def get(self, path):
        return self.client.get(path)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def server_environment(home, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AVEX_", "BENTOML_"))}
    return {**kept, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", **variables}


def serve_command(http_port, *service):
    return [str(BENTOML), "serve", *service, "--host", "127.0.0.1", "--port", str(http_port)]


@contextlib.contextmanager
def running_server(folder, cwd=None, service=(SERVICE,), authority=None, status=200, **variables):
    """`bentoml serve` until the block ends; by then it must have logged no traceback.

    Where it serves HTTP over TLS, `authority` is the file of who signed its certificate. `status` is the status of
    its readiness when the block begins.
    """
    folder.mkdir(exist_ok=True)
    http_port, grpc_port = free_ports(2)
    scheme, verify = ("http", True) if authority is None else ("https", ssl.create_default_context(cafile=authority))
    client = httpx.Client(base_url=f"{scheme}://127.0.0.1:{http_port}", timeout=30, verify=verify)
    log_path = folder / "log.txt"
    environment = server_environment(
        folder / "home", AVEX_GRPC_HOST="127.0.0.1", AVEX_GRPC_PORT=str(grpc_port), **variables
    )
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            serve_command(http_port, *service),
            cwd=cwd or folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(http_port, grpc_port, log_path, client, process, environment)
    try:
        wait_until_ready(server, process, status)
        yield server
    finally:
        client.close()
        stop(process)
    assert "Traceback" not in server.log, server.log


@contextlib.contextmanager
def bento_client(server):
    """BentoML's own client."""
    with bentoml.SyncHTTPClient(server.url) as client:
        yield client
        client._temp_dir.cleanup()  # which closing forgets


def wait_until_ready(server, process, status=200):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if server.get("/readyz").status_code == status:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not come up:\n{server.log}")


def stop(process):
    """End the server as Ctrl+C does, and its process group if it doesn't listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def audio_server(tmp_path_factory, audio_bundle):
    """A server of the tiny audio bundle."""
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(audio_bundle)) as server:
        yield server


@pytest.fixture(scope="session")
def embedding_server(tmp_path_factory, embedding_bundle):
    """A server of the tiny embedding bundle."""
    with running_server(tmp_path_factory.mktemp("server"), AVEX_BUNDLE=str(embedding_bundle)) as server:
        yield server


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory):
    """Folder of a tiny audio bundle that takes tens of milliseconds a window."""
    return make_slow_bundle(tmp_path_factory.mktemp("bundles") / "slow")


@pytest.fixture(scope="session")
def audio_engine(audio_bundle):
    """The tiny audio bundle opened in this process: the oracle."""
    with open_bundle(audio_bundle) as engine:
        yield engine


@pytest.fixture(scope="session")
def embedding_engine(embedding_bundle):
    """The tiny embedding bundle opened in this process."""
    with open_bundle(embedding_bundle) as engine:
        yield engine


def encode(seconds, sample_rate, channels, container, seed=0):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (int(seconds * sample_rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), sample_rate, format=container)
    return file.getvalue()


RECORDINGS = {
    "one window": encode(0.1, 16000, 1, "WAV"),
    "short": encode(0.05, 16000, 1, "WAV"),
    "stereo 44.1 kHz": encode(0.37, 44100, 2, "WAV"),
    "flac 48 kHz": encode(0.5, 48000, 1, "FLAC"),
    "ogg 22.05 kHz": encode(0.5, 22050, 2, "OGG"),
}


@pytest.fixture(params=RECORDINGS.values(), ids=RECORDINGS)
def recording(request):
    """An encoded recording."""
    return request.param


@pytest.fixture(scope="session")
def wav():
    """A recording of several windows: stereo, 44.1 kHz."""
    return RECORDINGS["stereo 44.1 kHz"]


@pytest.fixture(scope="session")
def predict(audio_engine):
    """The oracle: encoded recording and options → the document of `/predict`."""
    return lambda audio, **options: as_json(audio_engine.predict(*decode(audio), **options))
