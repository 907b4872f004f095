"""The same run on a Ray cluster: its workers compute the recordings, and this process alone writes the store.

Every node needs avex-serve, the bundles and the recordings at the same paths; recordings may be in an object store.
"""

import functools
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from avex_serve.archive.plan import Job
from avex_serve.archive.run import Elsewhere, Run
from avex_serve.archive.store import Entry, Store
from avex_serve.errors import DependencyError, UnavailableError
from avex_serve.scheduling.cores import usable_cores

RETRIES: Final = 2  # of a recording whose worker process has ended, for whatever reason
AHEAD: Final = 32  # recordings that wait, besides two for each core of the cluster

Answer = tuple[bytes, dict[str, bytes]]  # the entry, as JSON, and the results by set


@contextmanager
def connected(job: Job) -> Iterator[Elsewhere]:
    """Join the cluster of this machine or of RAY_ADDRESS, or start one here; a function that computes recordings.

    Raises:
        DependencyError: Ray is not installed.
        UnavailableError: no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise DependencyError(
            "--engine ray needs ray, which is not installed; pip install 'avex-serve[ray]'"
        ) from None
    quiet = {"logging_level": "error", "log_to_driver": False}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except (ConnectionError, ray.exceptions.RayError) as error:
        if "RAY_ADDRESS" in os.environ:
            raise UnavailableError(f"the Ray cluster at RAY_ADDRESS doesn't answer: {error}") from None
        ray.init(address="local", num_cpus=usable_cores(), include_dashboard=False, **quiet)
    try:
        yield functools.partial(_compute_all, ray, msgspec.json.encode(job))
    finally:
        ray.shutdown()


def _compute_all(
    ray: Any, job: bytes, pending: Iterable[Entry]
) -> Generator[tuple[Entry, Mapping[str, bytes]], None, None]:
    # One core a task: what one core computes at a time is one recording, whatever the node.
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_compute)
    entries = iter(pending)
    waiting: dict[Any, Entry] = {}
    try:
        while True:
            most = AHEAD + 2 * int(ray.cluster_resources().get("CPU", 1))
            for entry in islice(entries, most - len(waiting)):
                waiting[task.remote(job, msgspec.json.encode(entry))] = entry
            if not waiting:
                return
            [done], _ = ray.wait(list(waiting), num_returns=1)
            yield _answer(ray, done, waiting.pop(done))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _answer(ray: Any, reference: Any, entry: Entry) -> tuple[Entry, Mapping[str, bytes]]:
    try:
        text, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:  # a recording that no worker survives
        reason = f"{entry.path}: its worker process ended {1 + RETRIES} times: {str(error).splitlines()[0]}"
        return msgspec.structs.replace(entry, error=reason), {}
    return msgspec.json.decode(text, type=Entry), files


# -- in the workers -------------------------------------------------------------------------------------------------


def _compute(job: bytes, entry: bytes) -> Answer:
    return _worker(job).compute(msgspec.json.decode(entry, type=Entry))


@functools.lru_cache(maxsize=1)
def _worker(job: bytes) -> "_Worker":
    """The bundles stay open from one recording to the next."""
    return _Worker(msgspec.json.decode(job, type=Job))


class _Worker:
    def __init__(self, job: Job) -> None:
        self._open = ExitStack()  # until the process ends
        self._passes = self._open.enter_context(job.opened(threads=1))
        self._sets = [results for each in self._passes for results in each.sets]

    def compute(self, entry: Entry) -> Answer:
        """Compute a recording in a store of its own, which is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="avex-") as folder, Store.writing(Path(folder) / "store") as store:
            store.use_sets(self._sets)
            entry = Run(store, self._passes).compute(entry)
            files = {}
            if entry.recording is not None and entry.error is None:
                files = {one.name: store.path(one, entry.recording).read_bytes() for one in self._sets}
            return msgspec.json.encode(entry), files
