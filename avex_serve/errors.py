"""The errors of the serving and exporting side, as one tree.

    AvexServeError
    ├── InputError            the client sent something wrong      400  INVALID_ARGUMENT     exit 2
    │   ├── AudioError        the bytes are not usable audio       400  INVALID_ARGUMENT     exit 2
    │   ├── TensorError       a tensor's shape, type or values     400  INVALID_ARGUMENT     exit 2
    │   └── TooLargeError     more than the service allows         413  INVALID_ARGUMENT     exit 2
    ├── NotFoundError         no such model, version, probe, file  404  NOT_FOUND            exit 2
    ├── UnsupportedError      this bundle can't answer that        400  UNIMPLEMENTED        exit 2
    ├── AuthenticationError   no key, or an invalid one            401  UNAUTHENTICATED
    ├── OverloadError         no room for the request now          503  RESOURCE_EXHAUSTED
    ├── StorageError          no room on disk                      507  RESOURCE_EXHAUSTED   exit 6
    ├── SlowRequestError      the request didn't arrive in time    408  DEADLINE_EXCEEDED
    ├── DeadlineError         the answer would come too late       504  DEADLINE_EXCEEDED
    ├── ClientGoneError       the client has gone                  499  CANCELLED
    ├── ForbiddenError        the service's settings forbid it     403  PERMISSION_DENIED    exit 2
    ├── UnavailableError      known, but not served at present     503  UNAVAILABLE          exit 3
    │   └── ShuttingDownError the service is shutting down         503  UNAVAILABLE          exit 3
    ├── BundleError           the folder isn't a whole bundle      422  FAILED_PRECONDITION  exit 3
    ├── DependencyError       an optional package is missing       500  FAILED_PRECONDITION  exit 3
    ├── ExportError           the exporter can't continue          500  INTERNAL             exit 4
    └── VerificationError     a bundle's answers differ here       500  INTERNAL             exit 5

Each knows its HTTP status, its gRPC status (by name, so that grpc need not be imported) and the exit code of a
command. A message says what was wrong, what was expected and the remedy. The probe API mirrors avex instead
and raises what avex raises there: ``ValueError``, ``TypeError``, ``RuntimeError``, ``FileNotFoundError``.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar


class AvexServeError(Exception):
    """Base of all errors of the serving and exporting side."""

    http_status: ClassVar[int] = 500
    http_headers: ClassVar[Mapping[str, str]] = {}
    grpc_status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1


class InputError(AvexServeError):
    """The client sent something wrong."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    exit_code = 2


class AudioError(InputError):
    """The bytes can't be used as audio."""


class TensorError(InputError):
    """A tensor has the wrong shape, type or values."""


class TooLargeError(InputError):
    """A body, a recording or a document is larger than the service allows."""

    http_status = 413


class NotFoundError(AvexServeError):
    """No such model, version, probe or file."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    exit_code = 2


class UnsupportedError(AvexServeError):
    """This bundle or service can't answer that kind of request."""

    http_status = 400
    grpc_status = "UNIMPLEMENTED"
    exit_code = 2


class AuthenticationError(AvexServeError):
    """The request has no key, or an invalid one."""

    http_status = 401
    http_headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}
    grpc_status = "UNAUTHENTICATED"


class OverloadError(AvexServeError):
    """The service has no room for the request now; it may be sent again."""

    http_status = 503
    http_headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}
    grpc_status = "RESOURCE_EXHAUSTED"


class StorageError(AvexServeError):
    """The disk has no room for a body or for results."""

    http_status = 507
    grpc_status = "RESOURCE_EXHAUSTED"
    exit_code = 6


class SlowRequestError(AvexServeError):
    """The request's body didn't arrive in time."""

    http_status = 408
    http_headers: ClassVar[Mapping[str, str]] = {"Connection": "close"}
    grpc_status = "DEADLINE_EXCEEDED"


class DeadlineError(AvexServeError):
    """The answer would come later than the client or the service allows."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class ClientGoneError(AvexServeError):
    """The client has gone."""

    http_status = 499  # nginx's number for it, seen only in logs
    grpc_status = "CANCELLED"


class ForbiddenError(AvexServeError):
    """The settings of the service forbid that request."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    exit_code = 2


class UnavailableError(AvexServeError):
    """The service, or a model that it knows, can't answer at present."""

    http_status = 503
    # The default interval between two looks at the disk.
    http_headers: ClassVar[Mapping[str, str]] = {"Retry-After": "10"}
    grpc_status = "UNAVAILABLE"
    exit_code = 3


class ShuttingDownError(UnavailableError):
    """The service is shutting down; another replica may answer."""

    http_headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class BundleError(AvexServeError):
    """A folder is not a whole, readable bundle."""

    http_status = 422  # for a request to load it
    grpc_status = "FAILED_PRECONDITION"
    exit_code = 3


class DependencyError(AvexServeError):
    """An optional package that this step needs is not installed."""

    grpc_status = "FAILED_PRECONDITION"
    exit_code = 3


class ExportError(AvexServeError):
    """The exporter can't continue, or refuses to for good reason."""

    exit_code = 4


class VerificationError(AvexServeError):
    """On this machine a bundle's answers differ from its evidence."""

    exit_code = 5


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as messages and tables write it: as a shell reads it, in quotes only if it needs them."""
    text = os.fspath(path)
    if not text.isprintable():  # such a name must not look like another line
        return repr(text)
    return text if re.fullmatch(r"[\w@%+=,./-]+", text) else shlex.quote(text)


@contextmanager
def naming(item: str) -> Iterator[None]:
    """Make the messages of errors about an input say which item they are about, unless they name it already."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith(item):
            error.args = (f"{item}: {error}",)
        raise
