"""Fixtures that every part uses."""

import functools
import hashlib
import os
import signal
import warnings
from pathlib import Path

import filelock
import pytest

from tests.browsing import launched
from tests.bundles import make_audio_bundle, make_embedding_bundle

# Tests run side by side, a process for each core: threads inside of one would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has what it starts in the background ignore Ctrl-C, and so would each program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

with warnings.catch_warnings():
    # BentoML itself uses what pydantic and pathspec call deprecated, when it is imported and a service is defined.
    warnings.simplefilter("ignore", DeprecationWarning)
    import avex_serve.service.worker  # noqa: F401


def pytest_collection_modifyitems(items):
    """Mark the tests in slow.txt, in which the times of all tests are seen together."""
    slow = set(Path(__file__).with_name("slow.txt").read_text().splitlines())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Folders that are made once for all tests and processes of a run: `made_once(key, make)`.

    ``make(folder)`` creates the folder of the key, unless another test has done so. Tests only read it.
    """
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each process has its own folder within that of the run.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    root.mkdir(exist_ok=True)

    def folder(key, make):
        path = root / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.exists():
                unfinished = path.with_suffix(".unfinished")
                make(unfinished)
                unfinished.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def one_operator_table():
    """Let torch build its table of ONNX operators once a process. It does so in each export, for a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def audio_bundle(tmp_path_factory):
    """Folder of a tiny bundle that takes audio."""
    return make_audio_bundle(tmp_path_factory.mktemp("bundles") / "audio")


@pytest.fixture(scope="session")
def embedding_bundle(tmp_path_factory):
    """Folder of a tiny bundle that takes embeddings."""
    return make_embedding_bundle(tmp_path_factory.mktemp("bundles") / "embedding")


@pytest.fixture(scope="module")
def browser():
    """Chromium. While it runs, playwright's event loop does too, and `asyncio.run` can't be called."""
    with launched() as browser:
        yield browser
