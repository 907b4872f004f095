"""The repository: every bundle that is served, by name and version, and their exchange while requests run.

    with repository.lease("my_probe") as engine:
        engine.predict(wave, rate)

A bundle that was added, replaced or removed on disk is noticed by `Repository.refresh`. The new engine is opened
beside the old one, checked and asked once before it takes the old one's place; the old one is closed when the
last request that leased it has ended. A bundle that is refused keeps none of the others from being served, and where
it lies in the place of one that was served, that one goes on.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from avex_serve.bundles.folders import Stamp, find_bundles, is_gone, stamp
from avex_serve.bundles.manifest import Manifest
from avex_serve.bundles.reading import read_manifest
from avex_serve.errors import AvexServeError, BundleError, InputError, NotFoundError, UnavailableError
from avex_serve.inference.engine import Engine

logger = logging.getLogger(__name__)

UNLOADED: Final = "unloaded; load it to serve it again"


@dataclass(frozen=True)
class ModelState:
    """A bundle on disk, as the index of the repository shows it."""

    name: str
    version: str  # "" where the bundle can't be read
    ready: bool
    reason: str  # why what lies on disk is not served; "" if it is


class _Served:
    """An engine and how many requests use it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.leases = 0
        self.retired = False

    @property
    def key(self) -> tuple[str, str]:
        return self.engine.manifest.name, self.engine.manifest.version


class _Place:
    """A folder with a bundle: what is served of it, and what is known of what lies there now."""

    def __init__(self, folder: Path, name: str, version: str) -> None:
        self.folder = folder
        self.name, self.version = name, version  # of what lies there
        self.served: _Served | None = None
        self.reason = ""  # why what lies there is not served
        self.logged = ""  # the reason that stands in the log
        self.seen: Stamp | None = None  # at the last look
        self.settled: Stamp | None = None  # what was opened, or refused for good
        self.gone = False  # at the last look

    def is_called(self, name: str) -> bool:
        return name == self.name or (self.served is not None and name == self.served.key[0])


class Repository:
    """Bundles by name and version. All methods may be called from several threads at once."""

    def __init__(self, roots: Sequence[Path], open_engine: Callable[[Path], Engine]) -> None:
        """Open what lies in the roots.

        Args:
            roots: each a bundle or a folder of bundles, see `find_bundles`.
            open_engine: opens the bundle in a folder and checks it, as `open_bundle` does.

        Raises:
            BundleError: no bundle there can be served; the message has every reason.
        """
        self._roots = tuple(roots)
        self._open_engine = open_engine
        self._places: dict[Path, _Place] = {}
        self._unloaded: set[str] = set()
        self._changing = threading.Lock()  # one change at a time; held while bundles are opened
        self._lock = threading.Lock()  # for what requests read; held for moments
        self._served: dict[tuple[str, str], _Served] = {}
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        with self._changing:
            self._look_around(patient=False)
        if not self._served:
            raise BundleError("; ".join(place.reason for place in self._places.values()))

    def close(self) -> None:
        """End watching and close every engine; those that requests have leased, when the last of these ends."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._changing:
            for place in self._places.values():
                self._exchange(place, None)

    def watch(self, seconds: float) -> None:
        """Look at the disk again and again with so many seconds between, until `close`."""
        self._watcher = threading.Thread(target=self._watch, args=(seconds,), name="avex-reload", daemon=True)
        self._watcher.start()

    def is_watching(self) -> bool:
        """Whether the thread of `watch` still runs."""
        return self._watcher is not None and self._watcher.is_alive()

    @contextmanager
    def lease(self, name: str | None = None, version: str | None = None) -> Iterator[Engine]:
        """The engine of a model, open until the block ends.

        Args:
            name: of the bundle; None or "": the only one.
            version: None or "": the newest one, by the numbers in it.

        Raises:
            InputError: no name, and several models are served.
            NotFoundError: no such model or version.
            UnavailableError: it is known and not served.
        """
        with self._lock:
            served = self._find(name, version)
            served.leases += 1
        try:
            yield served.engine
        finally:
            self._give_back(served)

    @contextmanager
    def lease_those(self, wanted: Callable[[Manifest], bool]) -> Iterator[list[Engine]]:
        """The engines wanted of those served, by name and the newest version first; open until the block ends."""
        with self._lock:
            leased = [served for served in self._newest_first() if wanted(served.engine.manifest)]
            for served in leased:
                served.leases += 1
        try:
            yield [served.engine for served in leased]
        finally:
            for served in leased:
                self._give_back(served)

    def manifests(self) -> list[Manifest]:
        """What is served now, by name with the newest version first."""
        with self._lock:
            return [served.engine.manifest for served in self._newest_first()]

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are served, the newest one last."""
        with self._lock:
            return self._versions(name)

    def index(self) -> list[ModelState]:
        """Every bundle on disk, those that are not served with the reason."""
        with self._lock:
            states = [
                ModelState(place.name, place.version, False, place.reason)
                if place.served is None
                else ModelState(*place.served.key, True, place.reason)
                for place in self._places.values()
            ]
        return sorted(states, key=lambda state: (state.name, _order(state.version)))

    def load(self, name: str) -> None:
        """Open every version of a model from disk anew, also if it was unloaded before.

        Raises:
            NotFoundError: there is none of that name.
            BundleError: a version that can't be served; where it was served before, that one still is.
        """
        with self._changing:
            self._find_places()
            called = self._called(name)
            self._unloaded.discard(name)
            for place in called:
                place.settled = None
                self._look_at(place, patient=False)
            if reasons := [place.reason for place in called if place.reason]:
                raise BundleError("; ".join(reasons))

    def unload(self, name: str) -> None:
        """Serve no version of a model until it is loaded again; requests that run end as they would have.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._changing:
            called = self._called(name)
            self._unloaded.add(name)
            for place in called:
                self._exchange(place, None, UNLOADED)
            logger.info("unloaded %s", name)

    def refresh(self) -> None:
        """Look at the disk and take what is new there into service.

        Files that make no whole bundle may be those of one that is still being copied: it is refused once it is
        the same at two looks. In the same way a folder has to be gone at two looks, since replacing one takes it
        away for a moment.
        """
        with self._changing:
            self._look_around(patient=True)

    def _watch(self, seconds: float) -> None:
        while not self._closing.wait(seconds):
            try:
                self.refresh()
            except Exception as error:
                # The next look may go well, and nobody would take it if this thread ended.
                logger.error("unexpected error while looking for new bundles", exc_info=error)

    def _look_around(self, *, patient: bool) -> None:
        found = self._find_places()
        for folder in found:
            self._look_at(self._places[folder], patient=patient)
        # Only now: a bundle whose folder was renamed has been taken over from the new one.
        for place in [place for folder, place in self._places.items() if folder not in found]:
            self._look_after(place)

    def _find_places(self) -> list[Path]:
        found = find_bundles(self._roots)
        for folder in found:
            if folder not in self._places:
                # Only until the manifest tells; a folder below a folder of bundles is a version.
                nested = folder not in self._roots and folder.parent not in self._roots
                name, version = (folder.parent.name, folder.name) if nested else (folder.name, "")
                with self._lock:
                    self._places[folder] = _Place(folder, name, version)
        return found

    def _called(self, name: str) -> list[_Place]:
        if called := [place for place in self._places.values() if place.is_called(name)]:
            return called
        raise NotFoundError(f"no model {name!r} in the folders that are served; known: {self._names()}")

    def _look_at(self, place: _Place, *, patient: bool) -> None:
        now = stamp(place.folder)
        settled, place.seen, place.gone = not patient or now == place.seen, now, False
        if now == place.settled:
            return
        folder = place.folder.resolve()  # where links lead to releases, all files have to be of the same one
        try:
            manifest = read_manifest(folder).manifest
            with self._lock:
                place.name, place.version = manifest.name, manifest.version
            if manifest.name in self._unloaded:
                self._exchange(place, None, UNLOADED)
                return
            self._check_unique(place, manifest)
            engine = self._open(folder)
        except AvexServeError as error:
            self._refuse(place, str(error), now if settled else None)
            return
        except Exception as error:
            logger.error("unexpected error with the bundle in %s", place.folder, exc_info=error)
            self._refuse(place, f"{place.folder} can't be opened: {error!r}", now)
            return
        if stamp(place.folder) != now:
            engine.close()  # it may be half of one bundle and half of another
            self._refuse(place, f"{place.folder} was changed while it was opened", None)
            return
        place.settled = now
        self._exchange(place, engine)
        logger.info(
            "serving bundle %s, version %s, from %s on %s (%s)",
            manifest.name,
            manifest.version,
            place.folder,
            engine.backend.device,
            engine.backend.format,
        )
        if not manifest.trained:
            logger.warning("bundle %s has random weights: its answers mean nothing", manifest.name)

    def _check_unique(self, place: _Place, manifest: Manifest) -> None:
        other = self._place_of((manifest.name, manifest.version))
        if other is None or other is place or (other.gone and is_gone(other.folder)):
            return
        raise BundleError(
            f"{place.folder} holds {manifest.name}, version {manifest.version}, which is served from "
            f"{other.folder}; remove one of the two, or give it another version"
        )

    def _place_of(self, key: tuple[str, str]) -> _Place | None:
        """Where the model of that name and version is served from."""
        return next((place for place in self._places.values() if place.served and place.served.key == key), None)

    def _open(self, folder: Path) -> Engine:
        engine = self._open_engine(folder)
        try:
            _warm_up(engine)
        except AvexServeError:
            engine.close()
            raise
        return engine

    def _refuse(self, place: _Place, reason: str, settled: Stamp | None) -> None:
        with self._lock:
            place.reason, place.settled = reason, settled
        if settled is None or reason == place.logged:
            return
        place.logged = reason
        if place.served is None:
            logger.error("not served: %s", reason)
        else:
            logger.error("not served, the bundle before it goes on: %s", reason)

    def _look_after(self, place: _Place) -> None:
        """What becomes of a folder that holds no bundle any more."""
        gone = is_gone(place.folder)
        if place.served is not None and not (gone and place.gone):
            place.gone = gone  # without a manifest a folder is one that is being copied
            if gone:  # and what lies elsewhere under its name may take over
                self._reconsider(place.served.key)
            return
        if place.served is not None:
            logger.info("bundle %s, version %s, is gone: %s", *place.served.key, place.folder)
        self._exchange(place, None)
        with self._lock:
            del self._places[place.folder]

    def _exchange(self, place: _Place, engine: Engine | None, reason: str = "") -> None:
        """Serve this engine, or none, in place of the one before; also of one of its name from another folder."""
        fresh = None if engine is None else _Served(engine)
        before = [place.served] if place.served is not None else []
        with self._lock:
            place.served = None
            if fresh is not None and (other := self._place_of(fresh.key)) is not None and other.served is not None:
                before.append(other.served)
                other.served = None
            for served in before:
                del self._served[served.key]
                served.retired = True
            if fresh is not None:
                place.served = self._served[fresh.key] = fresh
            else:
                place.settled = None
            place.reason = place.logged = reason
            idle = [served for served in before if served.leases == 0]
        for served in idle:
            served.engine.close()
        for served in before:
            self._reconsider(served.key)

    def _reconsider(self, key: tuple[str, str]) -> None:
        """Look again at what is refused because this one is served."""
        for place in self._places.values():
            if place.reason and (place.name, place.version) == key:
                place.settled = None

    def _give_back(self, served: _Served) -> None:
        with self._lock:
            served.leases -= 1
            idle = served.retired and served.leases == 0
        if idle:
            served.engine.close()

    def _find(self, name: str | None, version: str | None) -> _Served:
        if not name:
            names = {name for name, _ in self._served}
            if len(names) > 1:
                raise InputError(f"several models are served: {self._names()}; name one as the option 'model'")
            if not names:
                raise UnavailableError("no model is served at present; the index of the repository tells why")
            name = names.pop()
        versions = self._versions(name)
        if served := self._served.get((name, version or (versions[-1] if versions else ""))):
            return served
        for place in self._places.values():
            if place.name == name and place.served is None and version in (None, "", place.version):
                raise UnavailableError(f"model {name!r} is not served: {place.reason}")
        if not versions:
            raise NotFoundError(f"no model {name!r} here; this server has {self._names()}")
        known = ", ".join(map(repr, versions))
        raise NotFoundError(f"model {name!r} has no version {version!r}; it has {known}")

    def _newest_first(self) -> list[_Served]:
        versions = sorted(self._served.values(), key=lambda served: _order(served.key[1]), reverse=True)
        return sorted(versions, key=lambda served: served.key[0])

    def _versions(self, name: str) -> list[str]:
        return sorted((version for other, version in self._served if other == name), key=_order)

    def _names(self) -> str:
        return ", ".join(repr(name) for name in sorted({name for name, _ in self._served})) or "none"


def _warm_up(engine: Engine) -> None:
    """Answer once for silence, so that the first client doesn't wait for what is set up with the first inference.

    Raises:
        BundleError: the graph loads and doesn't answer.
    """
    manifest = engine.manifest
    try:
        if manifest.audio is not None:
            rate = manifest.audio.sample_rate
            engine.infer_recording(np.zeros(manifest.audio.window_samples, np.float32), rate)
        else:
            engine.infer(np.zeros([1 if size == -1 else size for size in manifest.inputs[0].shape], np.float32))
    except Exception as error:  # onnxruntime and torch raise errors of their own
        raise BundleError(f"bundle {manifest.name} loads, and fails to answer for silence: {error}") from error


def _order(version: str) -> list[tuple[int, str]]:
    """Sorts versions by the numbers in them, so that 10 comes after 9 and 1.10 after 1.9."""
    parts = re.split(r"([0-9]+)", version)  # text and numbers take turns
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]
