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
