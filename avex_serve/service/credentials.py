"""API keys and certificates. The files of keys and of gRPC are read again when they change."""

import base64
import hmac
import logging
import re
import ssl
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Generic, Self, TypeVar

import grpc

from avex_serve.errors import AuthenticationError, InputError
from avex_serve.service.bento import HttpsOptions
from avex_serve.service.settings import Settings

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

CHECK_SECONDS: Final = 1.0  # at least, between two checks whether files have changed


class Watched(Generic[Value]):
    """A value that is read from files. If they change to what can't be used, the log says so and the value stays."""

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        """Read it.

        Args:
            files: the files.
            read: reads them; raises InputError if they can't be used.

        Raises:
            InputError: as raised by `read`.
        """
        self._files = files
        self._read = read
        self._checked = time.monotonic()
        self._states = self._look()
        self._value = read()

    def current(self) -> Value:
        """The value, read again if a file has changed."""
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self._checked = time.monotonic()
            if (states := self._look()) != self._states:
                self._states = states  # from before the reading: the next check notices changes made meanwhile
                self._read_again()
        return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read()
        except InputError as error:
            logger.error("%s; what was read before stays in use", error)
        else:
            logger.info("%s changed and was read again", ", ".join(map(str, self._files)))

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state(file) for file in self._files]


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# -- keys -----------------------------------------------------------------------------------------------------------

SCHEME: Final = "bearer"  # of the Authorization header, RFC 6750
_SEND_A_KEY: Final = "send one of the keys of this service"
_ENTRY: Final = re.compile(  # NAME:KEY or KEY, which is a bearer token by RFC 6750
    r"(?:(?P<name>[A-Za-z0-9._-]{1,64}):)?(?P<key>[A-Za-z0-9._~+/-]+=*)"
)


class Keys:
    """The valid keys; if there are none, requests need no key."""

    def __init__(self, valid: Callable[[], Mapping[bytes, str]]) -> None:
        """`valid` returns them at each request, with their names."""
        self._valid = valid

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The keys of AVEX_API_KEYS and AVEX_API_KEYS_FILE, which is read again when it changes.

        Raises:
            InputError: a file that can't be read, a setting without a key, or a key that no client could send.
        """
        fixed: dict[bytes, str] = {}
        if settings.api_keys is not None:
            fixed = _parsed("AVEX_API_KEYS", settings.api_keys.get_secret_value().split(","))
        if (path := settings.api_keys_file) is None:
            return cls(lambda: fixed)
        return cls(Watched([path], lambda: fixed | _read_keys(path)).current)

    def check(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header, or the metadata of that name; "" if it has none.

        Raises:
            AuthenticationError: keys are required, and it holds none of them.
        """
        if not (keys := self._valid()):
            return ""
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != SCHEME:
            raise AuthenticationError("this service requires a key; send it as Authorization: Bearer KEY")
        sent = key.strip().encode("utf-8", "surrogateescape")
        # Against every key, and in a time that doesn't depend on how much of a key is right.
        names = [name for valid, name in keys.items() if hmac.compare_digest(sent, valid)]
        if not names:
            remedy = "send the key alone, without a name and a colon before it" if ":" in key else _SEND_A_KEY
            raise AuthenticationError(f"the key is not valid here; {remedy}")
        return names[0]


def _read_keys(path: Path) -> dict[bytes, str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"AVEX_API_KEYS_FILE: {path} can't be read: {reason}") from None
    return _parsed("AVEX_API_KEYS_FILE", lines)


def _parsed(name: str, texts: list[str]) -> dict[bytes, str]:
    """The keys with their names, "" for those without one; messages never repeat a key."""
    texts = [text.strip() for text in texts]
    if not any(texts):
        raise InputError(f"{name} is set and holds no key; unset it to accept requests without a key")
    keys: dict[bytes, str] = {}
    for number, text in enumerate(texts, 1):
        if not text:
            continue
        if not (entry := _ENTRY.fullmatch(text)):
            raise InputError(
                f"{name}: entry {number} is not a key; expected letters, digits and any of -._~+/, or such a key "
                "after a name and a colon, without spaces, quotes and comments"
            )
        key, of = entry["key"].encode(), entry["name"] or ""
        if keys.setdefault(key, of) != of:
            raise InputError(
                f"{name}: entry {number} repeats a key under another name; give each client its own key"
            )
    return keys


# -- gRPC over TLS --------------------------------------------------------------------------------------------------

# The kinds of keys that gRPC's TLS library, BoringSSL, signs with as a server, as certificates name them in DER
# (the AlgorithmIdentifiers of RFC 3279, 2.3.1, and RFC 5480, 2.1.1).
KEY_KINDS: Final = {
    "RSA": bytes.fromhex("300d 0609 2a864886f70d010101 0500"),
    "P-256": bytes.fromhex("3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107"),
    "P-384": bytes.fromhex("3010 0607 2a8648ce3d0201 0605 2b81040022"),
}


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """GRPC's credentials for TLS; None: no certificate is set.

    Raises:
        InputError: a file that can't be read or used, or one that needs another.
    """
    certificate, key, client_ca = settings.grpc_certificate, settings.grpc_key, settings.grpc_client_ca
    if certificate is None and key is None:
        if client_ca is not None:
            raise InputError("AVEX_GRPC_CLIENT_CA is set without AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY")
        return None
    if certificate is None or key is None:
        raise InputError("set AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY together, or neither of them")
    files = [certificate, key, *([client_ca] if client_ca is not None else [])]
    watched = Watched(files, lambda: _read_certificates(certificate, key, client_ca))
    used = watched.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """GRPC calls this before each handshake; None: unchanged."""
        nonlocal used
        before, used = used, watched.current()
        return None if used is before else used

    return grpc.dynamic_ssl_server_credentials(used, renewed, require_client_authentication=client_ca is not None)


def _read_certificates(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, private = _read("AVEX_GRPC_CERTIFICATE", certificate), _read("AVEX_GRPC_KEY", key)
    roots = None if client_ca is None else _read("AVEX_GRPC_CLIENT_CA", client_ca)
    # gRPC doesn't report what is wrong with them; OpenSSL does.
    if fault := _fault(certificate, key, client_ca, ""):
        raise InputError(
            f"AVEX_GRPC_CERTIFICATE, AVEX_GRPC_KEY or AVEX_GRPC_CLIENT_CA can't be used ({fault}); "
            "expected a certificate chain and its key, without a password, in PEM"
        )
    if not _can_sign(chain):
        raise InputError(
            f"gRPC can't sign with the key of AVEX_GRPC_CERTIFICATE; expected one of {', '.join(KEY_KINDS)}"
        )
    return grpc.ssl_server_certificate_configuration([(private, chain)], roots)


def _fault(certificate: Path, key: Path | None, client_ca: Path | None, password: str) -> str | None:
    """Why OpenSSL can't use these files; None: it can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except (ssl.SSLError, ValueError) as error:
        return str(getattr(error, "reason", None) or error)
    return None


def _can_sign(chain: bytes) -> bool:
    """Whether gRPC can use the kind of key of a PEM file's first certificate; OpenSSL accepts more kinds."""
    found = re.search(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----(.*?)-----END", chain, re.DOTALL)
    der = base64.b64decode(found[1]) if found else b""
    return any(kind in der for kind in KEY_KINDS.values())


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {path} can't be read: {error.strerror}") from None


# -- HTTP over TLS --------------------------------------------------------------------------------------------------


def check_https(https: HttpsOptions) -> None:
    """Check the options that BentoML's workers would get: with bad ones they would die, again and again.

    Raises:
        InputError: a file or an option that can't be used, or one that has no effect without another.
    """
    certificate, key, client_ca = https.certificate, https.key, https.client_ca
    if certificate is None:
        if https.enabled:
            raise InputError("BENTOML_CONFIG enables ssl without a certificate; set certfile and keyfile")
        for name, value in (("keyfile", key), ("ca-certs", client_ca), ("cert-reqs", https.asks_clients)):
            if value:
                raise InputError(f"--ssl-{name} is set without --ssl-certfile; set both, or neither of them")
        return
    _read("--ssl-certfile", certificate)
    if key is not None:
        _read("--ssl-keyfile", key)
    if client_ca is not None:
        _read("--ssl-ca-certs", client_ca)
    if fault := _fault(certificate, key, client_ca, https.password):
        raise InputError(
            f"--ssl-certfile, --ssl-keyfile or --ssl-ca-certs can't be used ({fault}); expected a certificate chain "
            "and its key, in PEM, and --ssl-keyfile-password if the key has one"
        )
    if https.asks_clients not in list(ssl.VerifyMode):
        raise InputError(f"--ssl-cert-reqs is {https.asks_clients}; {_ASKED}")
    if https.asks_clients and client_ca is None:
        raise InputError(
            f"--ssl-cert-reqs is {https.asks_clients} without --ssl-ca-certs, which sign the clients' certificates; "
            "set both, or neither of them"
        )
    if client_ca is not None and not https.asks_clients:
        raise InputError(f"--ssl-ca-certs is set, and clients are not asked for a certificate; {_ASKED}")
    if not _is_of_servers(https.version):
        raise InputError(
            f"--ssl-version is {https.version}, which no server can use; leave it out for TLS 1.2 and newer"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).set_ciphers(https.ciphers)
    except ssl.SSLError:
        raise InputError(
            f"--ssl-ciphers is {https.ciphers!r}, which OpenSSL doesn't know; expected a list such as "
            "ECDHE+AESGCM:ECDHE+CHACHA20, or leave it out"
        ) from None


_ASKED: Final = "expected --ssl-cert-reqs 2 (each client shows one), 1 (if it has one), or 0 without --ssl-ca-certs"


def _is_of_servers(version: int) -> bool:
    """Whether a number of Python's protocols (``ssl.PROTOCOL_…``) makes a context that accepts connections."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # those for one version of TLS
        try:
            return ssl.SSLContext(version).protocol != ssl.PROTOCOL_TLS_CLIENT
        except (ValueError, OverflowError):
            return False
