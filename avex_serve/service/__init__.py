"""The service: HTTP and gRPC, both thin transports over one engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avex_serve.service.worker import AvexService

__all__ = ["AvexService"]


def __getattr__(name: str) -> Any:
    """`AvexService` on first use: BentoML takes a second to import, and the settings do without."""
    if name == "AvexService":
        from avex_serve.service.worker import AvexService

        return AvexService
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
