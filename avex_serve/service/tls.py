"""TLS for gRPC, by certificate files that are read again when they change."""

import base64
import re
import ssl
from pathlib import Path
from typing import Final

import grpc

from avex_serve.errors import InputError
from avex_serve.service.settings import Settings
from avex_serve.service.watched import Watched

# The kinds of keys with which gRPC's TLS library, BoringSSL, signs as a server: how a certificate names them, in DER
# (the AlgorithmIdentifiers of RFC 3279, 2.3.1, and RFC 5480, 2.1.1).
KEYS: Final = {
    "RSA": bytes.fromhex("300d 0609 2a864886f70d010101 0500"),
    "P-256": bytes.fromhex("3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107"),
    "P-384": bytes.fromhex("3010 0607 2a8648ce3d0201 0605 2b81040022"),
}


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What TLS needs, None where no certificate is set.

    Raises:
        InputError: a file that can't be read or used, or one without the other.
    """
    certificate, key, client_ca = settings.grpc_certificate, settings.grpc_key, settings.grpc_client_ca
    if certificate is None and key is None:
        if client_ca is not None:
            raise InputError("AVEX_GRPC_CLIENT_CA is set without AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY")
        return None
    if certificate is None or key is None:
        raise InputError("set AVEX_GRPC_CERTIFICATE and AVEX_GRPC_KEY together, or none of them")
    files = [certificate, key, *([client_ca] if client_ca is not None else [])]
    watched = Watched(files, lambda: _read_configuration(certificate, key, client_ca))
    used = watched.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake; None: it is as before."""
        nonlocal used
        before, used = used, watched.current()
        return None if used is before else used

    return grpc.dynamic_ssl_server_credentials(used, renewed, require_client_authentication=client_ca is not None)


def _read_configuration(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, private = _read("AVEX_GRPC_CERTIFICATE", certificate), _read("AVEX_GRPC_KEY", key)
    roots = None if client_ca is None else _read("AVEX_GRPC_CLIENT_CA", client_ca)
    # gRPC itself would not say what is wrong with them.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"AVEX_GRPC_CERTIFICATE, AVEX_GRPC_KEY or AVEX_GRPC_CLIENT_CA can't be used ({reason}); "
            "expected a certificate chain and its key, without a password, in PEM"
        ) from None
    if not _is_signable(chain):
        raise InputError(f"gRPC can't sign with the key of AVEX_GRPC_CERTIFICATE; expected one of {', '.join(KEYS)}")
    return grpc.ssl_server_certificate_configuration([(private, chain)], roots)


def _is_signable(chain: bytes) -> bool:
    """Whether the first certificate of a PEM file is of a key that gRPC takes; OpenSSL takes more."""
    found = re.search(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----(.*?)-----END", chain, re.DOTALL)
    der = base64.b64decode(found[1]) if found else b""
    return any(key in der for key in KEYS.values())


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {path} can't be read: {error.strerror}") from None
