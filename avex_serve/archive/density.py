"""Call densities in a store, by label and site, from reviewed windows of it."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from avex_serve.annotations.reading import Recordings, read_annotations
from avex_serve.annotations.reviews import Decision, Review, Subject, agreed
from avex_serve.archive.files import sites_of
from avex_serve.archive.plan import ResultSet
from avex_serve.archive.store import Entry, Store
from avex_serve.archive.tables import chunks
from avex_serve.calibration.density import BANDS, Densities, Density, call_density
from avex_serve.database import connect, quoted
from avex_serve.errors import InputError, NotFoundError

ALL: Final = "(all)"  # in place of a site
SAME: Final = 0.05  # seconds: spans of reviews may be rounded
_VALUES: Final[dict[Decision, int]] = {"present": 1, "absent": 0, "unsure": -1}


class LabelDensity(NamedTuple):
    """The call density of a label, or the reason why there is none."""

    label: str
    found: Densities | None
    reason: str | None
    notes: tuple[str, ...]


def store_densities(
    store: Store,
    reviews: Iterable[Review],
    *,
    probe: str | None = None,
    sites: Mapping[str, str] | None = None,
    bands: int = BANDS,
    seed: int = 0,
) -> list[LabelDensity]:
    """The call density of every reviewed label.

    Args:
        store: open for reading.
        reviews: of its windows.
        probe: whose scores make the bands; None: the only one with the label.
        sites: by path of a recording; None: those of `sites_of`.
        bands: most bands of scores.
        seed: of the draws.

    Raises:
        NotFoundError: no scores, no such probe, or no reviewed window in the store.
        InputError: a label of several probes, or a recording without a site.
    """
    sets = store.current_scores()
    done = {results.name: store.done(results) for results in sets}
    entries = [entry for _, entry in sorted(store.journal().items()) if entry.computed]
    decisions = agreed(reviews)
    paths = [entry.path for entry in entries]
    site_of = dict(zip(paths, sites_of(paths) if sites is None else _named(paths, sites), strict=True))
    found = []
    heads = {label: _find_head(sets, label, probe) for label in sorted({subject.label for subject in decisions})}
    if decisions and not any(heads.values()):
        which = "no probe of the store" if probe is None else f"no probe {probe!r}"
        raise NotFoundError(f"{which} has the label {next(iter(heads))!r}, which was reviewed")
    for label, head in heads.items():
        if head is None:  # such as another label that somebody typed on the review page
            found.append(LabelDensity(label, None, "it has no scores here", ()))
            continue
        results, name = head
        own = {subject: decision for subject, decision in decisions.items() if subject.label == label}
        copies: dict[str, list[Entry]] = defaultdict(list)  # by content, which counts once
        for entry in entries:
            if entry.recording in done[results.name]:
                copies[entry.recording].append(entry)
        contents = list(copies.values())
        place, start, score = _read_scores(store, results, [first for first, *_ in contents], name, label)
        values, notes = _place(own, contents, place, start)
        member = np.array([site_of[first.path] for first, *_ in contents], str)
        try:
            densities = call_density(score, values, member[place], bands=bands, seed=seed)
            found.append(LabelDensity(label, densities, None, (*notes, *band_notes(densities))))
        except InputError as error:
            found.append(LabelDensity(label, None, str(error), notes))
    return found


def read_sites(path: Path) -> dict[str, str]:
    """The site of each recording, by its name or absolute path, from a table with the columns file and site.

    Paths may be relative to the table's folder.

    Raises:
        NotFoundError: no such file.
        InputError: no such columns, or a recording at two sites.
    """
    found: dict[str, str] = {}
    for row in read_annotations(path):
        site = row.fields.get("site")
        if not site or not row.file:
            raise InputError(f"{path}: expected the columns file and site, with both in every row")
        here = os.path.abspath(path.parent / row.file)  # noqa: PTH100 - as `run` writes it
        file = here if os.path.isfile(here) else row.file  # noqa: PTH113
        if found.setdefault(file, site) != site:
            raise InputError(f"{path}: {row.file} is at the sites {found[file]} and {site}")
    return found


def densities_table(found: Iterable[LabelDensity]) -> str:
    """CSV: a row for each label, and for each label and site."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "site", "density", "low", "high", "windows", "reviewed", "present"])
    for label, site, density in _rows(found):
        shares = (f"{value:.6g}" for value in density[:3])
        writer.writerow([label, site, *shares, *density[3:]])
    return text.getvalue()


def densities_text(found: Sequence[LabelDensity]) -> str:
    """The same for a terminal."""
    lines = [f"{'label':24} {'site':24} {'windows with the sound':>24} {'reviewed':>9} {'windows':>9}"]
    for label, site, density in _rows(found):
        shares = f"{density.value:.1%} ({density.low:.1%}–{density.high:.1%})"
        lines.append(f"{label[:24]:24} {site[:24]:24} {shares:>24} {density.reviewed:9} {density.windows:9}")
    for each in found:
        lines += [f"{each.label}: {each.reason}"] if each.reason else []
        lines += [f"note: {each.label}: {note}" for note in each.notes]
    return "\n".join(lines)


def _rows(found: Iterable[LabelDensity]) -> Iterable[tuple[str, str, Density]]:
    for each in found:
        if each.found is not None:
            yield each.label, ALL, each.found.all
            if len(each.found.sites) > 1:
                yield from ((each.label, site, density) for site, density in each.found.sites.items())


def _find_head(sets: Sequence[ResultSet], label: str, probe: str | None) -> tuple[ResultSet, str] | None:
    """The scores of a label, None if there are none; InputError if several probes have it."""
    heads = [
        (results, head.name)
        for results in sets
        for head in results.probes
        if label in head.labels and probe in (None, head.name)
    ]
    if len(heads) > 1:
        raise InputError(
            f"several probes have the label {label!r}: {', '.join(n for _, n in heads)}; name one by --probe"
        )
    return heads[0] if heads else None


def _read_scores(
    store: Store, results: ResultSet, entries: Sequence[Entry], probe: str, label: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the recording, start in seconds, and score of each window (N,)."""
    found: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
    first = 0
    with connect() as database:
        for chunk in chunks(entries, 1):
            digests = [str(entry.recording) for entry in chunk]
            files = ", ".join(map(quoted, store.paths(results, digests)))
            index = {"recording": np.array(digests, object), "place": np.arange(first, first + len(chunk))}
            database.register("chunk", index)
            columns = database.execute(
                f"SELECT place, start, score FROM read_parquet([{files}]) JOIN chunk USING (recording) "
                "WHERE probe = ? AND label = ? ORDER BY place, start",
                [probe, label],
            ).fetchnumpy()
            found.append((columns["place"], columns["start"], columns["score"].astype(np.float64)))
            first += len(chunk)
    place, start, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return place, start, score


def _place(
    decisions: Mapping[Subject, Decision], contents: Sequence[Sequence[Entry]], place: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The decision on each window (N,) as in `call_density`, and notes on those that fit no window."""
    by_path = {Path(entry.path): i for i, copies in enumerate(contents) for entry in copies}
    names = Recordings(Path(first.path) for first, *_ in contents)
    values = np.full(place.size, -1, np.int8)
    lost = unsure = 0
    first = np.searchsorted(place, np.arange(len(contents) + 1))
    for subject, decision in decisions.items():
        path = Path(subject.file)
        found = [path] if path in by_path else names.named(subject.file)
        if len(found) != 1:
            lost += 1
            continue
        recording = by_path[found[0]]
        apart = np.abs(start[first[recording] : first[recording + 1]] - subject.start)
        if apart.min(initial=np.inf) > SAME:
            lost += 1
            continue
        values[first[recording] + apart.argmin()] = _VALUES[decision]
        unsure += decision == "unsure"
    notes = []
    if lost:
        notes.append(f"{lost} of {len(decisions)} decisions are about windows that the store doesn't have")
    if unsure:
        notes.append(f"{unsure} windows are unsure, and count as not reviewed")
    return values, tuple(notes)


def _named(paths: Sequence[str], sites: Mapping[str, str]) -> list[str]:
    """The site of each recording by its path or name; InputError if one has none."""
    found = [sites.get(path, sites.get(os.path.basename(path), "")) for path in paths]  # noqa: PTH119
    if "" in found:
        raise InputError(f"{paths[found.index('')]} has no site; give it in a row of the table of sites")
    return found


def band_notes(found: Densities) -> list[str]:
    """What the estimate doesn't know: bands of scores without a reviewed window."""
    empty = [band for band in found.bands if not band.reviewed]
    share = sum(band.windows for band in empty) / found.all.windows
    if not empty:
        return []
    spans = ", ".join(f"{band.low:.3g} to {band.high:.3g}" for band in empty)
    return [
        f"no window with a score of {spans} was reviewed ({share:.1%} of the windows): review some, since anything "
        "may be in them"
    ]
