"""Which scores a table shows, and what a table says about its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo
from typing import Any

import msgspec

from avex_serve.archive.plan import Probe, ResultSet
from avex_serve.inference.scores import Threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which scores a table shows. None of it changes scores, so that another choice costs no inference."""

    threshold: Threshold = None  # lowest score; see `avex_serve.inference.scores.Selection`
    top_k: int | None = None  # most labels of a window and a probe
    labels: Sequence[str] | None = None  # the labels to show; None: all
    merge_gap: float | None = None  # seconds between windows that become one row; None: windows stay apart
    zone: tzinfo | None = None  # of times that come without an offset; None: it stays unknown
    merge_mean: bool = False  # the score of such a row is the mean of the windows' instead of the highest


def describe(sets: Sequence[ResultSet], choice: Choice) -> dict[str, Any]:
    """What a table is made from, and what was chosen, as JSON has it."""
    chosen = {name: getattr(choice, name) for name in Choice.__slots__}
    return {
        "results": [msgspec.to_builtins(_without_labels(results)) for results in sets],
        "choice": {
            name: str(value) if name == "zone" else value for name, value in chosen.items() if value is not None
        },
    }


def _without_labels(results: ResultSet) -> ResultSet:
    """The set without its labels, which may be thousands."""
    probes = tuple(Probe(probe.name, (), probe.scale, probe.trained) for probe in results.probes)
    return msgspec.structs.replace(results, probes=probes)


def in_zone(start: datetime | None, zone: tzinfo | None) -> datetime | None:
    """A time with the offset of the zone, unless it has one."""
    if start is None or start.tzinfo is not None or zone is None:
        return start
    offset = zone.utcoffset(start)
    return start.replace(tzinfo=None if offset is None else timezone(offset))
