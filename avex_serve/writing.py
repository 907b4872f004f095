"""Files and folders that appear whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from avex_serve.errors import InputError, StorageError

_FILE_MODES: Final = 0o666  # of which the user's umask takes some


@contextmanager
def report_full_disk() -> Iterator[None]:
    """Turn errors of a disk that is full or can't be written into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the results can't be written: {error}; make room, and start the same command again: it computes only "
            "what is missing"
        ) from error


@contextmanager
def new_path(target: Path) -> Iterator[Path]:
    """Where to write a file that appears as `target` at the end of the block, whole, or not at all.

    Raises:
        StorageError: the disk is full, or can't be written.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    with report_full_disk():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def new_file(target: Path) -> Iterator[TextIO]:
    """A text file that appears at the end of the block, whole, or not at all.

    Raises:
        InputError: the target is a folder.
        StorageError: the disk is full, or can't be written.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder; this format is one file: name it, such as {target / 'table'}")
    with new_path(target) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def new_folder(target: Path, marker: str) -> Iterator[Path]:
    """A folder that appears at the end of the block, whole, or not at all.

    Raises:
        InputError: the target is something else than a folder with the file `marker`, or an empty one.
        StorageError: the disk is full, or can't be written.
    """
    with report_full_disk():
        try:
            with atomic_directory(target, marker=marker) as folder:
                yield folder
        except FileExistsError as error:
            raise InputError(str(error)) from None


@contextmanager
def atomic_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """A new folder to fill. Leaving the block moves it to `target`; an error in the block removes it.

    All files get the mode that the user's umask gives.

    An existing target is replaced only if it is empty or holds the file `marker`, so that a mistyped path never
    deletes another folder. After an error, parents that were made here are removed too, unless they are in use.

    Raises:
        FileExistsError: the target, or one of its parents, is something else.
    """
    target = target.resolve()  # "." has no name to build a temporary one from, and a link stays a link
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and holds no {marker}: not replaced; choose another folder")
    missing = [parent for parent in target.parents if not parent.is_dir()]
    if missing and missing[-1].exists():
        raise FileExistsError(f"{missing[-1]} is a file, not a folder; choose another place for {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            yield fresh
            for path in fresh.rglob("*"):
                if path.is_file():  # safetensors writes files that only their owner can read
                    path.chmod(fresh.stat().st_mode & _FILE_MODES)
            if target.exists():
                target.rename(Path(scratch) / "old")
            fresh.rename(target)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # never made, or in use by another program
                parent.rmdir()
        raise
