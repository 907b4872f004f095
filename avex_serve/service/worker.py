"""The BentoML service, which `bentoml serve` starts, and the parts of each of its workers.

The methods give BentoML its client and its API page, and can be called within the process. Over HTTP, the same paths
are answered by `avex_serve.service.http`.
"""

# mypy: disable-error-code="untyped-decorator,attr-defined"
# BentoML resolves its decorators lazily, so mypy sees no types of them.

import asyncio
import ctypes
import logging
import os
import signal
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import bentoml
import msgspec
from anyio import to_thread

from avex_serve.audio.reader import Channel, open_audio
from avex_serve.audio.windows import FinalClip
from avex_serve.bundles.folders import check_any
from avex_serve.errors import AvexServeError, InputError
from avex_serve.inference import pipeline
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine
from avex_serve.inference.pipeline import Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import Classification, Embedding, Prediction, Predictions
from avex_serve.scheduling.admission import Admission
from avex_serve.scheduling.cores import threads_of_worker
from avex_serve.scheduling.request import Limits, Memory
from avex_serve.service import bento, parsing
from avex_serve.service.credentials import Keys, server_credentials
from avex_serve.service.drain import Drain
from avex_serve.service.front import Front, HttpFront
from avex_serve.service.grpc.server import GrpcServer, check_port_is_free
from avex_serve.service.http.app import Routes
from avex_serve.service.metrics import Metrics
from avex_serve.service.settings import Settings
from avex_serve.service.telemetry import Spans, Telemetry, configure_logs

logger = logging.getLogger(__name__)

ALL_INTERFACES: Final = {"0.0.0.0", "::"}
QUEUE_FACTOR: Final = 16  # waiting requests for each at work
ARENAS: Final = -8, 2  # M_ARENA_MAX of glibc: see `_keep_less_memory`
CHECK_SECONDS: Final = 1.0  # between two looks at the background tasks
STARTUP_FAILED: Final = 3  # exit code, uvicorn's for this case


# Metrics and the log of requests are ours: see docs/decisions/operation.md.
@bentoml.service(metrics={"enabled": False}, logging={"access": {"enabled": False}})
class AvexService:
    """Names the sounds in recordings, with the bundles that AVEX_BUNDLE points at."""

    _grpc: GrpcServer | None = None
    _watch: asyncio.Task[None] | None = None

    def __init__(self) -> None:
        if bentoml.server_context.worker_index is not None:  # in BentoML's server, not in another program
            configure_logs(self.settings.log_format, bento.share_log("avex_serve"))

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
            return open_bundle(folder, settings.device, precision=settings.precision, threads=threads)

        repository = Repository(settings.bundle, open_engine)
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
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
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
            overlap=overlap,
            final_clip=final_clip,
            channel=channel,
            probe=probe,
        )
        return pipeline.predict(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def predict_all(
        self,
        audio: Path,
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
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
            overlap=overlap,
            final_clip=final_clip,
            channel=channel,
        )
        return pipeline.predict_all(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def embed(
        self,
        audio: Path,
        overlap: float = 0.0,
        final_clip: FinalClip = "remainder",
        channel: Channel = "mix",
        output: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Embedding:
        """The embeddings of a recording, one a window."""
        query = Query(
            model=model, version=version, overlap=overlap, final_clip=final_clip, channel=channel, output=output
        )
        return pipeline.embed(self.front.repository, partial(open_audio, audio), query)

    @bentoml.api
    def classify(
        self,
        embeddings: list[Any],
        threshold: float | None = None,
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
        """Before any worker starts: refuse bad settings, folders without a whole bundle and a port that is taken."""
        try:
            settings = Settings.from_environment()
            configure_logs(settings.log_format, bento.share_log("avex_serve"))
            check_any(settings.bundle)
            bento.http_configuration()
            bento.close_control_port()
            _check_ports_differ(settings)
            check_port_is_free(settings)
            Keys.from_settings(settings)
            server_credentials(settings)
        except AvexServeError as error:
            raise SystemExit(f"avex-serve: {error}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """In each worker: open the bundles, serve gRPC along with HTTP, and look for new bundles from then on."""
        settings = self.settings
        _keep_less_memory()
        try:
            front = self.front
            self._grpc = await GrpcServer.start(front)
        except AvexServeError as error:
            logger.error("can't start: %s", error)
            # Starlette and uvicorn would each log the traceback of an exception.
            os._exit(STARTUP_FAILED)
        front.drain.on_signals(self._grpc.announce_end)
        if bentoml.server_context.worker_index is not None:
            front.drain.watch_supervisor()
        if settings.reload_seconds:
            front.repository.watch(settings.reload_seconds)
            front.alive.append(front.repository.is_watching)
        self._watch = asyncio.create_task(_end_when_broken(front))
        logger.info(
            "gRPC listens on %s; to serve another bundle: "
            "AVEX_BUNDLE=dir bentoml serve avex_serve.service:AvexService",
            settings.grpc_address,
        )

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End gRPC and the engines, after HTTP has ended."""
        if self._watch is not None:
            self._watch.cancel()
        if self._grpc is not None:
            await self._grpc.stop()
        front = self.front
        front.admission.close()
        front.repository.close()
        await to_thread.run_sync(front.telemetry.close)


def _keep_less_memory() -> None:
    """Share freed memory between threads. By default glibc keeps it for each of them: up to twice what is in use."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(*ARENAS)


async def _end_when_broken(front: Front) -> None:
    """End the worker in order once one of its background tasks has ended, so that BentoML starts another worker."""
    while front.is_whole():
        await asyncio.sleep(CHECK_SECONDS)
    logger.critical("a background task of this worker has ended; the worker ends, to be replaced")
    signal.raise_signal(signal.SIGTERM)


def _check_ports_differ(settings: Settings) -> None:
    """Raise InputError if gRPC and HTTP are to listen on the same port."""
    host, port = bento.http_address()
    hosts = {host, str(settings.grpc_host)}
    if port == settings.grpc_port and (len(hosts) == 1 or hosts & ALL_INTERFACES):
        raise InputError(
            f"AVEX_GRPC_PORT is {port}, on which HTTP listens; set another one, or give HTTP another --port"
        )


bento.skip_unsent_spans()
bento.bound_connections()
bento.keep_no_timers()
AvexService.add_asgi_middleware(HttpFront, front=lambda: bentoml.get_current_service().front, application=Routes)
