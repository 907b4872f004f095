"""From the paths on a command line to recordings: files, folders, patterns, and lists of them."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from avex_serve.errors import InputError, NotFoundError

SUFFIXES: Final = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".mp3"),
    *(".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
)


def find_recordings(arguments: Iterable[str]) -> list[str]:
    """The absolute paths of the recordings, sorted, each once.

    Args:
        arguments: files, folders (searched at any depth for names of audio files), patterns such as ``*.wav``,
            ``@list.txt`` (one argument a line) and ``-`` (the same on standard input).

    Raises:
        NotFoundError: an argument that is none of these.
        InputError: no recordings at all.
    """
    found = sorted({os.path.abspath(path) for argument in arguments for path in _expand(argument)})  # noqa: PTH100
    if not found:
        raise InputError("no recordings there; expected files, folders of audio files, patterns or @list.txt")
    return found


def _expand(argument: str) -> Iterator[str]:
    if argument == "-":
        lines = sys.stdin.read().splitlines()
        yield from (path for line in lines if line.strip() for path in _expand(line.strip()))
    elif argument.startswith("@"):
        try:
            lines = Path(argument[1:]).read_text("utf-8").splitlines()
        except OSError as error:
            raise NotFoundError(f"{argument[1:]} can't be read: {error.strerror}") from None
        yield from (path for line in lines if line.strip() for path in _expand(line.strip()))
    elif os.path.isdir(argument):  # noqa: PTH112 - unlike Path, False where the disk can't be read
        yield from _walk(argument)
    elif os.path.lexists(argument):
        yield argument
    elif matches := glob.glob(argument, recursive=True):  # noqa: PTH207 - any pattern, absolute ones too
        yield from (path for match in matches for path in _expand(match))
    else:
        raise NotFoundError(f"{argument}: no such file, and nothing matches it as a pattern")


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield os.path.join(root, name)  # noqa: PTH118 - a Path for each of 100,000 names is slow
