"""The BentoML service: what `bentoml serve` starts.

The methods give BentoML its client and its API page, and can be called within the process. Over HTTP the same
paths are answered by `avex_serve.service.http`.
"""

# mypy: disable-error-code="untyped-decorator,attr-defined"
# BentoML resolves its decorators lazily, so that mypy sees no types of theirs.

import logging
import os
from contextlib import AbstractContextManager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Final

import bentoml
from anyio import to_thread

from avex_serve.audio.reader import open_audio
from avex_serve.bundles.folders import check_any
from avex_serve.errors import AvexServeError, InputError
from avex_serve.inference import pipeline
from avex_serve.inference.engine import Engine
from avex_serve.inference.opening import open_bundle
from avex_serve.inference.query import Query
from avex_serve.inference.repository import Repository
from avex_serve.inference.results import Classification, Embedding, Prediction, Predictions
from avex_serve.scheduling.cores import threads_of_worker
from avex_serve.service import oip_repository
from avex_serve.service.desk import Desk
from avex_serve.service.drain import Drain, DrainingGrpc, DrainingHttp
from avex_serve.service.gate import Gate, http_time_limit
from avex_serve.service.grpc import GrpcServer, check_port_is_free
from avex_serve.service.http import OwnRoutes
from avex_serve.service.http_gate import HttpGate
from avex_serve.service.http_protocol import bound_heads
from avex_serve.service.keys import Keys
from avex_serve.service.logs import configure_logs
from avex_serve.service.metrics import Metrics
from avex_serve.service.observe import ObservedGrpc, ObservedHttp, Observer
from avex_serve.service.oip import from_numbers
from avex_serve.service.pages import Pages
from avex_serve.service.settings import Settings
from avex_serve.service.tls import server_credentials
from avex_serve.service.tracing import Tracing, leave_out_unsent_spans

logger = logging.getLogger("bentoml.avex_serve")  # BentoML drops the information of loggers that are not its own

EVERYWHERE: Final = {"0.0.0.0", "::"}
STARTUP_FAILED: Final = 3  # exit code, uvicorn's for this case


# Metrics and the log of requests are ours: see docs/decisions/operation.md.
@bentoml.service(
    traffic={"timeout": http_time_limit()}, metrics={"enabled": False}, logging={"access": {"enabled": False}}
)
class AvexService:
    """Names the sounds in recordings, with the bundles that AVEX_BUNDLE points at."""

    _grpc: GrpcServer | None = None

    def __init__(self) -> None:
        if bentoml.server_context.worker_index is not None:  # in BentoML's server, not in somebody's program
            configure_logs(self.settings.log_format)

    @cached_property
    def settings(self) -> Settings:
        """The settings of this process."""
        return Settings.from_environment()

    @cached_property
    def desk(self) -> Desk:
        """The bundles, opened on first use: BentoML's supervisor, which imports this module too, does without."""
        return Desk(Repository(self.settings.bundle, self._open), self.gate.admission, self.settings.model_control)

    def _open(self, folder: Path) -> Engine:
        settings = self.settings
        return open_bundle(folder, settings.device, precision=settings.precision, threads=self.threads)

    @cached_property
    def threads(self) -> int:
        """Threads that infer in this process."""
        return self.settings.threads or threads_of_worker(_workers())

    @cached_property
    def metrics(self) -> Metrics:
        """The metrics of this process."""
        return Metrics(self.served)

    @cached_property
    def tracing(self) -> Tracing:
        """The spans of this process."""
        return Tracing.from_environment()

    @cached_property
    def observer(self) -> Observer:
        """What notes each request."""
        return Observer(self.metrics, self.tracing, self.gate.request)

    @cached_property
    def drain(self) -> Drain:
        """What ends this process in order."""
        return Drain(self.settings.drain_seconds)

    def served(self) -> AbstractContextManager[list[Engine]]:
        """The engines that are served, lent for the length of a block."""
        return self.desk.repository.lease_those(lambda _: True)

    def ready(self) -> bool:
        """Whether requests are taken: models are served, each of which has answered once, and it isn't ending."""
        return not self.drain.draining and oip_repository.server_ready(self.desk.repository)

    async def __is_ready__(self) -> bool:
        """What BentoML asks for `/readyz`."""
        return self.ready()

    @cached_property
    def gate(self) -> Gate:
        """What requests pass before they are answered."""
        return Gate.from_settings(self.settings, self.threads)

    @bentoml.api
    def predict(
        self,
        audio: Path,
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
        probe: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Prediction:
        """Name the sounds in a recording (WAV, FLAC, OGG, MP3)."""
        return pipeline.predict(
            self.desk.repository,
            partial(open_audio, audio),
            Query(
                model=model,
                version=version,
                threshold=threshold,
                top_k=top_k,
                overlap=overlap,
                probe=probe,
            ),
        )

    @bentoml.api
    def predict_all(
        self,
        audio: Path,
        threshold: float | None = None,
        top_k: int | None = None,
        overlap: float = 0.0,
        model: str | None = None,
        version: str | None = None,
    ) -> Predictions:
        """What the probes of a bundle hear, and all that read its embeddings, in one pass of the backbone."""
        return pipeline.predict_all(
            self.desk.repository,
            partial(open_audio, audio),
            Query(
                model=model,
                version=version,
                threshold=threshold,
                top_k=top_k,
                overlap=overlap,
            ),
        )

    @bentoml.api
    def embed(
        self,
        audio: Path,
        overlap: float = 0.0,
        output: str | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Embedding:
        """The embeddings of a recording, one a window."""
        return pipeline.embed(
            self.desk.repository,
            partial(open_audio, audio),
            Query(
                model=model,
                version=version,
                overlap=overlap,
                output=output,
            ),
        )

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
        array = from_numbers("embeddings", embeddings)
        query = Query(model=model, version=version, threshold=threshold, top_k=top_k, probe=probe)
        return pipeline.classify(self.desk.repository, array, query)

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse bad settings, folders without a whole bundle and a port that is taken."""
        try:
            settings = Settings.from_environment()
            configure_logs(settings.log_format)
            check_any(settings.bundle)
            _check_ports_differ(settings)
            check_port_is_free(settings)
            Keys.from_settings(settings)
            server_credentials(settings)
        except AvexServeError as error:
            raise SystemExit(f"avex-serve: {error}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """In each worker: open the bundles, serve gRPC beside HTTP and look for new bundles from then on."""
        settings = self.settings
        try:
            desk = self.desk
            interceptors = [ObservedGrpc(self.observer), DrainingGrpc(self.drain)]
            self._grpc = await GrpcServer.start(desk, settings, self.gate, self.ready, interceptors)
        except AvexServeError as error:
            logger.error("can't start: %s", error)
            # An exception would be printed with its traceback, once by Starlette and once more by uvicorn.
            os._exit(STARTUP_FAILED)
        self.drain.on_signals(self._grpc.announce_end)
        if settings.reload_seconds:
            desk.repository.watch(settings.reload_seconds)
        logger.info(
            "gRPC listens on %s; to serve another bundle: "
            "AVEX_BUNDLE=dir bentoml serve avex_serve.service:AvexService",
            settings.grpc_address,
        )

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End gRPC and the engines, after HTTP has ended."""
        if self._grpc is not None:
            await self._grpc.stop()
        self.gate.admission.close()
        self.desk.repository.close()
        await to_thread.run_sync(self.tracing.close)


def _workers() -> int:
    """How many processes serve, as BentoML is configured; 1 outside of its server."""
    if bentoml.server_context.worker_index is None:
        return 1
    # BentoML tells a worker its own number and not how many there are.
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.resource import system_resources

    services = BentoMLContainer.config.services.get()
    workers = (services.get(AvexService.name) or {}).get("workers") or 1
    return int(system_resources()["cpu"]) or 1 if workers == "cpu_count" else int(workers)


def _check_ports_differ(settings: Settings) -> None:
    """Raise InputError if gRPC is to listen where HTTP will, as `bentoml serve` and its configuration say."""
    import click  # BentoML's command is made with it
    from bentoml._internal.configuration.containers import BentoMLContainer

    command = click.get_current_context(silent=True)
    given = {} if command is None else command.params
    port = given.get("port") or BentoMLContainer.http.port.get()
    hosts = {given.get("host") or BentoMLContainer.http.host.get(), str(settings.grpc_host)}
    if port == settings.grpc_port and (len(hosts) == 1 or hosts & EVERYWHERE):
        raise InputError(
            f"AVEX_GRPC_PORT is {port}, on which HTTP listens; set another one, or give HTTP another --port"
        )


@cache
def _current() -> Any:
    return bentoml.get_current_service()


leave_out_unsent_spans()
bound_heads()
# The first one is the outermost.
AvexService.add_asgi_middleware(ObservedHttp, observer=lambda: _current().observer)
AvexService.add_asgi_middleware(DrainingHttp, drain=lambda: _current().drain)
AvexService.add_asgi_middleware(HttpGate, gate=lambda: _current().gate)
AvexService.add_asgi_middleware(
    Pages,
    served=lambda: _current().served(),
    metrics=lambda: _current().metrics,
    grpc_port=lambda: _current().settings.grpc_port,
)
AvexService.add_asgi_middleware(OwnRoutes, desk=lambda: _current().desk, ready=lambda: _current().ready())
