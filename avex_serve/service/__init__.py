"""The service: HTTP and gRPC, both thin transports over one engine."""

from avex_serve.service.api import AvexService

__all__ = ["AvexService"]
