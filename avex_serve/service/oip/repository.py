"""The repository as the Open Inference Protocol shows it, and the calls of Triton's extensions that are refused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypedDict

from avex_serve.errors import NotFoundError, UnavailableError, UnsupportedError
from avex_serve.inference.repository import Repository
from avex_serve.service.oip.protocol import NO_SHARED_MEMORY, Model

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"

# Triton's extensions that are not offered: paths under /v2, with {name} and {version} of a model, and gRPC methods.
NO_STREAM: Final = "streams are not offered; send each request by ModelInfer"
NO_STATISTICS: Final = "statistics are not offered here; GET /metrics has them"
NO_SETTINGS: Final = "trace and log settings are not offered; set them when you start the service"
REFUSED_PATHS: Final = {
    "/models/stats": NO_STATISTICS,
    "/models/{name}/stats": NO_STATISTICS,
    "/models/{name}/versions/{version}/stats": NO_STATISTICS,
    "/models/{name}/trace/setting": NO_SETTINGS,
    "/trace/setting": NO_SETTINGS,
    "/logging": NO_SETTINGS,
    "/systemsharedmemory/{rest:path}": NO_SHARED_MEMORY,
    "/cudasharedmemory/{rest:path}": NO_SHARED_MEMORY,
}
REFUSED_METHODS: Final = {
    "ModelStatistics": NO_STATISTICS,
    "TraceSetting": NO_SETTINGS,
    "LogSettings": NO_SETTINGS,
    "SystemSharedMemoryStatus": NO_SHARED_MEMORY,
    "SystemSharedMemoryRegister": NO_SHARED_MEMORY,
    "SystemSharedMemoryUnregister": NO_SHARED_MEMORY,
    "CudaSharedMemoryStatus": NO_SHARED_MEMORY,
    "CudaSharedMemoryRegister": NO_SHARED_MEMORY,
    "CudaSharedMemoryUnregister": NO_SHARED_MEMORY,
}


class ModelIndex(TypedDict):
    """A line of the index."""

    name: str
    version: str
    state: str
    reason: str


@contextmanager
def leased_model(repository: Repository, name: str, version: str | None) -> Iterator[Model]:
    """The model of that name and version; errors as of `Repository.lease`."""
    if not name:
        raise NotFoundError("the request names no model")
    with repository.lease(name, version) as engine:
        yield Model(engine, repository)


def server_ready(repository: Repository) -> bool:
    """Whether a model is served."""
    return any(state.ready for state in repository.index())


def model_ready(repository: Repository, name: str, version: str | None) -> bool:
    """Whether a model is served; NotFoundError for an unknown name or version."""
    try:
        with leased_model(repository, name, version):
            return True
    except UnavailableError:
        return False


def index(repository: Repository, *, ready: bool) -> list[ModelIndex]:
    """Every bundle on disk, or the ready ones alone, with its state and, if it is not served, the reason."""
    return [
        ModelIndex(
            name=state.name,
            version=state.version,
            state=READY if state.ready else UNAVAILABLE,
            reason=state.reason,
        )
        for state in repository.index()
        if state.ready or not ready
    ]


def check_load_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for parameters of Triton that carry a configuration or files."""
    if sent := sorted(name for name in parameters if name == "config" or name.startswith("file:")):
        raise UnsupportedError(
            f"load takes no {', '.join(sent)}: the service loads models from the folders of AVEX_BUNDLE alone"
        )
