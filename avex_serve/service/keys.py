"""API keys: who may ask, over HTTP and gRPC alike."""

import hmac
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from avex_serve.errors import AuthenticationError, InputError
from avex_serve.service.settings import Settings
from avex_serve.service.watched import Watched

SCHEME: Final = "bearer"  # of the Authorization header, RFC 6750
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 lets a bearer token be


class Keys:
    """The keys that are known; without any, everybody may ask."""

    def __init__(self, known: Callable[[], frozenset[bytes]]) -> None:
        """`known` gives them at each request."""
        self._known = known

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The keys of AVEX_API_KEYS and AVEX_API_KEYS_FILE, which is read again when it changes.

        Raises:
            InputError: a file that can't be read, a place that holds no key, or a key that no client could send.
        """
        fixed: frozenset[bytes] = frozenset()
        if settings.api_keys is not None:
            fixed = _parsed("AVEX_API_KEYS", settings.api_keys.get_secret_value().split(","))
        if (path := settings.api_keys_file) is None:
            return cls(lambda: fixed)
        return cls(Watched([path], lambda: fixed | _read(path)).current)

    def check(self, authorization: str | None) -> None:
        """Check an Authorization header, or the metadata of that name.

        Raises:
            AuthenticationError: keys are asked for, and it holds none of them.
        """
        if not (keys := self._known()):
            return
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != SCHEME:
            raise AuthenticationError("this service asks for a key; send it as Authorization: Bearer KEY")
        sent = key.strip().encode("utf-8", "surrogateescape")
        # Against every key, and in a time that doesn't tell how much of one was right.
        if not sum(hmac.compare_digest(sent, known) for known in keys):
            raise AuthenticationError("the key is not one of those that this service knows")


def _read(path: Path) -> frozenset[bytes]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"AVEX_API_KEYS_FILE: {path} can't be read: {reason}") from None
    return _parsed("AVEX_API_KEYS_FILE", lines)


def _parsed(name: str, texts: list[str]) -> frozenset[bytes]:
    """The keys, never repeated in a message."""
    texts = [text.strip() for text in texts]
    if not any(texts):
        raise InputError(f"{name} is set and holds no key; unset it to let everybody ask")
    for number, text in enumerate(texts, 1):
        if text and not _TOKEN.fullmatch(text):
            raise InputError(f"{name}: entry {number} is no key; expected letters, digits and any of -._~+/")
    return frozenset(text.encode() for text in texts if text)
