"""A service that must stand whatever the tests here send."""

import pytest

from tests.clients import Worker
from tests.fuzz import driver

POOLS = 8  # threads by which pools may still grow after the warm-up; thousands of requests would leak more


@pytest.fixture(scope="session")
def besieged(tmp_path_factory):
    """A siege that the tests share; at the end its worker is the same and has left nothing behind."""
    temporary = tmp_path_factory.mktemp("temporary")
    with driver.siege(tmp_path_factory.mktemp("besieged"), TMPDIR=str(temporary)) as siege:
        siege.warm_up()
        worker = Worker(siege.server)
        files, threads = worker.files, worker.threads
        left = set(temporary.rglob("*"))
        yield siege
        assert worker.files <= files + 2  # connections that are closing
        assert worker.threads <= threads + POOLS
        assert set(temporary.rglob("*")) == left
