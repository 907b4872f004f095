"""What is read from files, and read again when they change: keys and certificates are renewed while it serves."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from avex_serve.errors import InputError

logger = logging.getLogger("bentoml.avex_serve")

Value = TypeVar("Value")

LOOK_SECONDS: Final = 1.0  # between two looks at the files, at least


class Watched(Generic[Value]):
    """A value that is read from files. What can't be used is told in the log, and what was read before stays."""

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        """Read it.

        Args:
            files: what it is read from.
            read: reads it; raises InputError if it can't be used.

        Raises:
            InputError: what `read` raises.
        """
        self._files = files
        self._read = read
        self._looked = time.monotonic()
        self._states = self._look()
        self._value = read()

    def current(self) -> Value:
        """The value, read again if a file has changed."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            if (states := self._look()) != self._states:
                self._states = states  # as it was before it is read: who writes meanwhile is seen by the next look
                self._read_again()
        return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read()
        except InputError as error:
            logger.error("%s; what was read before is used on", error)
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
