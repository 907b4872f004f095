"""Where bundles are on disk, and whether a folder has changed since it was last read."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from avex_serve.bundles.manifest import MANIFEST
from avex_serve.bundles.reading import read_manifest
from avex_serve.errors import BundleError

# (name, inode, modification time in ns, size) of every file. A bundle that replaces another has different inodes,
# and one that is still being copied changes its size.
Stamp = tuple[tuple[str, int, int, int], ...]


def find_bundles(roots: Iterable[Path]) -> list[Path]:
    """The folders that hold a bundle, each once and in the order of the roots.

    A root is a bundle, or a folder of bundles: its sub-folders are bundles, or hold one per version. A root without
    any bundle is returned itself, so that opening it reports what is wrong.
    """
    found: dict[Path, None] = {}
    for root in roots:
        inside = [] if _has_manifest(root) else list(_inside(root))
        found.update(dict.fromkeys(inside or [root]))
    return list(found)


def check_any(roots: Iterable[Path]) -> None:
    """Raise BundleError, with every reason, unless the roots hold at least one complete bundle.

    Digests are left to the process that opens the bundle, which would compute them a second time.
    """
    reasons = []
    for folder in find_bundles(roots):
        try:
            read_manifest(folder)
        except BundleError as error:
            reasons.append(str(error))
        else:
            return
    raise BundleError("; ".join(reasons))


def stamp(folder: Path) -> Stamp:
    """Equal stamps mean that the files of the folder are the same; their content isn't read."""
    files = []
    with suppress(OSError), os.scandir(folder) as entries:  # a folder that vanished has no files
        for entry in entries:
            if status := _status(entry):
                files.append((entry.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(sorted(files))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Status of a link's target, or of the link itself if it has none; None if the entry has vanished."""
    for follow in (True, False):
        with suppress(OSError):
            return entry.stat(follow_symlinks=follow)
    return None


def is_gone(folder: Path) -> bool:
    """Whether the folder doesn't exist; False also if the disk can't be read at the moment."""
    try:
        folder.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def _inside(root: Path) -> Iterator[Path]:
    for folder in _folders(root):
        if _has_manifest(folder):
            yield folder
        else:
            yield from filter(_has_manifest, _folders(folder))


def _folders(folder: Path) -> list[Path]:
    try:
        # A name that begins with a dot is an unfinished bundle, or belongs to the volume.
        return sorted(path for path in folder.iterdir() if _is_folder(path) and not path.name.startswith("."))
    except OSError:
        return []


# os.path answers False where the disk can't be read, such as for lost+found; the methods of Path raise.
def _has_manifest(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST)  # noqa: PTH113


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112
