"""The BentoML service: what `bentoml serve` starts.

The methods give BentoML its client and its API page, and can be called within the process. Over HTTP the same
paths are answered by `avex_serve.service.http`.
"""

# mypy: disable-error-code="untyped-decorator,attr-defined"
# BentoML resolves its decorators lazily, so that mypy sees no types of theirs.

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import bentoml

from avex_serve.errors import AvexServeError
from avex_serve.runtime import linked
from avex_serve.runtime.audio import decode
from avex_serve.runtime.engine import Engine, open_bundle
from avex_serve.runtime.folders import check_any
from avex_serve.runtime.repository import Repository
from avex_serve.runtime.results import Classification, Embedding, Prediction, Predictions
from avex_serve.service.desk import Desk
from avex_serve.service.gate import Gate, http_time_limit
from avex_serve.service.grpc import GrpcServer, check_port_is_free
from avex_serve.service.grpc_gate import server_credentials
from avex_serve.service.http import OwnRoutes
from avex_serve.service.http_gate import HttpGate
from avex_serve.service.keys import Keys
from avex_serve.service.oip import from_numbers
from avex_serve.service.settings import Settings

logger = logging.getLogger("bentoml.avex_serve")  # BentoML drops the information of loggers that are not its own

STARTUP_FAILED: Final = 3  # exit code, uvicorn's for this case


@bentoml.service(traffic={"timeout": http_time_limit()})
class AvexService:
    """Names the sounds in recordings, with the bundles that AVEX_BUNDLE points at."""

    _grpc: GrpcServer | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings of this process."""
        return Settings.from_environment()

    @cached_property
    def desk(self) -> Desk:
        """The bundles, opened on first use: BentoML's supervisor, which imports this module too, does without."""
        return Desk(Repository(self.settings.bundle, self._open), self.settings.model_control)

    def _open(self, folder: Path) -> Engine:
        return open_bundle(folder, self.settings.device, precision=self.settings.precision)

    @cached_property
    def gate(self) -> Gate:
        """What requests pass before they are answered."""
        return Gate.from_settings(self.settings)

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
        return linked.predict(
            self.desk.repository,
            *decode(audio),
            model=model,
            version=version,
            threshold=threshold,
            top_k=top_k,
            overlap=overlap,
            probe=probe,
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
        return linked.predict_all(
            self.desk.repository,
            *decode(audio),
            model=model,
            version=version,
            threshold=threshold,
            top_k=top_k,
            overlap=overlap,
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
        with self.desk.repository.lease(model, version) as engine:
            return engine.embedding_document(*decode(audio), overlap=overlap, output=output)

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
        with self.desk.repository.lease(model, version) as engine:
            return engine.classify(array, threshold=threshold, top_k=top_k, probe=probe)

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse bad settings, folders without a whole bundle and a port that is taken."""
        try:
            settings = Settings.from_environment()
            check_any(settings.bundle)
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
            self._grpc = await GrpcServer.start(desk, settings, self.gate)
        except AvexServeError as error:
            logger.error("can't start: %s", error)
            # An exception would be printed with its traceback, once by Starlette and once more by uvicorn.
            os._exit(STARTUP_FAILED)
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


def _current() -> Any:
    return bentoml.get_current_service()


AvexService.add_asgi_middleware(HttpGate, gate=lambda: _current().gate)  # the first one is the outermost
AvexService.add_asgi_middleware(OwnRoutes, desk=lambda: _current().desk)
