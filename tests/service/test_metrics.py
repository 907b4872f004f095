"""Metrics of several processes, without a server."""

import os
import subprocess
import sys

WORKER = """
import contextlib, os, signal, sys
from avex_serve.service.metrics import Metrics

metrics = Metrics(lambda: contextlib.nullcontext([]))
with metrics.in_progress("http"), metrics.in_progress("grpc"):
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "wait":
        print("waiting", flush=True)
        sys.stdin.read()
print(metrics.text().decode())
"""


def worker(folder, task):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, task],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_requests_of_a_worker_that_died_are_not_in_progress(tmp_path):
    with worker(tmp_path, "die") as dead:
        assert dead.wait() < 0
    with worker(tmp_path, "wait") as living:
        assert living.stdout.readline() == "waiting\n"
        with worker(tmp_path, "answer") as another:
            lines = another.stdout.read().splitlines()
        living.stdin.close()
    for transport in ("http", "grpc"):
        assert f'avex_requests_in_progress{{transport="{transport}"}} 1.0' in lines


def test_a_worker_that_starts_has_an_empty_file(tmp_path):
    (tmp_path / "counter_1.db").touch()
    with worker(tmp_path, "answer") as another:
        assert 'avex_requests_in_progress{transport="http"} 0.0' in another.stdout.read()


FULL = """
import contextlib, os, resource
from avex_serve.scheduling.request import Request
from avex_serve.service.metrics import Metrics

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as if the disk were full
metrics = Metrics(lambda: contextlib.nullcontext([]))
for number in range(1000):
    metrics.observe("http", f"/{number}", "200", 0.1, Request(), {})
print(metrics.text().decode())
"""


def test_full_disk(tmp_path):
    """A worker goes on counting where its files have no room, and leaves nothing half written."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FULL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'avex_requests_total{route="/999",status="2xx",transport="http"} 1.0' in done.stdout
    assert "has no room for" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_room_is_reserved(tmp_path):
    """No page of the files is first written while requests run: the kernel would kill the worker on a full disk."""
    with worker(tmp_path, "wait") as living:
        assert living.stdout.readline() == "waiting\n"
        states = [file.stat() for file in tmp_path.iterdir()]
        living.stdin.close()
    assert states
    assert all(512 * state.st_blocks >= state.st_size for state in states)
