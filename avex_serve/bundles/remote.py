"""Bundles by URL: fetched into a folder on this machine, checked, and looked at again for changes.

The service's repository serves the folder as any other folder of bundles. A bundle appears in it whole: its files
are fetched into a hidden folder, their digests are checked, and the folder is renamed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

from avex_serve.bundles import bundle_cache
from avex_serve.bundles.folders import find_bundles
from avex_serve.bundles.hub import SCHEME, HubSource
from avex_serve.bundles.manifest import MANIFEST
from avex_serve.bundles.reading import read_bundle
from avex_serve.errors import AvexServeError, BundleError, DependencyError, InputError, UnavailableError

logger = logging.getLogger(__name__)

STORES: Final = {"s3": "s3fs", "gs": "gcsfs"}  # scheme: the package that fsspec needs for it
ONLY: Final = "bundle"  # the folder of a bundle that the URL itself names
DEEPEST: Final = 2  # folders below the URL: a model, and its versions
# What tells two states of a file apart, by the names that the stores give it.
IDENTITY: Final = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated", "mtime", "created", "size")

Files = dict[str, str]  # name within the bundle: its identity in the store


def is_remote(root: str) -> bool:
    """Whether it is a URL."""
    return "://" in root


def local_bundle(address: str | os.PathLike[str]) -> Path:
    """The folder of a bundle, by its path or URL. That of a URL is fetched if it is new or has changed.

    Args:
        address: a path, ``hf://owner/name[@revision]``, or a URL of an object store.

    Raises:
        AvexServeError: as of `Mirror`.
        InputError: the URL holds several bundles.
    """
    if not is_remote(str(address)):
        return Path(address)
    mirror = Mirror(str(address), bundle_cache())
    mirror.refresh()
    first, *others = find_bundles([mirror.folder])
    if others:
        names = ", ".join(str(each.relative_to(mirror.folder)) for each in (first, *others))
        raise InputError(f"{address} holds several bundles; add the name of one: {names}")
    return first


def is_bundle(address: str) -> bool:
    """Whether a path or URL is that of a bundle, and not of recordings.

    Raises:
        AvexServeError: as of `asking`, or a scheme that is not known.
    """
    if not is_remote(address):
        return (Path(address) / MANIFEST).is_file()
    if address.startswith(f"{SCHEME}://"):
        return True
    check_scheme(address)
    with asking(address):
        store, root = connect(address)
        return bool(store.exists(f"{root}/{MANIFEST}"))


def check_scheme(url: str, *others: str) -> str:
    """The package that fsspec needs for a URL; InputError for a scheme that is not known, nor one of the others."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        expected = ", ".join(f"{each}://" for each in (*others, *STORES))
        raise InputError(f"{url}: scheme {scheme}:// is not known; expected a path, or one of {expected}")
    return STORES[scheme]


def connect(url: str) -> tuple[Any, str]:
    """The object store of a URL, and the path in it; ImportError if the package for it is missing."""
    import fsspec

    store, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return store, str(path)


@contextmanager
def asking(url: str, what: str = "fetched") -> Iterator[None]:
    """Turn what goes wrong in the block, which asks an object store, into errors of ours.

    Args:
        url: of the store, for messages.
        what: what is to be done with it.

    Raises:
        DependencyError: the package for the store is missing.
        UnavailableError: the store doesn't answer, or refuses.
    """
    try:
        yield
    except AvexServeError:
        raise
    except ImportError:
        raise DependencyError(
            f"{url} needs {check_scheme(url)}, which is not installed; pip install 'avex-serve[cloud]'"
        ) from None
    except Exception as error:  # each store has errors of its own
        raise UnavailableError(f"{url} can't be {what}: {error or type(error).__name__}") from error


class Source(Protocol):
    """Where the bundles of a URL come from."""

    @property
    def advice(self) -> str:
        """What may help if a file is not the one of the manifest."""
        ...

    def find(self) -> dict[str, Files]:
        """The files of each bundle by its place below the URL, "" for the URL itself."""
        ...

    def fetch(self, place: str, files: Files, folder: Path) -> None:
        """Put the files of a bundle into a folder."""
        ...


class ObjectStore:
    """The bundles below a URL that fsspec knows."""

    advice = ""

    def __init__(self, url: str) -> None:
        """Nothing is asked yet; InputError for a scheme that is not known."""
        check_scheme(url, SCHEME)
        self._url = url

    def find(self) -> dict[str, Files]:
        """See `Source.find`."""
        store, root = connect(self._url)
        infos = {PurePosixPath(path).relative_to(root): info for path, info in store.find(root, detail=True).items()}
        places = {
            path.parent
            for path in infos
            if path.name == MANIFEST
            and len(path.parent.parts) <= DEEPEST
            and not any(part.startswith(".") for part in path.parent.parts)
        }
        found: dict[str, Files] = {}
        for path, info in infos.items():
            if path.parent in places:
                place = "" if path.parent == PurePosixPath() else str(path.parent)
                identity = [str(info[key]) for key in IDENTITY if info.get(key) is not None]
                found.setdefault(place, {})[path.name] = " ".join(identity)
        return found

    def fetch(self, place: str, files: Files, folder: Path) -> None:
        """See `Source.fetch`."""
        store, root = connect(self._url)
        for name in files:
            store.get_file(f"{root}/{place}".rstrip("/") + f"/{name}", str(folder / name))


class Mirror:
    """The folder that holds the bundles of a URL. Several processes may share it."""

    def __init__(self, url: str, cache: Path) -> None:
        """Nothing is fetched yet; InputError for a URL that can't be used."""
        self._url = url.rstrip("/")
        self._source: Source = (HubSource if url.startswith(f"{SCHEME}://") else ObjectStore)(self._url)
        self.folder = cache / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self._refused: dict[str, Files] = {}  # as they were when they were refused

    def refresh(self) -> None:
        """Fetch what is new or has changed, and remove what is gone.

        Raises:
            BundleError: a new bundle is not whole; the others are up to date.
            DependencyError: the package for the URL is missing.
            UnavailableError: the store, or the folder, can't be used; what was fetched before stays.
            AvexServeError: as of `avex_serve.bundles.hub.asking_hub`.
        """
        with asking(self._url):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._refresh()

    def _refresh(self) -> None:
        state = self._read_state()
        found = self._source.find()
        if not found:
            stay = "; those that were fetched stay" if state else f"; expected {MANIFEST} there, or in folders below"
            raise BundleError(f"{self._url} holds no bundle{stay}")
        faults = []
        for place, files in found.items():
            if state.get(place) == files and self._target(place).is_dir():
                continue
            if self._refused.get(place) == files:
                continue
            try:
                self._fetch(place, files)
            except BundleError as error:
                self._refused[place] = files
                faults.append(str(error))
            else:
                state[place] = files
                self._write_state(state)
        for place in state.keys() - found.keys():
            with suppress(OSError):  # a version that is still there may be in it
                for name in state[place]:
                    (self._target(place) / name).unlink(missing_ok=True)
                self._target(place).rmdir()
            del state[place]
            self._write_state(state)
        if faults:
            raise BundleError("; ".join(faults))

    def _fetch(self, place: str, files: Files) -> None:
        draft, before, target = self.folder / ".draft", self.folder / ".before", self._target(place)
        for each in (draft, before):
            shutil.rmtree(each, ignore_errors=True)
        draft.mkdir()
        self._source.fetch(place, files, draft)
        shown = f"{self._url}/{place}".rstrip("/")
        try:
            bundle = read_bundle(draft)
        except BundleError as error:
            raise BundleError(str(error).replace(str(draft), shown) + self._source.advice) from None
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.rename(before)
        draft.rename(target)
        shutil.rmtree(
            before, ignore_errors=True
        )  # a graph whose weights are mapped keeps its files until it is closed
        logger.info("fetched bundle %s, version %s, from %s", bundle.manifest.name, bundle.manifest.version, shown)

    def _target(self, place: str) -> Path:
        return self.folder / (place or ONLY)

    def _read_state(self) -> dict[str, Files]:
        try:
            return dict(json.loads((self.folder / ".state").read_text()))
        except (OSError, ValueError):  # the first look, or a write that was cut off: fetch everything again
            return {}

    def _write_state(self, state: dict[str, Files]) -> None:
        draft = self.folder / ".state.draft"
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / ".state")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time change the folder."""
        import fcntl

        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
