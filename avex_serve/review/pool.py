"""All windows that could be reviewed, and the choice of those that are reviewed next."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final, NamedTuple

import numpy as np

from avex_serve.annotations.reviews import Review
from avex_serve.archive.store import Entry
from avex_serve.errors import InputError, NotFoundError
from avex_serve.review.strategies import Candidates, arrange, keep_first

NEAR: Final = 1e-3  # seconds: starts that are as near are the same, since tables round them


class Sound(NamedTuple):
    """A recording to review."""

    path: str  # absolute
    start: datetime | None  # by the recorder's clock
    duration: float  # seconds; 0: unknown
    site: str  # its folder below the deepest folder of all recordings
    entry: Entry | None = None  # in the journal of a store


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Which candidates of a label are offered, and in which order."""

    strategy: str = "highest"  # a name in `avex_serve.review.strategies.STRATEGIES`
    seed: int = 0  # of all random choices
    lowest: float | None = None  # score
    highest: float | None = None  # score
    sites: Collection[str] | None = None
    first: date | None = None
    last: date | None = None  # included
    hours: tuple[int, int] | None = None  # from, and up to but not including; may pass midnight
    per_recording: int | None = None  # most candidates of one recording
    middle: float | None = None  # the score at which the label is as likely as not; None: the pool's
    similarity: np.ndarray | None = None  # (N,) of each window of the pool to an example

    def check(self) -> None:
        """Raise InputError for a filter that nothing can pass."""
        if self.lowest is not None and self.highest is not None and self.lowest > self.highest:
            raise InputError(f"scores from {self.lowest} to {self.highest}; expected the lower one first")
        if self.first is not None and self.last is not None and self.first > self.last:
            raise InputError(f"dates from {self.first} to {self.last}; expected the earlier one first")
        if self.hours is not None and not all(0 <= hour <= 24 for hour in self.hours):
            raise InputError(f"hours {self.hours[0]}-{self.hours[1]}; expected 0 to 24, such as 4-9 or 22-3")
        if self.per_recording is not None and self.per_recording < 1:
            raise InputError(f"{self.per_recording} candidates of each recording; expected at least 1")


class Suggestion(NamedTuple):
    """A window to review: is this label in it?"""

    window: int  # of the pool
    label: int  # of the pool
    score: float  # NaN: unknown


class Pool:
    """Windows of recordings, and the labels that may be in them."""

    def __init__(
        self,
        sounds: Sequence[Sound],
        labels: Sequence[str],
        recording: np.ndarray,
        spans: np.ndarray,
        candidates: Sequence[tuple[np.ndarray | None, np.ndarray]],
        middle: float = 0.5,
    ) -> None:
        """A pool.

        Args:
            sounds: the recordings.
            labels: C names.
            recording: (N,) int32, the recording of each window, in rising order; the windows of one by their start.
            spans: (N, 2) start and end of each window in seconds.
            candidates: for each label, its windows (M,), rising, and their scores (M,); None: all windows.
            middle: the score at which a label is as likely as not.
        """
        self.sounds = sounds
        self.labels = tuple(labels)
        self.recording = recording
        self.spans = spans
        self.middle = middle
        self.sites = tuple(sorted({sound.site for sound in sounds}))
        self._candidates = candidates
        place = {site: i for i, site in enumerate(self.sites)}
        site = np.array([place[sound.site] for sound in sounds], np.int32)
        starts = np.array([_seconds(sound.start) for sound in sounds], np.float64)
        self._site = site[recording]
        self._time = starts[recording] + spans[:, 0]
        self._first = np.searchsorted(recording, np.arange(len(sounds) + 1))
        self._by_path = {sound.path: i for i, sound in enumerate(sounds)}

    def with_scores(
        self, labels: Sequence[str], candidates: Sequence[tuple[np.ndarray | None, np.ndarray]], middle: float
    ) -> "Pool":
        """The same windows under the same numbers with other scores; arguments as of a new pool."""
        return Pool(self.sounds, labels, self.recording, self.spans, candidates, middle)

    @property
    def site_of(self) -> np.ndarray:
        """(N,) the place of each window's site in `sites`."""
        return np.asarray(self._site)

    def label_index(self, label: str) -> int:
        """The place of a label; NotFoundError if it has none."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise NotFoundError(
                f"no label {label!r}; one of the {len(self.labels)} labels is {min(self.labels, default='')!r}"
            ) from None

    def all_scores(self, label: int) -> np.ndarray | None:
        """The scores (N,) of a label in all windows; None if it has scores in some only."""
        windows, scores = self._candidates[label]
        return scores if windows is None else None

    def scores_of(self, label: int, windows: np.ndarray) -> np.ndarray:
        """The scores (M,) of a label in windows (M,); NaN where it has none."""
        own, scores = self._candidates[label]
        if own is None:
            return np.asarray(scores[windows])
        if not own.size:
            return np.full(windows.size, np.nan)
        place = np.minimum(np.searchsorted(own, windows), own.size - 1)  # its windows rise
        return np.where(own[place] == windows, scores[place], np.nan)

    def find(self, path: str, start: float) -> int | None:
        """The window of a recording that begins at a time, or None."""
        window = self.window_at(path, start + NEAR)
        return window if window is not None and abs(self.spans[window, 0] - start) <= NEAR else None

    def window_at(self, path: str, seconds: float) -> int | None:
        """The last window of a recording that begins before a time and has not ended, or None."""
        found = self._by_path.get(path)
        if found is None:
            return None
        first, last = self._first[found : found + 2]
        window = int(np.searchsorted(self.spans[first:last, 0], seconds, "right")) - 1 + int(first)
        return window if window >= first and self.spans[window, 1] > seconds else None

    def select(self, label: int, queue: Queue, reviewed: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Windows to review for a label, the first to review first.

        Args:
            label: its place.
            queue: which windows, and in which order.
            reviewed: windows that already have a decision about the label.

        Returns:
            Windows (M,) and their scores (M,).

        Raises:
            InputError: a strategy or filter that can't be used.
        """
        queue.check()
        windows, scores = self._candidates[label]
        rows = self._passing(windows, scores, queue, reviewed)
        kept = rows if windows is None else windows[rows]
        candidates = Candidates(
            scores[rows],
            self.recording[kept],
            self._site[kept],
            self._time[kept],
            self.spans[kept, 0],
            self.middle if queue.middle is None else queue.middle,
            None if queue.similarity is None else queue.similarity[kept],
        )
        order = arrange(candidates, queue.strategy, queue.seed)
        if queue.per_recording is not None:
            order = keep_first(candidates.recording, order, queue.per_recording)
        return kept[order], candidates.score[order]

    def _passing(
        self, windows: np.ndarray | None, scores: np.ndarray, queue: Queue, reviewed: Collection[int]
    ) -> np.ndarray:
        """Which candidates pass, as indices of the scores."""
        passing = np.ones(scores.size, bool)
        if queue.lowest is not None:
            passing &= scores >= queue.lowest
        if queue.highest is not None:
            passing &= scores <= queue.highest
        if queue.sites is not None:
            places = [i for i, site in enumerate(self.sites) if site in set(queue.sites)]
            passing &= np.isin(_of(self._site, windows), places)
        if queue.first is not None or queue.last is not None or queue.hours is not None:
            passing &= _in_time(_of(self._time, windows), queue)
        if reviewed:
            done = np.fromiter(reviewed, np.int64)
            passing[done if windows is None else np.isin(windows, done)] = False
        return np.flatnonzero(passing)


def suggest(
    pool: Pool,
    queue: Queue,
    count: int,
    labels: Sequence[str] | None = None,
    reviewed: Iterable[Review] = (),
) -> list[Suggestion]:
    """What to review next; several labels take turns.

    Args:
        pool: the windows.
        queue: which of them, and in which order.
        count: how many, at most.
        labels: of the pool; None: all.
        reviewed: what has a decision already.

    Raises:
        InputError: a count, strategy or filter that can't be used.
        NotFoundError: no such label.
    """
    if count < 1:
        raise InputError(f"{count} suggestions; expected at least 1")
    places = range(len(pool.labels)) if labels is None else [pool.label_index(label) for label in labels]
    done = reviewed_windows(pool, reviewed)
    turns: list[tuple[int, Suggestion]] = []
    for place in places:
        windows, scores = pool.select(place, queue, done.get(place, ()))
        first = zip(windows[:count].tolist(), scores[:count].tolist(), strict=True)
        turns += [(turn, Suggestion(window, place, score)) for turn, (window, score) in enumerate(first)]
    return [suggestion for _, suggestion in sorted(turns, key=lambda each: each[0])[:count]]


def reviewed_windows(pool: Pool, reviewed: Iterable[Review]) -> dict[int, set[int]]:
    """The windows of the pool that have a decision, by the place of the label."""
    places = {label: i for i, label in enumerate(pool.labels)}
    done: dict[int, set[int]] = {}
    for each in reviewed:
        place, window = places.get(each.label), pool.find(each.file, each.start)
        if place is not None and window is not None:
            done.setdefault(place, set()).add(window)
    return done


def _of(column: np.ndarray, windows: np.ndarray | None) -> np.ndarray:
    return column if windows is None else column[windows]


def _in_time(time: np.ndarray, queue: Queue) -> np.ndarray:
    """Whether moments (N,), in seconds since 1970 or NaN, are in the dates and hours."""
    passing = np.isfinite(time)
    if queue.first is not None:
        passing &= time >= _seconds(datetime.combine(queue.first, datetime.min.time()))
    if queue.last is not None:
        passing &= time < _seconds(datetime.combine(queue.last, datetime.min.time())) + 86400
    if queue.hours is not None:
        first, last = queue.hours
        hour = np.where(passing, time, 0) % 86400 / 3600
        passing &= (hour >= first) & (hour < last) if first <= last else (hour >= first) | (hour < last)
    return np.asarray(passing)


def _seconds(moment: datetime | None) -> float:
    """Seconds of the recorder's clock since 1970; NaN: unknown."""
    if moment is None:
        return np.nan
    return (moment.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
