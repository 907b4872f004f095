"""From the paths on a command line to recordings: files, folders, patterns, and lists of them."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from avex_serve.archive.cloud import Look, find_objects
from avex_serve.bundles.remote import is_remote
from avex_serve.errors import AvexServeError, InputError, NotFoundError, UnsupportedError, quoted

SUFFIXES: Final = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".mp3"),
    *(".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".m4a", ".aac", ".webm"),
)
STDIN: Final = "-"
LIST: Final = "@"  # before the path of a list


class Found(NamedTuple):
    """What the arguments of a command stand for."""

    # In the order of the arguments, those of a folder or a pattern sorted, each once. An argument that stands for no
    # recording is here too, with the reason.
    recordings: dict[str, AvexServeError | None]
    hidden: list[str]  # files that were left out, since their names begin with a dot
    objects: dict[str, Look]  # size and time of the recordings in object stores

    def note(self) -> str | None:
        """A sentence about what was left out; None: nothing was."""
        if not self.hidden:
            return None
        files = f"{len(self.hidden)} hidden files were" if len(self.hidden) > 1 else "1 hidden file was"
        return f"{files} left out, e.g. {quoted(self.hidden[0])}"


def find_recordings(arguments: Iterable[str], *, remote: bool = False) -> Found:
    """Find the recordings that arguments stand for.

    Args:
        arguments: files; folders, in which files named as audio count, at any depth; patterns such as ``*.wav`` and
            ``**/*.flac``; ``@list.txt`` or ``@-`` for standard input, with one of these a line. Hidden files and
            folders count only if they are named themselves. A file that exists is never read as a pattern.
        remote: whether URLs of object stores may be among them, each for an object, a folder or a pattern.
    """
    found = Found({}, [], {})
    for argument in arguments:
        for each in _lines(argument[len(LIST) :], found) if argument.startswith(LIST) else [argument]:
            _add(each, found, remote=remote)
    return found


def _lines(path: str, found: Found) -> Iterator[str]:
    """The lines of a list."""
    name = "on standard input" if path == STDIN else quoted(path)
    try:
        data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except OSError as error:
        found.recordings[LIST + path] = NotFoundError(f"the list {name} can't be read: {error.strerror}")
        return
    # File names may hold any bytes but zeros; Windows writes a mark in front, or UTF-16.
    if b"\0" in data:
        found.recordings[LIST + path] = InputError(
            f"the list {name} is no text in UTF-8; expected one path a line, so save it as UTF-8"
        )
        return
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    yield from (line for each in lines if (line := each.removesuffix("\r")).strip())


def _add(argument: str, found: Found, *, remote: bool) -> None:
    if is_remote(argument):
        if remote:
            _add_objects(argument, found)
        else:
            found.recordings[argument] = UnsupportedError(
                f"{argument} is not on this machine; download it, or use avex-serve run for s3:// and gs://"
            )
        return
    # Strings, since a Path for each of 100,000 names is slow. Unlike Path's, these functions answer False for what
    # can't be read.
    if os.path.isdir(argument):  # noqa: PTH112
        matches = _walk(argument, found)
        reason = f"{quoted(argument)}: no recordings in this folder; expected files named {', '.join(SUFFIXES)}"
    elif argument == STDIN or os.path.lexists(argument):
        matches, reason = [argument], ""
    else:
        matches = _matching(argument, found)
        pattern = ", and nothing matches it as a pattern" if glob.has_magic(argument) else ""
        reason = f"{quoted(argument)}: no such file{pattern}"
    if not matches:
        found.recordings.setdefault(argument, NotFoundError(reason))
    for path in matches:
        found.recordings.setdefault(path, None)


def _add_objects(url: str, found: Found) -> None:
    """Add the objects that a URL or a pattern stands for."""
    reason: AvexServeError = NotFoundError(
        f"{url}: no recordings there; expected objects named {', '.join(SUFFIXES)}"
    )
    objects: dict[str, Look] = {}
    try:
        objects = find_objects(url)
    except AvexServeError as error:
        reason = error
    any_name = "*." in url.rpartition("/")[2]
    matches = [path for path in objects if path == url or any_name or path.lower().endswith(SUFFIXES)]
    listed = [path for path in matches if _hidden_parts(path) <= _hidden_parts(url)]
    found.hidden.extend(sorted(set(matches) - set(listed)))
    if not listed:
        found.recordings.setdefault(url, reason)
    for path in listed:
        found.recordings.setdefault(path, None)
        found.objects[path] = objects[path]


def _matching(pattern: str, found: Found) -> list[str]:
    """Files that match a pattern, and recordings in folders that do.

    Files that aren't named as audio count only if the pattern names an ending.
    """
    matches: list[str] = []
    ending = os.path.basename(pattern)  # noqa: PTH119
    for path in sorted(glob.iglob(pattern, recursive=True, include_hidden=True)):  # noqa: PTH207 - also absolute ones
        if _is_hidden(path, pattern):
            found.hidden.append(path)
        elif not os.path.isdir(path):  # noqa: PTH112
            if "." in ending or path.lower().endswith(SUFFIXES):
                matches.append(path)
        elif ending != "**":  # which matches the files in folders by itself
            matches += _walk(path, found)
    return matches


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether a part of the path begins with a dot that the pattern doesn't name."""
    return _hidden_parts(path) > _hidden_parts(pattern)


def _hidden_parts(path: str) -> int:
    return sum(part.startswith(".") for part in Path(path).parts)


def _walk(folder: str, found: Found) -> list[str]:
    """Files in a folder, at any depth, that are named as audio."""
    recordings: list[str] = []

    def unreadable(error: OSError) -> None:
        found.recordings[str(error.filename)] = InputError(
            f"{quoted(error.filename)} can't be read: {error.strerror}"
        )

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                path = os.path.join(root, name)  # noqa: PTH118
                (found.hidden if name.startswith(".") else recordings).append(path)
    return recordings


def shown(path: str) -> str:
    """A path as text; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def sites_of(paths: Sequence[str]) -> list[str]:
    """The folder of each recording, below the deepest folder that holds all of them: where it was made."""
    folders = [os.path.dirname(path) for path in paths]  # noqa: PTH120 - 100,000 of them
    root = os.path.commonpath(folders) if folders else os.sep
    return [os.path.relpath(folder, root) for folder in folders]
