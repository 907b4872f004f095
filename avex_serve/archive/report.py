"""The results of a run as one page: counts, pictures, sounds, and what could not be computed."""

import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import numpy as np

from avex_serve.annotations.table import Annotation, Recording, Table, absolute_time
from avex_serve.archive.plan import ResultSet
from avex_serve.archive.store import Entry, Store
from avex_serve.archive.tables import Choice, make_table
from avex_serve.audio.recorder import format_offset
from avex_serve.errors import AvexServeError
from avex_serve.seeing import clips, page, pictures

PAGE: Final = "report.html"  # in the folder of a store
TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
MOST_EXAMPLES: Final = 150  # of all labels, about 50 kB each
MOST_ROWS: Final = 1000  # of a list or table
MOST_DAYS: Final = 366  # columns of a picture; of more days, the months are counted
REVIEW: Final = "http://127.0.0.1:8766/?"  # of a window in avex-serve review, while that runs
APART: Final = 10.0  # seconds between two examples from one recording


class Key(NamedTuple):
    """What is counted together."""

    label: str
    probe: str
    bundle: str


class Example(NamedTuple):
    """A detection that is shown. The order is that of the scores, and the same each time."""

    score: float
    path: str
    annotation: Annotation
    recording: Recording


@dataclass
class ShownRows:
    """The first of many rows, and how many there are."""

    shown: list[Any] = field(default_factory=list)
    total: int = 0

    @classmethod
    def of(cls, rows: Iterable[Any]) -> "ShownRows":
        """Rows of which all but the first `MOST_ROWS` are only counted."""
        kept = cls()
        for row in rows:
            kept.add(row)
        return kept

    def add(self, row: Any) -> None:
        """Count a row, and keep it if it is one of the first."""
        self.total += 1
        if self.total <= MOST_ROWS:
            self.shown.append(row)


@dataclass
class Counts:
    """The counts of all detections, in memory that grows with labels and days but not with detections."""

    examples: int  # for each label
    detections: Counter[Key] = field(default_factory=Counter)
    recordings: Counter[Key] = field(default_factory=Counter)
    hours: dict[Key, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    days: dict[Key, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    recorded_hours: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds
    recorded_days: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds
    zones: Counter[str] = field(default_factory=Counter)  # recordings
    timeless: int = 0  # recordings without a known start
    best: dict[Key, list[Example]] = field(default_factory=lambda: defaultdict(list))  # heaps
    highest: dict[Key, Annotation] = field(default_factory=dict)
    empty: ShownRows = field(default_factory=ShownRows)  # paths of recordings without detections
    seconds: float = 0.0
    _seen: set[str] = field(default_factory=set)  # digests: examples of a copy would be the same

    def add(self, recording: Recording, annotations: Sequence[Annotation]) -> None:
        """Count the detections of a recording."""
        self.seconds += recording.duration
        self._add_times(recording)
        if not annotations:
            self.empty.add(recording.path)
        groups: dict[tuple[str, ...], list[Annotation]] = defaultdict(list)
        for each in annotations:
            groups[each.label, each.probe, each.bundle, each.version].append(each)
        for (label, probe, bundle, version), group in groups.items():
            key = Key(label, probe, f"{bundle} {version}")
            if recording.start is not None:
                begun = recording.start.replace(minute=0, second=0, microsecond=0)
                into = (recording.start - begun).total_seconds()
                for hours, count in Counter(int((into + each.start) // 3600) for each in group).items():
                    moment = (begun + timedelta(hours=hours)).isoformat()
                    self.hours[key][moment[11:13]] += count
                    self.days[key][moment[:10]] += count
            self.detections[key] += len(group)
            self.recordings[key] += 1
            highest = max(group, key=lambda each: each.score)
            self.highest[key] = max(self.highest.get(key, highest), highest, key=lambda each: each.score)
            if self.examples and recording.digest not in self._seen:
                self._add_examples(key, recording, group)
        self._seen.add(recording.digest)

    def _add_times(self, recording: Recording) -> None:
        if recording.start is None:
            self.timeless += 1
            return
        self.zones[format_offset(recording.start.utcoffset()) or "unknown"] += 1
        for moment, seconds in _by_hour(recording):
            self.recorded_hours[moment[11:13]] += seconds
            self.recorded_days[moment[:10]] += seconds

    def _add_examples(self, key: Key, recording: Recording, group: Sequence[Annotation]) -> None:
        heap = self.best[key]
        chosen: list[Annotation] = []
        for each in sorted(group, key=lambda each: (-each.score, each.start)):
            full = len(heap) == self.examples and each.score <= heap[0].score
            if full or len(chosen) == self.examples:
                break
            if all(abs(each.start - other.start) >= APART for other in chosen):
                chosen.append(each)
                example = Example(each.score, recording.path, each, recording)
                (heapq.heappush if len(heap) < self.examples else heapq.heapreplace)(heap, example)


def _by_hour(recording: Recording) -> Iterator[tuple[str, float]]:
    """The hours that a recording is in, as ISO 8601, and how many seconds of each."""
    assert recording.start is not None
    moment, left = recording.start, recording.duration
    while left > 0:
        begun = moment.replace(minute=0, second=0, microsecond=0)
        seconds = min(left, (begun + timedelta(hours=1) - moment).total_seconds())
        yield begun.isoformat(), seconds
        moment, left = begun + timedelta(hours=1), left - seconds


def make_report(store: Store, choice: Choice, examples: int) -> str:
    """A page of HTML about the last run's results.

    Args:
        store: open for reading.
        choice: which detections are shown, as in tables.
        examples: for each label, the most to show with picture and sound.

    Raises:
        NotFoundError, InputError: as of `make_table`, for a store that has scores.
    """
    sets = store.current()
    entries = sorted(store.journal().values(), key=lambda entry: entry.path)
    scored = any(results.kind == "scores" for results in sets)
    table = make_table(store, choice) if scored else Table([], (), {"choice": {}})
    counts = Counts(examples)
    for recording, annotations in table.rows:
        counts.add(recording, annotations)
    keys = sorted(counts.detections, key=lambda key: (-counts.detections[key], key))
    chosen = keys[: MOST_EXAMPLES // examples] if examples else []
    by_path = {entry.path: entry for entry in entries}
    channels = {f"{each.bundle} {each.version}": each.identity.get("channel", "mix") for each in sets}
    failed = [entry.error for entry in entries if entry.error is not None]
    here = {recording.path for recording in table.recordings}
    missing = [entry.path for entry in entries if entry.error is None and entry.path not in here]
    return page.render(
        TEMPLATE,
        store=store.folder.resolve().name,
        totals={
            "recordings": len(entries),
            "hours": f"{counts.seconds / 3600:.1f}",
            "detections": counts.detections.total(),
            "labels": len({key.label for key in keys}),
            "failed": len(failed),
            "not computed": len(missing),
        },
        notes=_notes(sets, scored=scored),
        labels=ShownRows.of(_label_row(counts, key) for key in keys),
        several=len({key[1:] for key in keys}) > 1,
        calibrated=any(each.probability is not None for each in counts.highest.values()),
        grids=_grids(counts, keys),
        times=_times(counts),
        examples=[
            {
                "label": key.label,
                "clips": [
                    _clip(each, by_path[each.path], channels.get(key.bundle, "mix"))
                    for each in sorted(counts.best[key], reverse=True)
                ],
            }
            for key in chosen
        ],
        without_examples=len(keys) - len(chosen),
        lists={
            "failed": ShownRows.of(failed),
            "without detections": counts.empty,
            "with warnings": ShownRows.of(
                f"{entry.path}: {warning}" for entry in entries for warning in entry.warnings if entry.path in here
            ),
            "not computed": ShownRows.of(missing),
        },
        choice=json.dumps(table.about["choice"], ensure_ascii=False) if table.about["choice"] else "the default",
        sets=[_described(results) for results in sets],
    )


def _notes(sets: Sequence[ResultSet], *, scored: bool) -> list[str]:
    notes = [] if scored else ["The store has no scores: run a bundle with a probe, or classify its embeddings."]
    return notes + [
        f"The head {probe.name} of {results.bundle} has random weights: its scores mean nothing."
        for results in sets
        for probe in results.probes
        if not probe.trained
    ]


def _label_row(counts: Counts, key: Key) -> dict[str, Any]:
    return {
        **key._asdict(),
        "detections": counts.detections[key],
        "recordings": counts.recordings[key],
        "score": counts.highest[key].score,
        "probability": counts.highest[key].probability,
    }


def _times(counts: Counts) -> str:
    """What the hours and days count, by the zones of the recordings."""
    if not counts.zones:
        return "Hours and days are left out: when the recordings began is not known." if counts.timeless else ""
    zones = ", ".join(f"{zone} ({count})" for zone, count in sorted(counts.zones.items()))
    left_out = f" Without a known time, and left out: {counts.timeless}." if counts.timeless else ""
    return f"Hours and days are those of the recorders' clocks. Recordings by offset from UTC: {zones}.{left_out}"


def _grids(counts: Counts, keys: Sequence[Key]) -> list[dict[str, str]]:
    """Pictures of detections by hour and by day, if times are known."""
    if not counts.zones or not keys:
        return []
    rows = keys[: pictures.LANES]
    days: Mapping[Key, Mapping[str, float]] = counts.days
    recorded, size = counts.recorded_days, "day"
    if len(recorded) > MOST_DAYS:
        recorded, size = _months(recorded), "month"
        days = {key: _months(found) for key, found in days.items()}
    return [
        _grid("hour", rows, [f"{hour:02}" for hour in range(24)], counts.hours, counts.recorded_hours),
        _grid(size, rows, sorted(recorded), days, recorded),
    ]


def _months(days: Mapping[str, float]) -> dict[str, float]:
    months: dict[str, float] = defaultdict(float)
    for day, count in days.items():
        months[day[:7]] += count
    return months


def _grid(
    name: str,
    rows: Sequence[Key],
    columns: Sequence[str],
    found: Mapping[Key, Mapping[str, float]],
    recorded: Mapping[str, float],
) -> dict[str, str]:
    counts = np.array([[found.get(key, {}).get(column, 0) for column in columns] for key in rows])
    hours = np.array([recorded.get(column, 0) / 3600 for column in columns])
    totals = counts.sum(axis=0)
    most = int(totals.argmax())
    summary = (
        f"Detections of {len(rows)} labels by {name}, {columns[0]} to {columns[-1]}, below the hours recorded; most "
        f"in {columns[most]}: {int(totals[most])}"
    )
    picture = pictures.draw_grid([key.label for key in rows], columns, counts, hours)
    return {"name": name, "summary": summary, "picture": clips.data_uri("image/webp", picture)}


def _clip(example: Example, entry: Entry, channel: Any) -> dict[str, Any]:
    """An example with picture and sound, or the reason why there are none."""
    annotation = example.annotation
    moment = absolute_time(example.recording, annotation.start)
    known = "" if annotation.probability is None else f", probability {annotation.probability:.3f}"
    shown = {
        "label": annotation.label,
        "caption": f"{example.score:.3f}{known}, {annotation.start:.1f} to {annotation.end:.1f} s"
        + (f", {moment}" if moment else ""),
        "file": example.path,
        "reason": None,
        "review": REVIEW
        + urlencode(
            {"file": example.path, "start": f"{annotation.start:.3f}", "label": annotation.label},
            errors="surrogateescape",
        ),
    }
    try:
        status = os.stat(example.path)  # noqa: PTH116
        if (status.st_size, status.st_mtime_ns) != (entry.size, entry.modified):
            return shown | {"reason": "The file has changed since it was computed."}
        frames = round(entry.duration * entry.sample_rate)
        return shown | page.illustrate(example.path, annotation.start, annotation.end, frames, channel)
    except (OSError, AvexServeError) as error:
        return shown | {"reason": f"The recording can't be read: {error}"}


def _described(results: ResultSet) -> dict[str, Any]:
    rows: dict[str, Any] = {"results": f"{results.kind} {results.name}"}
    rows |= {name: _text(value) for name, value in results.identity.items()}
    rows["window"] = f"{results.cut.window:g} s"
    for probe in results.probes:
        rows[f"probe {probe.name}"] = f"{len(probe.labels)} labels, {probe.scale} scores"
    return {"bundle": results.bundle, "version": results.version, "rows": rows}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
