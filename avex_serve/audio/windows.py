"""Where a recording is cut into windows, the clips that a model takes.

`cut_windows` cuts a recording while it is read; `plan_windows` computes where a recording of known length is cut.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from avex_serve.audio.reader import Wave
from avex_serve.errors import InputError


class Window(NamedTuple):
    """A piece of a recording."""

    start: int  # its first sample
    stop: int  # after its last sample, never beyond the end of the recording
    samples: np.ndarray  # (S,) float32; zeros after the end of the recording


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `length` samples every `hop` samples; the last one reaches the end.

    The last window may be shorter than the others, down to `shortest` samples; zeros fill it up to that.
    """

    total: int  # samples of the recording
    length: int  # samples of a window
    hop: int  # samples from the start of a window to the start of the next
    sample_rate: int  # Hz
    shortest: int  # samples of the shortest window that the model takes

    @property
    def starts(self) -> range:
        """First sample of each window: the fewest windows that cover the recording, at least one."""
        beyond = max(0, self.total - self.length)
        return range(0, -(-beyond // self.hop) * self.hop + 1, self.hop)

    @property
    def spans(self) -> np.ndarray:
        """(N, 2) float64: start and end of each window in seconds, the end never after that of the recording."""
        starts = np.asarray(self.starts, dtype=np.int64)
        ends = np.minimum(starts + self.length, self.total)
        return np.stack([starts, ends], axis=1) / float(self.sample_rate)

    def cut(self, wave: Wave) -> Iterator[np.ndarray]:
        """The windows of the recording (total,) in order, each (length,) float32, the last one perhaps shorter."""
        return (window.samples for window in cut_windows([wave], self.length, self.hop, self.shortest))


def plan_windows(
    total: int, length: int, sample_rate: int, overlap: float, shortest: int | None = None
) -> WindowPlan:
    """Plan the windows of a recording.

    Args:
        total: samples of the recording.
        length: samples of a window.
        sample_rate: of both, in Hz.
        overlap: of neighbouring windows, in seconds; at least 0, less than a window.
        shortest: samples of the shortest window that the model takes; None: all windows have one length.

    Raises:
        InputError: an overlap outside that range.
    """
    hop = hop_samples(length, sample_rate, overlap)
    return WindowPlan(total, length, hop, sample_rate, length if shortest is None else shortest)


def hop_samples(length: int, sample_rate: int, overlap: float) -> int:
    """Samples from the start of a window to the start of the next; see `plan_windows`."""
    window_seconds = length / sample_rate
    if not 0 <= overlap < window_seconds:
        raise InputError(
            f"overlap is {overlap} s; expected at least 0 and less than the window of {window_seconds:g} s"
        )
    return max(1, length - round(overlap * sample_rate))


def cut_windows(blocks: Iterable[Wave], length: int, hop: int, shortest: int) -> Iterator[Window]:
    """Cut a recording while it is read; the windows are those of `WindowPlan`.

    Args:
        blocks: the recording in order, each block (S,) float32.
        length: samples of a window.
        hop: samples from the start of a window to the start of the next, at most `length`.
        shortest: samples of the shortest window that the model takes.
    """
    start = 0  # of the next window
    kept = np.empty(0, np.float32)  # the recording from there on, as far as it is read
    for block in blocks:
        kept = np.concatenate([kept, block]) if kept.size else block
        # A window is yielded here only if more samples follow: the one that ends with the recording is the last one.
        while kept.size > length:
            yield Window(start, start + length, kept[:length])
            start += hop
            kept = kept[hop:]
    padding = max(0, shortest - kept.size)
    yield Window(start, start + kept.size, np.pad(kept, (0, padding)) if padding else kept)


def batch_windows(
    windows: Iterable[Window], most: int, *, padding_mask: bool
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """Put neighbouring windows of one length together.

    Args:
        windows: in order.
        most: windows of a batch.
        padding_mask: whether the graph takes one; it is True where a window is padded.

    Yields:
        (B, 2) int64, `start` and `stop` of each window; and the inputs of the graph, which are the windows (B, S)
        float32 and, with a mask, (B, S) bool.
    """
    for size, alike in itertools.groupby(windows, key=lambda window: window.samples.size):
        while group := list(itertools.islice(alike, most)):
            bounds = np.array([(window.start, window.stop) for window in group], np.int64)
            # The CPU gets windows one by one, and a view of one takes no time.
            batch = np.stack([window.samples for window in group]) if most > 1 else group[0].samples[None]
            yield bounds, (batch, np.arange(size) >= bounds[:, 1:] - bounds[:, :1]) if padding_mask else (batch,)
