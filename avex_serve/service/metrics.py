"""Prometheus metrics with bounded labels, for all workers together.

    avex_requests_total{transport, route, status}       status: 2xx, 4xx, 5xx of HTTP, the code's name of gRPC
    avex_request_duration_seconds{transport, route}
    avex_requests_in_progress{transport}
    avex_rejections_total{transport, status}            no key, too large, too slow, no place, too late
    avex_stage_duration_seconds{stage}                  decode, resample, queue, infer: a request's total of each,
                                                        which is more than it took where threads ran side by side
    avex_batch_size                                     rows of each batch that was inferred
    avex_model_info{name, version, format, device}      1 for each model that is served

A route is a template or `other`, so that unknown paths don't make series. Workers share their series by files
in PROMETHEUS_MULTIPROC_DIR, which BentoML sets and clears. A new worker first removes the
requests of dead workers from those in progress. If the disk has no room for its files, a worker counts in its own
memory.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from avex_serve.inference.engine import Engine
from avex_serve.scheduling.request import STAGES, Timings

logger = logging.getLogger(__name__)

# From a few milliseconds for a small model to minutes for a recording of hours.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"
FILES: Final = ("counter", "histogram", "gauge_livesum")  # of each process
FILE_BYTES: Final = 2**20  # more than all series take
TRANSPORTS: Final = ("http", "grpc")
MODEL: Final = ("name", "version", "format", "device")
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
REFUSALS: Final = frozenset({
    *("401", "403", "408", "413", "429", "503", "504"),
    *("UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
})  # fmt: skip


class Metrics:
    """The metrics of this process, and those of all workers as text.

    `served` lends the engines in service each time that the metrics are read.
    """

    def __init__(self, served: Callable[[], AbstractContextManager[Iterable[Engine]]]) -> None:
        if directory := os.environ.get(SHARED):
            _forget_the_dead(Path(directory))
            _reserve_files(Path(directory))
        self._registry = registry = CollectorRegistry()
        self._served = served
        self._requests = Counter(
            "avex_requests", "Requests answered.", ["transport", "route", "status"], registry=registry
        )
        self._durations = Histogram(
            "avex_request_duration_seconds",
            "From the request to the end of its answer.",
            ["transport", "route"],
            buckets=SECONDS,
            registry=registry,
        )
        in_progress = Gauge(
            "avex_requests_in_progress",
            "Requests being answered.",
            ["transport"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._in_progress = {transport: in_progress.labels(transport) for transport in TRANSPORTS}
        self._rejections = Counter(
            "avex_rejections",
            "Requests refused or given up: no key, too large, too slow, no place, too late.",
            ["transport", "status"],
            registry=registry,
        )
        stages = Histogram(
            "avex_stage_duration_seconds",
            "Seconds of a request in each stage.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        self._batches = Histogram(
            "avex_batch_size", "Rows of a batch that was inferred.", buckets=ROWS, registry=registry
        )

    @contextmanager
    def in_progress(self, transport: str) -> Iterator[None]:
        """Count a request as in progress during the block."""
        with self._in_progress[transport].track_inprogress():
            yield

    def observe(self, transport: str, route: str, status: str, seconds: float, work: Timings) -> None:
        """Count a request that was answered."""
        shown = f"{status[0]}xx" if status.isdecimal() else status
        self._requests.labels(transport, route, shown).inc()
        self._durations.labels(transport, route).observe(seconds)
        if status in REFUSALS:
            self._rejections.labels(transport, status).inc()
        for stage, part in work.totals().items():
            self._stages[stage].observe(part)
        for rows in work.batches:
            self._batches.observe(rows)

    def text(self) -> bytes:
        """The metrics of all workers in Prometheus' text format."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry) + generate_latest(_Only(self._model_info()))

    def _model_info(self) -> Metric:
        family = GaugeMetricFamily("avex_model_info", "A model that is served.", labels=MODEL)
        with self._served() as engines:
            for engine in engines:
                manifest, backend = engine.manifest, engine.backend
                family.add_metric([manifest.name, manifest.version, backend.format, backend.device], 1)
        return family


def _reserve_files(directory: Path) -> None:
    """Reserve room on disk for the series of this process; if there is none, keep them in memory.

    Prometheus' library maps its files into memory and doesn't write them first. The kernel would kill a process
    that adds a series while the disk is full.
    """
    files = [directory / f"{kind}_{os.getpid()}.db" for kind in FILES]
    try:
        for file in files:
            with file.open("ab") as stream:
                stream.write(bytes(FILE_BYTES - stream.tell()))
    except OSError as error:
        logger.warning(
            "%s has no room for %d bytes of metrics (%s): this worker's metrics are not shared with other workers",
            directory,
            FILE_BYTES * len(FILES),
            error.strerror,
        )
        for file in files:
            file.unlink(missing_ok=True)
        values.ValueClass = values.MutexValue
        del os.environ[SHARED]


def _forget_the_dead(directory: Path) -> None:
    """Remove the requests of dead workers from the gauges."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except OSError:  # no such process, or by now another user's
            with suppress(FileNotFoundError):  # another worker, which starts at the same time, was faster
                mark_process_dead(pid)  # type: ignore[no-untyped-call]


class _Only(CollectorRegistry):
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        yield self._metric
