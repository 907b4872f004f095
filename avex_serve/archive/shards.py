"""A run on several machines that don't know of one another: each computes a shard, and `merge` joins their stores.

A recording belongs to a shard by its path alone. So all shards agree without a coordinator, and a longer list leaves
every recording in its shard.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from avex_serve.archive.files import shown
from avex_serve.archive.store import Entry, Part, Store, list_stores
from avex_serve.errors import InputError

SLURM: Final = "SLURM_ARRAY_TASK_ID"  # and _COUNT, _MIN, _MAX and _STEP in place of _ID
KUBERNETES: Final = "JOB_COMPLETION_INDEX"
COMPLETIONS: Final = "JOB_COMPLETIONS"  # Kubernetes doesn't tell a pod how many there are; the manifest does
NONE: Final = "none"
FOLDER: Final = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Shard:
    """One of several parts of a list of recordings."""

    index: int  # from 1
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        """The name of its store."""
        return f"{self.index}-of-{self.count}"

    def holds(self, path: str) -> bool:
        """Whether a recording belongs to the shard."""
        number = int.from_bytes(hashlib.sha256(shown(path).encode()).digest()[:8])
        return number % self.count == self.index - 1

    def take(self, recordings: Mapping[str, str | None]) -> tuple[dict[str, str | None], Part]:
        """The recordings of the shard, and what its store says of them.

        Args:
            recordings: of all shards, by absolute path; see `avex_serve.archive.run.run`.
        """
        own = {path: reason for path, reason in recordings.items() if self.holds(path)}
        digest = hashlib.sha256("\0".join(sorted(map(shown, recordings))).encode()).hexdigest()
        return own, Part(self.index, self.count, len(own), len(recordings), digest)


def find_shard(text: str | None, environment: Mapping[str, str]) -> tuple[Shard, str] | None:
    """The shard that an option or the environment names, and where it is named; None: all recordings.

    Args:
        text: of the option: i/n, or "none", whatever the environment says; None: the environment says it.
        environment: of Slurm's job arrays or of Kubernetes' Indexed Jobs.

    Raises:
        InputError: no such shard.
    """
    if text == NONE:
        return None
    if text is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise InputError(f"--shard is {text!r}; expected i/n, such as 1/8, or {NONE}")
        return _checked(int(found[1]), int(found[2]), "--shard")
    if environment.get(SLURM):
        return _checked(*_slurm(environment), SLURM)
    if environment.get(KUBERNETES):
        if not environment.get(COMPLETIONS):
            raise InputError(
                f"{KUBERNETES} is set, and {COMPLETIONS} is not; set it to the completions of the Job, or give "
                f"--shard i/n, or --shard {NONE} for all recordings"
            )
        index, count = (_number(environment, name) for name in (KUBERNETES, COMPLETIONS))
        return _checked(index + 1, count, KUBERNETES)
    return None


def find_stores(places: Iterable[str]) -> list[str]:
    """The stores in these folders, each of which is one or holds shards; InputError if there is none."""
    found: list[str] = []
    for place in places:
        inside = list_stores(place)
        shards = [f"{place.rstrip('/')}/{name}" for name in sorted(inside) if FOLDER.fullmatch(name)]
        if not shards and "" not in inside:
            raise InputError(f"{place} holds no shards; expected what avex-serve run --shard i/n --out writes")
        found += [place] if "" in inside else shards
    return found


def check_siblings(out: str, shard: Shard) -> None:
    """Raise InputError if a folder has shards of another number, of which one can't be computed again."""
    others = {found[2] for name in list_stores(out) if (found := FOLDER.fullmatch(name))} - {str(shard.count)}
    if others:
        raise InputError(
            f"{out} holds shards of {' and '.join(sorted(others))}, and this is shard {shard}; give --shard i/"
            f"{min(others)}, as before, or another --out"
        )


def check_shards(stores: Sequence[Store]) -> list[Store]:
    """The stores in the order of their shards.

    Raises:
        InputError: shards that don't belong together, are not all there or are not done.
    """
    by_index: dict[int, Store] = {}
    first = _part(stores[0])
    for store in stores:
        part = _part(store)
        if part.shards != first.shards:
            raise InputError(f"{store.place} is one of {part.shards} shards, {stores[0].place} of {first.shards}")
        if part.shard in by_index:
            raise InputError(f"{store.place} and {by_index[part.shard].place} are both shard {part.shard}")
        if (part.digest, part.recordings) != (first.digest, first.recordings):
            raise InputError(
                f"{store.place} and {stores[0].place} were made from different lists of recordings, of "
                f"{part.recordings} and {first.recordings}; start all shards again with the same list: they compute "
                "only what is missing"
            )
        if store.description.current != stores[0].description.current:
            raise InputError(
                f"{store.place} and {stores[0].place} were made by different bundles or options; start the shards "
                "again with the same"
            )
        by_index[part.shard] = store
    if lacking := [str(index) for index in range(1, first.shards + 1) if index not in by_index]:
        are = "is" if len(lacking) == 1 else "are"
        raise InputError(
            f"of {first.shards} shards, {', '.join(lacking)} {are} not there; run it, or name its folder"
        )
    for store in by_index.values():
        _check_done(store)
    if sum(_part(store).own for store in stores) != first.recordings:
        raise InputError("the shards don't cover their list; start them again with one version of avex-serve")
    return [by_index[index] for index in sorted(by_index)]


def merge(stores: Sequence[Store], target: Store) -> list[Entry]:
    """Join the stores of all shards of a run; the target then has the bytes of one run without shards.

    Results are linked where that can be, else copied. What the target has already stays.

    Args:
        stores: of all shards, as `check_shards` returns them.
        target: open for writing.

    Returns:
        The recordings.

    Raises:
        InputError: the target is a shard itself.
        StorageError: the disk is full.
    """
    if target.description.part is not None:
        raise InputError(f"{target.place} is a shard; choose an empty or new folder")
    entries = {entry.path: entry for store in (target, *stores) for entry in store.journal().values()}
    target.use_sets(stores[0].current())
    for store in stores:
        for results in store.sets().values():
            target.add_set(results)
            lacking = sorted(store.done(results) - target.done(results))
            for recording, path in zip(lacking, store.paths(results, lacking), strict=True):
                target.add_results(results, recording, path)
    target.write_journal(entries.values())
    return list(entries.values())


def _part(store: Store) -> Part:
    if store.description.part is None:
        raise InputError(f"{store.place} is no shard; expected what avex-serve run --shard i/n --out writes")
    return store.description.part


def _check_done(store: Store) -> None:
    part = _part(store)
    shard = Shard(part.shard, part.shards)
    done = [store.done(results) for results in store.current()]
    missing = 0
    for path, entry in store.journal().items():
        if not shard.holds(path):
            raise InputError(f"{store.place} holds {path}, which is not of shard {shard}; run it into a new folder")
        whole = entry.computed and all(entry.recording in names for names in done)
        missing += not whole and entry.error is None
    if missing:
        raise InputError(
            f"{store.place} is not done: {missing} recordings are missing; start shard {shard} again: it goes on"
        )


def _checked(index: int, count: int, source: str) -> tuple[Shard, str]:
    if not 1 <= index <= count:
        raise InputError(f"{source} says shard {index} of {count}; expected 1 to {count}, such as --shard 1/{count}")
    return Shard(index, count), source


def _slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    """Index and number of shards, by a job array such as 1-16, 0-15 or 0-30:2."""
    names = [SLURM.replace("_ID", f"_{each}") for each in ("ID", "COUNT", "MIN", "MAX", "STEP")]
    index, count, least, most = (_number(environment, name) for name in names[:-1])
    step = _number(environment, names[-1]) if environment.get(names[-1]) else 1
    if step < 1 or (most - least) // step + 1 != count:
        raise InputError(
            f"the job array has {count} tasks from {least} to {most}, so some are left out; give --shard i/n"
        )
    return (index - least) // step + 1, count


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}; expected a number, or give --shard i/n")
    return int(text)
