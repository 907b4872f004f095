"""The folders above a bundle that is being made."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from avex_serve.errors import InputError


@contextlib.contextmanager
def parents_taken_back(output: Path) -> Iterator[None]:
    """Remove the folders above the output on an error, as far as they were not there and are empty.

    Raises:
        InputError: a file is in the place of one of them.
    """
    missing = []
    for parent in output.resolve().parents:
        if parent.is_dir():
            break
        if parent.exists():
            raise InputError(f"--output {output}: {parent} is a file, not a folder; choose another place")
        missing.append(parent)
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not made, or used by somebody else meanwhile
                parent.rmdir()
        raise
