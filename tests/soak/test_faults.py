"""What goes wrong around a service while it is asked: nothing that was accepted is answered wrongly."""

import contextlib
import shutil
import socket
import time

import httpx
import psutil
import pytest

from avex_serve import open_bundle
from tests.clients import LOST, RIGHT, Question, Worker, load, until, workers
from tests.service.conftest import encode, running_server

PATIENCE = 60  # seconds
RECORDING = encode(0.37, 44100, 2, "WAV")
SPOOLED = encode(20, 44100, 2, "WAV")  # a form's file of more than 1 MiB goes to a temporary file


@pytest.fixture(scope="module")
def question(audio_bundle):
    with open_bundle(audio_bundle) as engine:
        return Question(RECORDING, engine)


def test_worker_killed(tmp_path, audio_bundle, question):
    """BentoML starts another one within seconds; what was with the dead one is lost, and nothing else."""
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle)) as server:
        dead = Worker(server).process
        with load(server, question, 4) as result:
            until(lambda: result.outcomes[RIGHT])
            dead.kill()
            until(lambda: dead.pid not in [worker.pid for worker in workers(server)])
            before = result.outcomes[RIGHT]
            until(lambda: result.outcomes[RIGHT] > before + 10)
        assert set(result.outcomes) <= {RIGHT, LOST}
        question.check(server)
        assert f"process id {dead.pid} was ended by SIGKILL" in server.log
        until(lambda: 'avex_requests_in_progress{transport="http"} 1.0' in server.get("/metrics").text)  # the scrape


def test_worker_killed_in_a_container(tmp_path, audio_bundle):
    """There BentoML starts none: the container ends, for whoever watches over it to start another one."""
    with (
        contextlib.suppress(AssertionError),
        running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle), BENTOML_CONTAINERIZED="1") as server,
    ):
        Worker(server).process.kill()
        server.process.wait(PATIENCE)
    assert server.process.returncode == 1
    assert "no worker is left; the service ends" in server.log


def test_bundles_replaced_under_load(tmp_path, audio_bundle, question):
    """A half-copied bundle, then a whole one: the old one answers until the new one is whole."""
    folder = shutil.copytree(audio_bundle, tmp_path / "served")
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(folder), AVEX_RELOAD_SECONDS="0.1") as server:
        with load(server, question, 4) as result:
            for path in sorted(folder.iterdir()):
                content = path.read_bytes()
                path.write_bytes(content[: len(content) // 2])
                time.sleep(0.3)
                path.write_bytes(content)
                time.sleep(0.3)
            until(lambda: result.outcomes[RIGHT] > 20)
        assert set(result.outcomes) == {RIGHT}
        question.check(server)


def test_clients_that_leave(tmp_path, audio_bundle, question):
    """In the middle of an upload, of the work and of an answer."""
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {len(SPOOLED)}\r\n\r\n".encode()
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle)) as server:
        question.check(server)
        worker = Worker(server)
        files = worker.files
        with load(server, question, 2) as result:
            for sent in (10, len(head), len(head) + 1000, len(head) + len(SPOOLED)):
                for wait in (0, 0.05):
                    for _ in range(5):
                        with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
                            connection.sendall((head + SPOOLED)[:sent])
                            time.sleep(wait)
                            connection.setblocking(False)
                            with contextlib.suppress(BlockingIOError):
                                connection.recv(100)
        assert set(result.outcomes) == {RIGHT}
        until(lambda: worker.files <= files)
        assert Worker(server).process == worker.process


def test_disk_full(tmp_path, audio_bundle, question):
    """Uploads that have to go to a disk without room are refused, and nothing of them stays."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(audio_bundle), TMPDIR=str(temporary)) as server:
        worker = Worker(server)
        question.check(server)
        files = worker.files
        limits = worker.process.rlimit(psutil.RLIMIT_FSIZE)
        worker.process.rlimit(psutil.RLIMIT_FSIZE, (2**20, limits[1]))
        for _ in range(3):
            answer = httpx.post(f"{server.url}/predict", files={"audio": SPOOLED}, timeout=PATIENCE)
            assert answer.status_code == 507, answer.text
            assert "send the recording as the body" in answer.json()["error"]
        assert httpx.post(f"{server.url}/predict", content=SPOOLED, timeout=PATIENCE).status_code == 200
        question.check(server)
        worker.process.rlimit(psutil.RLIMIT_FSIZE, limits)
        assert httpx.post(f"{server.url}/predict", files={"audio": SPOOLED}, timeout=PATIENCE).status_code == 200
        until(lambda: worker.files <= files + 1)
