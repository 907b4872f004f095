"""The repository: every bundle that is served, by name and version, and their exchange while requests run.

    with repository.lease("my_probe") as engine:
        engine.predict(wave, rate)

`Repository.refresh` notices bundles that were added, replaced or removed on disk. It opens and checks the new engine
while the old one serves, before it takes the old one's place. The old engine is closed when
the last request that leased it has ended. A bundle that is refused doesn't affect the others; the bundle that it
would replace stays in service.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avex_serve.bundles.folders import Stamp, find_bundles, is_gone, stamp
from avex_serve.bundles.manifest import MANIFEST, Manifest
from avex_serve.bundles.reading import Bundle, check_files, read_manifest
from avex_serve.errors import AvexServeError, BundleError, InputError, NotFoundError, UnavailableError
from avex_serve.inference.engine import Engine

logger = logging.getLogger(__name__)

CHANGES: Final = ("served", "refused", "removed")  # what happens to bundles
DIGITS: Final = 12  # of a digest in the log
UNLOADED: Final = "unloaded; load it to serve it again"


@dataclass(frozen=True)
class ModelState:
    """A bundle on disk, as the index of the repository shows it."""

    name: str
    version: str  # "" where the bundle can't be read
    ready: bool
    reason: str  # why the files on disk are not served; "" if they are


@dataclass(eq=False)
class _Served:
    """An engine in service. It is closed when its last lease ends; the repository holds one until the exchange."""

    engine: Engine
    leases: int = 1

    @property
    def key(self) -> tuple[str, str]:
        return self.engine.manifest.name, self.engine.manifest.version


@dataclass(eq=False)
class _Place:
    """A folder with a bundle: what is served from it, and what is known of its present files."""

    folder: Path
    name: str  # of the present files, as `version`
    version: str
    served: _Served | None = None
    reason: str = ""  # why the present files are not served
    logged: str = ""  # the last reason in the log
    seen: Stamp | None = None  # at the last look
    settled: Stamp | None = None  # of the files that were opened, or refused for good
    gone: bool = False  # at the last look
    vacant: bool = False  # without a manifest at the last look


class Repository:
    """Bundles by name and version. All methods may be called from several threads at once."""

    def __init__(
        self, roots: Sequence[Path], open_engine: Callable[[Path], Engine], *, may_be_empty: bool = False
    ) -> None:
        """Open the bundles in the roots.

        Args:
            roots: each a bundle or a folder of bundles, see `find_bundles`.
            open_engine: opens the bundle in a folder, checks it and answers once, as `open_checked` does.
            may_be_empty: whether bundles may come later.

        Raises:
            BundleError: no bundle there can be served, and some must; the message has every reason.
        """
        self._roots = tuple(roots)
        self._open_engine = open_engine
        self._places: dict[Path, _Place] = {}
        self._unloaded: set[str] = set()
        self.changes = dict.fromkeys(CHANGES, 0)  # since the start, by their kind
        self._changing = threading.Lock()  # one change at a time; held while bundles are opened
        self._lock = threading.Lock()  # for what requests read; held for moments
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        with self._changing:
            self._look_around(patient=False)
        if not self._served() and not may_be_empty:
            raise BundleError("; ".join(place.reason for place in self._places.values()))

    def close(self) -> None:
        """End watching and close every engine; an engine that requests have leased is closed when they end."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._changing:
            for place in self._places.values():
                self._exchange(place, None)

    def watch(self, seconds: float, fetch: Callable[[], object] = lambda: None) -> None:
        """Call `fetch` and `refresh` with this many seconds between two calls, until `close`."""
        self._watcher = threading.Thread(target=self._watch, args=(seconds, fetch), name="avex-reload", daemon=True)
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
        with self._leased(lambda: [self._find(name, version)]) as (engine,):
            yield engine

    def lease_those(self, wanted: Callable[[Manifest], bool]) -> AbstractContextManager[list[Engine]]:
        """The engines whose manifest is wanted, by name and the newest version first; open until the block ends."""
        return self._leased(lambda: [served for served in self._served() if wanted(served.engine.manifest)])

    @contextmanager
    def _leased(self, choose: Callable[[], list[_Served]]) -> Iterator[list[Engine]]:
        with self._lock:
            leased = choose()
            for served in leased:
                served.leases += 1
        try:
            yield [served.engine for served in leased]
        finally:
            for served in leased:
                self._end_lease(served)

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are served, the newest one last."""
        with self._lock:
            return [served.key[1] for served in reversed(self._served()) if served.key[0] == name]

    def serves(self) -> bool:
        """Whether any model is served."""
        return any(place.served is not None for place in list(self._places.values()))

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
        """Open every version of a model from disk again, also after `unload`.

        Raises:
            NotFoundError: there is none of that name.
            BundleError: a version that can't be served; the bundle that was served before it still is.
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
        """Serve no version of a model until it is loaded again; running requests end normally.

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
        """Look at the disk and serve what is new there.

        Incomplete files may be those of a bundle that is still being copied, so they are refused only if they are
        the same at two looks. A folder counts as gone if it is gone at two looks, since replacing a folder removes
        it for a moment. A bundle that has lost its manifest at two looks goes on until its namesake in another
        folder takes over.
        """
        with self._changing:
            self._look_around(patient=True)

    def _watch(self, seconds: float, fetch: Callable[[], object]) -> None:
        while not self._closing.wait(seconds):
            try:
                fetch()
                self.refresh()
            except Exception as error:
                # The thread goes on: the next look may succeed.
                logger.error("unexpected error while looking for new bundles", exc_info=error)

    def _look_around(self, *, patient: bool) -> None:
        found = self._find_places()
        for folder in found:
            self._look_at(self._places[folder], patient=patient)
        # Last, so that a bundle whose folder was renamed is already served from the new one.
        for place in [place for folder, place in self._places.items() if folder not in found]:
            self._look_after(place)

    def _find_places(self) -> list[Path]:
        found = find_bundles(self._roots)
        for folder in found:
            if folder not in self._places:
                # Until the manifest is read. A folder below a folder of bundles is a version.
                nested = folder not in self._roots and folder.parent not in self._roots
                name, version = (folder.parent.name, folder.name) if nested else (folder.name, "")
                with self._lock:
                    self._places[folder] = _Place(folder, _as_utf8(name), _as_utf8(version))
        return found

    def _called(self, name: str) -> list[_Place]:
        called = [
            place
            for place in self._places.values()
            if name == place.name or (place.served is not None and name == place.served.key[0])
        ]
        if called:
            return called
        raise NotFoundError(f"no model {name!r} in the folders that are served; known: {self._names()}")

    def _look_at(self, place: _Place, *, patient: bool) -> None:
        now = stamp(place.folder)
        settled, place.seen = not patient or now == place.seen, now
        place.gone = place.vacant = False
        if now == place.settled:
            return
        folder = place.folder.resolve()  # if it links to a release, all files must come from the same release
        try:
            bundle = read_manifest(folder)
            manifest = bundle.manifest
            with self._lock:
                place.name, place.version = manifest.name, manifest.version
            if manifest.name in self._unloaded:
                self._exchange(place, None, UNLOADED)
                return
            self._check_unique(place, bundle)
            engine = self._open_engine(folder)
        except AvexServeError as error:
            self._refuse(place, str(error), now if settled else None)
            return
        except Exception as error:
            logger.error("unexpected error with the bundle in %s", place.folder, exc_info=error)
            self._refuse(place, f"{place.folder} can't be opened: {error!r}", now)
            return
        if stamp(place.folder) != now:
            engine.close()  # it may mix two bundles
            self._refuse(place, f"{place.folder} was changed while it was opened", None)
            return
        place.settled = now
        replaced = self._exchange(place, engine)
        self.changes["served"] += 1
        logger.info(
            "serving bundle %s, version %s, from %s on %s (%s), digest %s%s",
            manifest.name,
            manifest.version,
            place.folder,
            engine.backend.device,
            engine.backend.format,
            engine.bundle.digest[:DIGITS],
            "".join(f", in place of {_named(each)}" for each in replaced),
        )
        if not manifest.trained:
            logger.warning("bundle %s has random weights: its answers mean nothing", manifest.name)

    def _check_unique(self, place: _Place, bundle: Bundle) -> None:
        name, version = bundle.manifest.name, bundle.manifest.version
        other = self._place_of((name, version))
        if other is None or other is place or (other.vacant and is_gone(other.folder / MANIFEST)):
            return
        reason = (
            f"{place.folder} holds {name}, version {version}, which is served from {other.folder}; "
            "remove one of the two, or give it another version"
        )
        try:
            check_files(bundle)
        except BundleError as damage:
            raise BundleError(f"{damage}. Besides, {reason}") from None
        raise BundleError(reason)

    def _place_of(self, key: tuple[str, str]) -> _Place | None:
        """Where the model of that name and version is served from."""
        return next((place for place in self._places.values() if place.served and place.served.key == key), None)

    def _refuse(self, place: _Place, reason: str, settled: Stamp | None) -> None:
        with self._lock:
            place.reason, place.settled = _as_utf8(reason), settled
        if settled is None or reason == place.logged:
            return
        place.logged = reason
        self.changes["refused"] += 1
        if place.served is None:
            logger.error("not served: %s", reason)
        else:
            logger.error("not served, the bundle before it goes on: %s", reason)

    def _look_after(self, place: _Place) -> None:
        """Handle a folder that no longer holds a bundle."""
        gone = is_gone(place.folder)
        if place.served is not None and not (gone and place.gone):
            # A folder without a manifest may be one that is being copied, or a folder of versions by now.
            place.gone, place.vacant = gone, is_gone(place.folder / MANIFEST)
            if place.vacant:  # then the same bundle in another folder may take over
                self._reconsider(place.served.key)
            return
        if place.served is not None:
            self.changes["removed"] += 1
            logger.info("bundle %s, version %s, is gone: %s", *place.served.key, place.folder)
        self._exchange(place, None)
        with self._lock:
            del self._places[place.folder]

    def _exchange(self, place: _Place, engine: Engine | None, reason: str = "") -> list[Engine]:
        """Serve this engine, or none, in place of the one before, and of its namesake from another folder.

        Returns those that it has replaced.
        """
        fresh = None if engine is None else _Served(engine)
        with self._lock:
            namesake = None if fresh is None else self._place_of(fresh.key)
            places = [place] if namesake in (None, place) else [place, namesake]
            before = [each.served for each in places if each.served is not None]
            for each in places:
                each.served = None
            place.served = fresh
            if fresh is None:
                place.settled = None
            place.reason = place.logged = reason
        for served in before:
            self._end_lease(served)
            self._reconsider(served.key)
        return [served.engine for served in before]

    def _reconsider(self, key: tuple[str, str]) -> None:
        """Let the next look open again what was refused because this bundle was served."""
        for place in self._places.values():
            if place.reason and (place.name, place.version) == key:
                place.settled = None

    def _end_lease(self, served: _Served) -> None:
        with self._lock:
            served.leases -= 1
            unused = served.leases == 0
        if unused:
            served.engine.close()

    def _find(self, name: str | None, version: str | None) -> _Served:
        everything = self._served()
        if not name:
            names = {served.key[0] for served in everything}
            if len(names) > 1:
                raise InputError(f"several models are served: {self._names()}; name one as the option 'model'")
            if not names:
                raise UnavailableError("no model is served at present; the index of the repository has the reasons")
            name = names.pop()
        found = [served for served in everything if served.key[0] == name]
        for served in found:
            if not version or served.key[1] == version:
                return served
        for place in self._places.values():
            if place.name == name and place.served is None and version in (None, "", place.version):
                raise UnavailableError(f"model {name!r} is not served: {place.reason}")
        if not found:
            raise NotFoundError(f"no model {name!r} here; this server has {self._names()}")
        known = ", ".join(repr(served.key[1]) for served in reversed(found))
        raise NotFoundError(f"model {name!r} has no version {version!r}; it has {known}")

    def _served(self) -> list[_Served]:
        """What is served, by name and the newest version first."""
        served = [place.served for place in self._places.values() if place.served is not None]
        newest_first = sorted(served, key=lambda each: _order(each.key[1]))[::-1]
        return sorted(newest_first, key=lambda each: each.key[0])

    def _names(self) -> str:
        return ", ".join(dict.fromkeys(repr(served.key[0]) for served in self._served())) or "none"


def _order(version: str) -> list[tuple[int, str]]:
    """Sorts versions by the numbers in them, so that 10 comes after 9 and 1.10 after 1.9."""
    parts = re.split(r"([0-9]+)", version)  # text and numbers take turns
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


def _named(engine: Engine) -> str:
    return f"{engine.manifest.name}, version {engine.manifest.version}, digest {engine.bundle.digest[:DIGITS]}"


def _as_utf8(text: str) -> str:
    """The text, with question marks for the bytes of a path that are not UTF-8 and so can't be sent."""
    return text.encode("utf-8", "replace").decode()
