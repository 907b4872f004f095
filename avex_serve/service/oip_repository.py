"""The Open Inference Protocol's view of the repository, and its calls that are refused here, for both transports."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypedDict

from avex_serve.errors import NotFoundError, UnavailableError, UnsupportedError
from avex_serve.inference.repository import Repository
from avex_serve.service import oip

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"

# Triton's other extensions: paths under /v2 (with {name} and {version} of a model), and gRPC methods.
NO_STREAM: Final = "streams are not offered; send each request by ModelInfer"
NO_STATISTICS: Final = "statistics are not offered here; GET /metrics has them"
NO_SETTINGS: Final = "trace and log settings are not offered; set them where the service is started"
REFUSED_PATHS: Final = {
    "/models/stats": NO_STATISTICS,
    "/models/{name}/stats": NO_STATISTICS,
    "/models/{name}/versions/{version}/stats": NO_STATISTICS,
    "/models/{name}/trace/setting": NO_SETTINGS,
    "/trace/setting": NO_SETTINGS,
    "/logging": NO_SETTINGS,
    "/systemsharedmemory/{rest:path}": oip.NO_SHARED_MEMORY,
    "/cudasharedmemory/{rest:path}": oip.NO_SHARED_MEMORY,
}
REFUSED_METHODS: Final = {
    "ModelStatistics": NO_STATISTICS,
    "TraceSetting": NO_SETTINGS,
    "LogSettings": NO_SETTINGS,
    "SystemSharedMemoryStatus": oip.NO_SHARED_MEMORY,
    "SystemSharedMemoryRegister": oip.NO_SHARED_MEMORY,
    "SystemSharedMemoryUnregister": oip.NO_SHARED_MEMORY,
    "CudaSharedMemoryStatus": oip.NO_SHARED_MEMORY,
    "CudaSharedMemoryRegister": oip.NO_SHARED_MEMORY,
    "CudaSharedMemoryUnregister": oip.NO_SHARED_MEMORY,
}


class ModelIndex(TypedDict):
    """A line of the index."""

    name: str
    version: str
    state: str
    reason: str


@contextmanager
def leased_model(repository: Repository, name: str, version: str | None) -> Iterator[oip.Model]:
    """The model of that name and version; errors as of `Repository.lease`."""
    if not name:
        raise NotFoundError("the request names no model")
    with repository.lease(name, version) as engine:
        yield oip.Model(engine, repository)


def server_ready(repository: Repository) -> bool:
    """Whether a model is served."""
    return any(state.ready for state in repository.index())


def model_ready(repository: Repository, name: str, version: str | None) -> bool:
    """Whether a model is served; NotFoundError if there is none of that name and version."""
    try:
        with leased_model(repository, name, version):
            return True
    except UnavailableError:
        return False


def index(repository: Repository, *, ready: bool) -> list[ModelIndex]:
    """Every bundle on disk with its state and, where it is not served, the reason; or those alone that are ready."""
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
    """Raise UnsupportedError for what Triton lets a client send along to load: a configuration or files."""
    if sent := sorted(name for name in parameters if name == "config" or name.startswith("file:")):
        raise UnsupportedError(f"load takes no {', '.join(sent)}: models are loaded from the folders of AVEX_BUNDLE")
