"""The BentoML service, which `bentoml serve` starts, and the parts of each of its workers.

The methods give BentoML its client and its API page, and can be called within the process. Over HTTP, the same paths
are answered by `avex_serve.service.http`.
"""

# mypy: disable-error-code="untyped-decorator,attr-defined"
# BentoML resolves its decorators lazily, so mypy sees no types of them.

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import bentoml
import msgspec
from anyio import to_thread

from avex_serve.audio.reader import Channel, open_audio
from avex_serve.audio.windows import FinalClip
from avex_serve.bundles.folders import check_any
from avex_serve.bundles.reading import read_manifest
from avex_serve.bundles.remote import Mirror, is_remote
from avex_serve.errors import AvexServeError, InputError, StorageError
from avex_serve.evidence.first import open_checked
from avex_serve.evidence.tuning import Setup, kept
from avex_serve.inference import pipeline
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import Classification, Embedding, MergeScore, Prediction, Predictions
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.cores import threads_of_worker
from avex_serve.scheduling.request import Limits, Memory
from avex_serve.service import bento, parsing
from avex_serve.service.credentials import Keys, check_https, server_credentials
from avex_serve.service.drain import Drain
from avex_serve.service.front import Front
from avex_serve.service.grpc.server import GrpcServer
from avex_serve.service.http.front import HttpFront
from avex_serve.service.metrics import Metrics, MetricsServer
from avex_serve.service.settings import DEMO_WARNING, Settings
from avex_serve.service.telemetry import Spans, Telemetry, configure_logs

logger = logging.getLogger(__name__)

ALL_INTERFACES: Final = {"0.0.0.0", "::"}
QUEUE_FACTOR: Final = 16  # waiting requests for each at work
ARENAS: Final = -8, 2  # M_ARENA_MAX of glibc: see `_keep_less_memory`
DISK_BYTES: Final = 2**16  # for what a start writes
CHECK_SECONDS: Final = 1.0  # between two looks at the background tasks


def _settings_at_import() -> Settings:
    """The settings, or their defaults where the environment's can't be used, which `AvexService.check` reports."""
    try:
        return Settings.from_environment()
    except InputError:
        as_json = os.environ.get("AVEX_LOG_FORMAT", "").lower() == "json"
        return Settings.from_environment({"AVEX_LOG_FORMAT": "json"} if as_json else {})


_at_import = _settings_at_import()
if bento.serves():  # at once, since BentoML logs while it makes the service
    configure_logs(_at_import.log_format, bento.share_log("avex_serve"), bento.worker())


# Metrics and the log of requests are ours: see docs/decisions/operation.md.
@bentoml.service(workers=_at_import.workers, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class AvexService:
    """Names the sounds in recordings, with the bundles that AVEX_BUNDLE points at."""

    _grpc: GrpcServer | None = None
    _watch: asyncio.Task[None] | None = None
    _metrics: MetricsServer | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings of this process."""
        return Settings.from_environment()

    @cached_property
    def front(self) -> Front:
        """The parts that requests share. They are made on first use: BentoML's supervisor needs none of them."""
        settings = self.settings
        threads = settings.threads or threads_of_worker(bento.workers(AvexService.name))
        slots = settings.concurrency or threads

        def open_engine(folder: Path) -> Engine:
            choice = _choose(folder, settings, threads)
            engine = open_checked(
                folder,
                choice.device,
                precision=choice.precision,
                threads=choice.threads,
                runtime=choice.runtime,
                mode=settings.check,
            )
            if settings.serves_demo:
                engine.warnings += (DEMO_WARNING,)
            return engine

        roots, fetch = _bundles(settings)
        fetch(True)  # again, for a worker that starts later; without the store it serves what is there
        repository = Repository(roots, open_engine, may_be_empty=settings.start_empty)
        metrics = Metrics(lambda: repository.lease_those(lambda _: True))
        return Front(
            settings=settings,
            repository=repository,
            keys=Keys.from_settings(settings),
            admission=Admission(slots, QUEUE_FACTOR * slots if settings.queue is None else settings.queue),
            limits=Limits(
                seconds=settings.max_seconds,
                clip_seconds=settings.max_clip_seconds,
                steps=settings.max_steps,
                decoded_bytes=settings.max_decoded_bytes,
                channels=settings.max_channels,
                windows=settings.max_windows,
                json_bytes=settings.max_json_bytes,
                answer_bytes=settings.max_answer_bytes,
            ),
            bodies=Memory(settings.max_held_bytes, "bodies"),
            answers=Memory(slots * settings.max_answer_bytes, "answers"),
            telemetry=Telemetry(metrics, Spans.configured(bento.tracer_provider)),
            drain=Drain(settings.drain_seconds),
        )

    async def __is_ready__(self) -> bool:
        """Readiness for BentoML's `/readyz`."""
        return self.front.ready()

    @bentoml.api
    def predict(
        self,
        audio: Path,
        threshold: float | dict[str, float] | None = None,
        top_k: int | None = None,
        label: list[str] | None = None,
        merge: float | None = None,
        merge_score: MergeScore = "max",
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        channel: Channel = "mix",
        probe: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Prediction:
        """Name the sounds in a recording (WAV, FLAC, OGG, MP3)."""
        query = Query(
            model=model,
            version=version,
            threshold=threshold,
            top_k=top_k,
            label=label,
            merge=merge,
            merge_score=merge_score,
            overlap=overlap,
            hop=hop,
            final_clip=final_clip,
            channel=channel,
            probe=probe,
        )
        return pipeline.predict(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def predict_all(
        self,
        audio: Path,
        threshold: float | dict[str, float] | None = None,
        top_k: int | None = None,
        label: list[str] | None = None,
        merge: float | None = None,
        merge_score: MergeScore = "max",
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        channel: Channel = "mix",
        model: str | None = None,
        version: str | None = None,
    ) -> Predictions:
        """Ask all heads of a bundle, and all that read its embeddings, in one pass of the backbone."""
        query = Query(
            model=model,
            version=version,
            threshold=threshold,
            top_k=top_k,
            label=label,
            merge=merge,
            merge_score=merge_score,
            overlap=overlap,
            hop=hop,
            final_clip=final_clip,
            channel=channel,
        )
        return pipeline.predict_all(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def embed(
        self,
        audio: Path,
        overlap: float = 0.0,
        hop: float | None = None,
        final_clip: FinalClip = "remainder",
        channel: Channel = "mix",
        output: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Embedding:
        """The embeddings of a recording, one a window."""
        query = Query(
            model=model,
            version=version,
            overlap=overlap,
            hop=hop,
            final_clip=final_clip,
            channel=channel,
            output=output,
        )
        return pipeline.embed(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def classify(
        self,
        embeddings: list[Any],
        threshold: float | dict[str, float] | None = None,
        top_k: int | None = None,
        probe: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Classification:
        """Ask the head about embeddings, (batch, dim) or (batch, time, dim); for embedding bundles."""
        array = parsing.from_numbers("embeddings", msgspec.Raw(msgspec.json.encode(embeddings)))
        query = Query(model=model, version=version, threshold=threshold, top_k=top_k, probe=probe)
        return pipeline.classify(self.front.repository, array, query)

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse bad settings, bundles, keys, certificates, and a port that is taken."""
        try:
            settings = Settings.from_environment()
            roots, fetch = _bundles(settings)
            fetch(settings.start_empty)
            if not settings.start_empty:
                check_any(roots)
            bento.check_names(AvexService.name)
            bento.http_configuration()
            bento.close_control_port()
            _check_workers(settings)
            _check_ports(settings)
            _check_disk()
            Keys.from_settings(settings)
            server_credentials(settings)
            check_https(bento.https_options())
        except AvexServeError as error:
            if _at_import.log_format == "json":
                logger.critical("can't start: %s", error)
                raise SystemExit(1) from None
            raise SystemExit(f"avex-serve: {error}") from None
        if settings.serves_demo:
            logger.warning("AVEX_BUNDLE is not set: %s", DEMO_WARNING)

    @bentoml.on_startup
    async def start(self) -> None:
        """In each worker: open the bundles, serve gRPC along with HTTP, and look for new bundles from then on."""
        settings = self.settings
        _keep_less_memory()
        # What the modules have made stays. A full collection would look through it, and stop the event loop for a
        # tenth of a second.
        gc.collect()
        gc.freeze()
        try:
            front = self.front
            self._grpc = await GrpcServer.start(front)
            if settings.metrics_port is not None:
                self._metrics = MetricsServer(
                    str(settings.metrics_host), settings.metrics_port, front.telemetry.metrics.text
                )
        except (AvexServeError, OSError) as error:
            logger.error("can't start: %s", error)
            # Starlette and uvicorn would each log the traceback of an exception.
            os._exit(bento.STARTUP_FAILED)
        front.drain.on_signals(self._grpc.announce_end)
        if bento.worker() is not None:
            front.drain.watch_supervisor()
        if settings.reload_seconds:
            front.repository.watch(settings.reload_seconds, partial(_bundles(settings)[1], True))
            front.alive.append(front.repository.is_watching)
        self._watch = asyncio.create_task(_look_after(front))
        other = "; to serve another bundle: AVEX_BUNDLE=dir bentoml serve avex_serve.service:AvexService"
        logger.info("gRPC listens on %s%s", settings.grpc_address, other if settings.serves_demo else "")

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End gRPC and the engines, after HTTP has ended."""
        if self._watch is not None:
            self._watch.cancel()
        if self._grpc is not None:
            await self._grpc.stop()
        if self._metrics is not None:
            await to_thread.run_sync(self._metrics.close)
        front = self.front
        front.admission.close()
        front.repository.close()
        await to_thread.run_sync(front.telemetry.close)


def _choose(folder: Path, settings: Settings, threads: int) -> Setup:
    """What runs a bundle: as set or, where all is left open, as ``avex-serve tune`` has found for this processor."""
    asked = Setup(settings.device, settings.precision, settings.runtime, threads)
    if {asked.device, asked.precision, asked.runtime} != {"auto"}:
        return asked
    tuned = kept(read_manifest(folder), settings.bundle_cache)
    if tuned is None:
        return asked
    tuned = msgspec.structs.replace(tuned, threads=settings.threads or min(tuned.threads, threads))
    logger.info("%s is served as avex-serve tune has found: %s", folder, tuned.settings())
    return tuned


def _bundles(settings: Settings) -> tuple[list[Path], Callable[[bool], None]]:
    """The folders to serve, and a function that fetches those of object stores.

    The function logs errors if its argument is true, and raises them if not.

    Raises:
        InputError: a URL that can't be used.
    """
    mirrors = {root: Mirror(root, settings.bundle_cache) for root in settings.bundle if is_remote(root)}
    logged: dict[str, str] = {}

    def fetch(tolerant: bool) -> None:
        for root, mirror in mirrors.items():
            try:
                mirror.refresh()
                logged.pop(root, None)
            except AvexServeError as error:
                if not tolerant:
                    raise
                if logged.get(root) != str(error):
                    logged[root] = str(error)
                    logger.error("%s", error)

    return [mirrors[root].folder if root in mirrors else Path(root) for root in settings.bundle], fetch


def _keep_less_memory() -> None:
    """Share freed memory between threads. By default glibc keeps it for each of them: up to twice what is in use."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(*ARENAS)


async def _look_after(front: Front) -> None:
    """Note the state of the worker, and end it in order once a background task has ended: BentoML replaces it."""
    while front.is_whole():
        front.telemetry.metrics.note(front.admission.waiting(), front.repository.changes)
        await asyncio.sleep(CHECK_SECONDS)
    logger.critical("a background task of this worker has ended; the worker ends, to be replaced")
    signal.raise_signal(signal.SIGTERM)


def _check_workers(settings: Settings) -> None:
    """Raise InputError for workers that are set twice, or that can't do what the settings say."""
    workers = bento.workers(AvexService.name)
    if "workers" in settings.model_fields_set and workers != settings.workers:
        raise InputError(
            f"AVEX_WORKERS is {settings.workers}, and BENTOML_CONFIG sets workers to {workers}; set one of the two"
        )
    if workers > 1 and settings.model_control == "explicit":
        raise InputError(
            f"AVEX_MODEL_CONTROL is explicit with {workers} workers, and loading reaches one of them; serve with "
            "one worker, or put bundles into the folders, where all workers find them"
        )


def _check_ports(settings: Settings) -> None:
    """Raise InputError if a port is taken, or set for two uses."""
    http = bento.http_address()
    uses = [("HTTP", *http, "choose another --port")]
    uses += [("gRPC", str(settings.grpc_host), settings.grpc_port, "set AVEX_GRPC_PORT or AVEX_GRPC_HOST")]
    if (port := settings.metrics_port) is not None:
        uses += [("metrics", str(settings.metrics_host), port, "set AVEX_METRICS_PORT or AVEX_METRICS_HOST")]
    for (first, *one), (second, *other) in combinations(uses, 2):
        hosts = {one[0], other[0]}
        if one[1] == other[1] and (len(hosts) == 1 or hosts & ALL_INTERFACES):
            raise InputError(
                f"AVEX_{second.upper()}_PORT is {other[1]}, on which {first} listens; set another one, or give "
                f"{first} another port"
            )
    for use, host, port, settings_of_it in uses:
        check_port_is_free(use, host, port, settings_of_it)


def check_port_is_free(use: str, host: str, port: int, remedy: str) -> None:
    """Raise InputError if the port is taken.

    Workers share the ports of gRPC and metrics by SO_REUSEPORT. A forgotten server would silently get a part of the
    requests. A socket without that option can't be bound to the same port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT are no server
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{use} can't listen on {address}: {error.strerror}; stop what listens there, or {remedy}"
            ) from None
        except OverflowError:
            raise InputError(f"{use} can't listen on port {port}; expected 1 to 65535: {remedy}") from None


def _check_disk() -> None:
    """Raise StorageError unless temporary files can be written: of sockets, and of large forms."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(DISK_BYTES))
    except OSError as error:
        raise StorageError(
            f"temporary files can't be written: {error.strerror}; make room, or set TMPDIR to a folder that can be"
        ) from None


bento.skip_unsent_spans()
bento.bound_connections()
bento.keep_no_timers()
AvexService.add_asgi_middleware(HttpFront, front=lambda: bentoml.get_current_service().front)
