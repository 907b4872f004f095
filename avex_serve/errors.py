"""The errors of the serving and exporting side, as one tree.

    AvexServeError
    ├── InputError            what the client sent is wrong        400  INVALID_ARGUMENT     exit 2
    │   ├── AudioError        the bytes are not usable audio       400  INVALID_ARGUMENT     exit 2
    │   └── TensorError       a tensor's shape, type or values     400  INVALID_ARGUMENT     exit 2
    ├── NotFoundError         no such model, version, probe, file  404  NOT_FOUND            exit 2
    ├── UnsupportedError      this bundle can't answer that        400  UNIMPLEMENTED        exit 2
    ├── ForbiddenError        the service's settings forbid it     403  PERMISSION_DENIED    exit 2
    ├── UnavailableError      the model is known and not served    503  UNAVAILABLE          exit 3
    ├── BundleError           the folder is no whole bundle        500  FAILED_PRECONDITION  exit 3
    ├── DependencyError       an optional package is missing       500  FAILED_PRECONDITION  exit 3
    ├── ExportError           the exporter can't or won't go on    500  INTERNAL             exit 4
    └── VerificationError     a bundle answers otherwise here      500  INTERNAL             exit 5

Each knows its HTTP status, its gRPC status (by name, so that grpc need not be imported) and the exit code of a
command. A message says what was wrong, what was expected and the remedy. The probe API mirrors avex instead
and raises what avex raises there: ``ValueError``, ``TypeError``, ``RuntimeError``, ``FileNotFoundError``.
"""

from typing import ClassVar


class AvexServeError(Exception):
    """Base of all errors of the serving and exporting side."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1


class InputError(AvexServeError):
    """What the client sent is wrong."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    exit_code = 2


class AudioError(InputError):
    """The bytes can't be used as audio."""


class TensorError(InputError):
    """A tensor has the wrong shape, type or values."""


class NotFoundError(AvexServeError):
    """No such model, version, probe or file."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    exit_code = 2


class UnsupportedError(AvexServeError):
    """The loaded bundle can't answer that kind of request."""

    http_status = 400
    grpc_status = "UNIMPLEMENTED"
    exit_code = 2


class ForbiddenError(AvexServeError):
    """The settings of the service forbid that request."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    exit_code = 2


class UnavailableError(AvexServeError):
    """The model is known and not served at present."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    exit_code = 3


class BundleError(AvexServeError):
    """A folder is not a whole, readable bundle."""

    grpc_status = "FAILED_PRECONDITION"
    exit_code = 3


class DependencyError(AvexServeError):
    """An optional package that this step needs is not installed."""

    grpc_status = "FAILED_PRECONDITION"
    exit_code = 3


class ExportError(AvexServeError):
    """The exporter can't, or for good reason won't, go on."""

    exit_code = 4


class VerificationError(AvexServeError):
    """A bundle doesn't answer on this machine as its evidence says."""

    exit_code = 5
