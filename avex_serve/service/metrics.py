"""Prometheus metrics with bounded labels, for all workers together.

    avex_requests_total{transport, route, status}       status: 2xx, 4xx, 5xx of HTTP, the code's name of gRPC
    avex_request_duration_seconds{transport, route}
    avex_requests_in_progress{transport}
    avex_rejections_total{transport, status}            no key, too large, too slow, no place, too late
    avex_stage_duration_seconds{stage}                  decode, resample, queue, infer: the seconds of a request in
                                                        each, as `Timings.totals` counts them
    avex_stage_cpu_seconds_total{stage}                 what threads computed in each stage
    avex_batch_size                                     rows of each batch that was inferred
    avex_model_request_duration_seconds{model, version} of requests that a model worked for
    avex_audio_seconds_total{model, version}            audio that a model has processed
    avex_key_requests_total{key, status}                by the name of the API key
    avex_queue_depth                                    requests that wait for a slot
    avex_bundle_changes_total{change}                   bundles served, refused and removed since the start
    avex_model_info{name, version, format, device, digest}   1 for each model that is served

A route is a template or `other`, so that unknown paths don't make series. Workers share their series by files
in PROMETHEUS_MULTIPROC_DIR, which BentoML sets and clears. A new worker first removes the
requests of dead workers from those in progress. If the disk has no room for its files, a worker counts in its own
memory.
"""

import logging
import os
import socket
import threading
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from avex_serve.inference.engine import Engine
from avex_serve.inference.repository import CHANGES
from avex_serve.scheduling.request import STAGES, ModelName, Request

logger = logging.getLogger(__name__)

# From a few milliseconds for a small model to minutes for a recording of hours.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"
FILES: Final = ("counter", "histogram", "gauge_livesum")  # of each process
FILE_BYTES: Final = 2**20  # more than all series take
TRANSPORTS: Final = ("http", "grpc")
MODEL: Final = ("name", "version", "format", "device", "digest")
MAX_MODELS: Final = 100  # models and versions with series of their own; names come from bundles, and add up
OTHER: Final = "other"
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_SECONDS: Final = 10  # for a scrape's request to arrive
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
        cpu = Counter(
            "avex_stage_cpu_seconds", "Seconds that threads computed in each stage.", ["stage"], registry=registry
        )
        self._cpu = {stage: cpu.labels(stage) for stage in STAGES}
        self._batches = Histogram(
            "avex_batch_size", "Rows of a batch that was inferred.", buckets=ROWS, registry=registry
        )
        self._model_durations = Histogram(
            "avex_model_request_duration_seconds",
            "From the request to the end of its answer, for each model that worked for it.",
            ["model", "version"],
            buckets=SECONDS,
            registry=registry,
        )
        self._audio = Counter(
            "avex_audio_seconds", "Audio that a model has processed.", ["model", "version"], registry=registry
        )
        self._keys = Counter(
            "avex_key_requests", "Requests by the name of their API key.", ["key", "status"], registry=registry
        )
        self._queue_depth = Gauge(
            "avex_queue_depth", "Requests that wait for a slot.", multiprocess_mode="livesum", registry=registry
        )
        changes = Counter("avex_bundle_changes", "Bundles since the start.", ["change"], registry=registry)
        self._changes = {change: changes.labels(change) for change in CHANGES}
        self._noted = dict.fromkeys(CHANGES, 0)
        self._known: set[ModelName] = set()

    @contextmanager
    def in_progress(self, transport: str) -> Iterator[None]:
        """Count a request as in progress during the block."""
        with self._in_progress[transport].track_inprogress():
            yield

    def observe(
        self,
        transport: str,
        route: str,
        status: str,
        seconds: float,
        request: Request,
        stages: Mapping[str, float],
    ) -> None:
        """Count a request that was answered, with its seconds in each stage."""
        work = request.timings
        shown = f"{status[0]}xx" if status.isdecimal() else status
        self._requests.labels(transport, route, shown).inc()
        self._durations.labels(transport, route).observe(seconds)
        if status in REFUSALS:
            self._rejections.labels(transport, status).inc()
        for stage, part in stages.items():
            self._stages[stage].observe(part)
        for stage, part in work.cpu().items():
            self._cpu[stage].inc(part)
        for rows, count in Counts(work.batches).items():
            _observe(self._batches, rows, count)
        for model in set(work.models):
            self._model_durations.labels(*self._bounded(model)).observe(seconds)
        for model, part in work.audio:
            self._audio.labels(*self._bounded(model)).inc(part)
        if request.key:
            self._keys.labels(request.key, shown).inc()

    def note(self, waiting: int, changes: Mapping[str, int]) -> None:
        """Note the state of the worker, every now and then.

        Args:
            waiting: requests that wait for a slot.
            changes: of bundles since the start, by their kind.
        """
        self._queue_depth.set(waiting)
        for change, count in changes.items():
            self._changes[change].inc(count - self._noted[change])
            self._noted[change] = count

    def _bounded(self, model: ModelName) -> ModelName:
        """The model, or `OTHER` once there are too many."""
        if len(self._known) < MAX_MODELS:
            self._known.add(model)
        return model if model in self._known else ModelName(OTHER, OTHER)

    def text(self) -> bytes:
        """The metrics of all workers in Prometheus' text format."""
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            _Written(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry) + generate_latest(_Only(self._model_info()))

    def _model_info(self) -> Metric:
        family = GaugeMetricFamily("avex_model_info", "A model that is served.", labels=MODEL)
        with self._served() as engines:
            for engine in engines:
                manifest, backend = engine.manifest, engine.backend
                digest = engine.bundle.digest
                family.add_metric([manifest.name, manifest.version, backend.format, backend.device, digest], 1)
        return family


class MetricsServer:
    """Answers GET /metrics on a port of its own, without a key; the workers share the port by SO_REUSEPORT."""

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = SCRAPE_SECONDS

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                body = text() if found else b"only /metrics is here\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", METRICS_TYPE if found else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are not logged."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            allow_reuse_port = True
            server_bind = (
                TCPServer.server_bind
            )  # HTTPServer's asks DNS for the name of the host, which may take long

        self._server = Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="avex-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


def _observe(histogram: Histogram, value: float, count: int) -> None:
    """Observe a value that often, at once: a long recording has thousands of batches."""
    histogram._sum.inc(value * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(count)


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
            "%s has no room for %d bytes of metrics (%s): this worker's metrics are not shared with other workers; "
            "make room, and start the service again",
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


class _Written(MultiProcessCollector):
    """The metrics of all workers, without files that are still empty: a worker that starts has just made them."""

    def collect(self) -> Iterable[Metric]:
        files = []
        for path in Path(os.environ[SHARED]).glob("*.db"):
            with suppress(FileNotFoundError):  # of a worker that has just died
                if path.stat().st_size:
                    files.append(str(path))
        return self.merge(files, accumulate=True)  # type: ignore[no-untyped-call, no-any-return]


class _Only(CollectorRegistry):
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        yield self._metric
