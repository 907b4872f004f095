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

from avex_serve.bundle import read_bundle
from avex_serve.errors import AvexServeError
from avex_serve.runtime.audio import decode
from avex_serve.runtime.engine import Engine, open_bundle
from avex_serve.runtime.results import Classification, Embedding, Prediction, Predictions
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
    """Names the sounds in recordings, with the bundle that AVEX_BUNDLE points at."""

    _grpc: GrpcServer | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings of this process."""
        return Settings.from_environment()

    @cached_property
    def engine(self) -> Engine:
        """The engine, opened on first use: BentoML's supervisor, which imports this module too, does without."""
        return open_bundle(self.settings.bundle, self.settings.device, precision=self.settings.precision)

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
    ) -> Prediction:
        """Name the sounds in a recording (WAV, FLAC, OGG, MP3)."""
        return self.engine.predict(*decode(audio), threshold=threshold, top_k=top_k, overlap=overlap, probe=probe)

    @bentoml.api
    def predict_all(
        self, audio: Path, threshold: float | None = None, top_k: int | None = None, overlap: float = 0.0
    ) -> Predictions:
        """What all probes of the bundle hear in a recording, in one pass of the backbone."""
        answers = self.engine.predict_all(*decode(audio), threshold=threshold, top_k=top_k, overlap=overlap)
        return Predictions(predictions=answers)

    @bentoml.api
    def embed(self, audio: Path, overlap: float = 0.0, output: str | None = None) -> Embedding:
        """The embeddings of a recording, one a window."""
        return self.engine.embedding_document(*decode(audio), overlap=overlap, output=output)

    @bentoml.api
    def classify(
        self,
        embeddings: list[Any],
        threshold: float | None = None,
        top_k: int | None = None,
        probe: str | None = None,
    ) -> Classification:
        """Ask the head about embeddings, (batch, dim) or (batch, time, dim); for embedding bundles."""
        array = from_numbers("embeddings", embeddings)
        return self.engine.classify(array, threshold=threshold, top_k=top_k, probe=probe)

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse bad settings, a bundle that is not whole and a port that is taken."""
        try:
            settings = Settings.from_environment()
            read_bundle(settings.bundle)
            check_port_is_free(settings)
            Keys.from_settings(settings)
            server_credentials(settings)
        except AvexServeError as error:
            raise SystemExit(f"avex-serve: {error}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """In each worker: open the engine, serve gRPC beside HTTP and say what is served."""
        try:
            engine = self.engine
            self._grpc = await GrpcServer.start(engine, self.settings, self.gate)
        except AvexServeError as error:
            logger.error("can't start: %s", error)
            # An exception would be printed with its traceback, once by Starlette and once more by uvicorn.
            os._exit(STARTUP_FAILED)
        _announce(engine, self.settings)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End gRPC and the engine, after HTTP has ended."""
        if self._grpc is not None:
            await self._grpc.stop()
        self.gate.admission.close()
        self.engine.close()


def _announce(engine: Engine, settings: Settings) -> None:
    manifest = engine.manifest
    logger.info(
        "serving bundle %s, version %s, from %s on %s (%s); gRPC listens on %s; "
        "to serve another bundle: AVEX_BUNDLE=dir bentoml serve avex_serve.service:AvexService",
        manifest.name,
        manifest.version,
        settings.bundle,
        engine.backend.device,
        engine.backend.format,
        settings.grpc_address,
    )
    if not manifest.trained:
        logger.warning("bundle %s has random weights: its answers mean nothing", manifest.name)


def _current() -> Any:
    return bentoml.get_current_service()


AvexService.add_asgi_middleware(HttpGate, gate=lambda: _current().gate)  # the first one is the outermost
AvexService.add_asgi_middleware(OwnRoutes, engine=lambda: _current().engine)
