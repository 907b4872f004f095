"""Recordings and results in object stores, by fsspec. A recording is copied to this machine while it is computed."""

import errno
import glob
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from avex_serve.bundles.remote import asking, check_scheme, connect, is_remote
from avex_serve.errors import NotFoundError, StorageError

MODIFIED: Final = ("LastModified", "updated", "mtime", "created")  # by the names that the stores give it
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
RESTING: Final = 20  # times the duration of an upload of the journal, until the next


class Look(NamedTuple):
    """What a listing says of an object."""

    size: int  # bytes
    modified: int  # nanoseconds since 1970


def find_objects(url: str) -> dict[str, Look]:
    """The objects that a URL or a pattern stands for, by their URLs: the object itself, or all below it.

    Raises:
        AvexServeError: as of `avex_serve.bundles.remote.asking`, or a scheme that is not known.
    """
    check_scheme(url)
    with asking(url):
        store, root = connect(url)
        found = store.glob(root, detail=True) if glob.has_magic(root) else store.find(root, detail=True)
        files = sorted(path for path, info in found.items() if info["type"] == "file")
        return {store.unstrip_protocol(path): _look(found[path]) for path in files}


def look(url: str) -> Look:
    """Size and time of an object.

    Raises:
        NotFoundError: there is none.
        AvexServeError: as of `avex_serve.bundles.remote.asking`.
    """
    with asking(url):
        store, path = connect(url)
        try:
            return _look(store.info(path))
        except FileNotFoundError:
            raise NotFoundError(f"{url}: no such object") from None


@contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The path of a recording on this machine: itself, or a copy of an object during the block.

    Raises:
        StorageError: no room for the copy.
        AvexServeError: as of `avex_serve.bundles.remote.asking`.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="avex-") as folder:
        target = os.path.join(folder, "recording")  # noqa: PTH118
        with asking(path):
            store, source = connect(path)
            try:
                store.get_file(source, target)
            except FileNotFoundError:
                raise NotFoundError(f"{path}: no such object") from None
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise StorageError(
                    f"{path} can't be copied to {folder}: {error.strerror}; TMPDIR moves it"
                ) from None
        yield target


def find_folders(url: str, marker: str) -> set[str]:
    """The names of the folders in a folder that hold the file `marker`; "" if the folder itself does.

    Raises:
        AvexServeError: as of `find_objects`.
    """
    check_scheme(url)
    with asking(url):
        store, root = connect(url)
        root = root.rstrip("/")
        inside = {path.split("/")[-2] for path in store.glob(f"{root}/*/{marker}")}
        return inside | {""} if store.exists(f"{root}/{marker}") else inside


class Remote:
    """The files of a results store in an object store."""

    def __init__(self, url: str) -> None:
        """List them; errors as of `avex_serve.bundles.remote.asking`."""
        check_scheme(url)
        self.url = url.rstrip("/")
        with asking(self.url):
            self._store, self._root = connect(self.url)
            found = self._store.find(self._root, detail=True)
        start = len(self._root.rstrip("/")) + 1
        self.files = {path[start:]: int(info["size"]) for path, info in found.items() if len(path) > start}
        self._next_upload = 0.0

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Copy files into a folder."""
        if not names:
            return
        targets = [folder / name for name in names]
        for parent in {target.parent for target in targets}:
            parent.mkdir(parents=True, exist_ok=True)
        with asking(self.url):
            self._store.get([self._path(name) for name in names], [str(target) for target in targets])

    def create(self, source: Path, name: str) -> None:
        """Store a file that nobody may replace. One that is there already has the same results, and stays."""
        with asking(self.url, "written"):
            try:
                self._store.put_file(str(source), self._path(name), mode="create")
            except OSError:  # by some stores not FileExistsError
                if not self._store.exists(self._path(name)):
                    raise
        self.files[name] = source.stat().st_size

    def replace(self, source: Path, name: str) -> None:
        """Store a file in place of the one of that name."""
        with asking(self.url, "written"):
            self._store.put_file(str(source), self._path(name))
        self.files[name] = source.stat().st_size

    def follow(self, source: Path, name: str) -> None:
        """Store a file that grows, but not so often that it takes much of the time."""
        began = time.monotonic()
        if began >= self._next_upload:
            self.replace(source, name)
            self._next_upload = time.monotonic() + max(10.0, RESTING * (time.monotonic() - began))

    def below(self, folder: str) -> Iterable[str]:
        """The names of the files in a folder, those that have lost their content left out."""
        return (name for name, size in self.files.items() if size and name.startswith(f"{folder}/"))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _look(info: Mapping[str, Any]) -> Look:
    return Look(info["size"], _nanoseconds(next(info[name] for name in MODIFIED if info.get(name) is not None)))


def _nanoseconds(moment: datetime | str | float) -> int:
    """Whole seconds: listings and the objects themselves may differ in what follows."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    elif not isinstance(moment, datetime):
        return int(moment) * 10**9
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (moment - EPOCH) // timedelta(seconds=1) * 10**9
