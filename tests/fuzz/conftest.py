"""A server that must stand whatever the tests here send."""

import random

import pytest

from avex_serve import open_bundle
from tests.clients import Question, Worker
from tests.fuzz import attacks
from tests.service.conftest import RECORDINGS, running_server

MEMORY_GROWTH = 1.3
POOLS = 8  # threads by which pools may still grow after the warm-up; thousands of requests would leak more
WARM_UP = 150  # hostile requests of each kind


@pytest.fixture(scope="session")
def question(audio_bundle):
    with open_bundle(audio_bundle) as engine:
        return Question(engine, RECORDINGS["stereo 44.1 kHz"])


@pytest.fixture(scope="session")
def besieged(tmp_path_factory, audio_bundle, question):
    """A server that the tests share; at the end its worker is the same, no larger, and has left nothing behind."""
    temporary = tmp_path_factory.mktemp("temporary")
    folder = tmp_path_factory.mktemp("besieged")
    with running_server(folder, AVEX_BUNDLE=str(audio_bundle), TMPDIR=str(temporary)) as server:
        worker = Worker(server)
        for attack in attacks.ATTACKS.values():
            attacks.run(server, question, attack, random.Random(f"warm {attack.__name__}"), WARM_UP)
        question.check(server)
        memory, files, threads = worker.memory, worker.files, worker.threads
        left = set(temporary.rglob("*"))
        yield server
        question.check(server)
        assert Worker(server).process == worker.process
        assert worker.memory <= MEMORY_GROWTH * memory
        assert worker.files <= files + 2  # connections that are closing
        assert worker.threads <= threads + POOLS
        assert set(temporary.rglob("*")) == left
