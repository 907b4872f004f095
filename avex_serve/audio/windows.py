"""Where a recording is cut into windows, the clips that a model takes.

`cut_windows` cuts a recording while it is read; `plan_windows` computes where a recording of known length is cut.

The windows start every hop. `final_clip` says what happens at the end, where less than a window remains:

    remainder  the default: the remainder is a window, padded with zeros up to the shortest that the model takes.
               Less than `EVIDENCE` of a window is no evidence: then the last window is moved back, as by full
    full       the last window is moved back, so that it ends with the recording
    extend     the remainder is padded with zeros to a whole window
    none       the remainder is left out

The span of a window never goes beyond the end of the recording. A recording shorter than a window is one window,
padded with zeros; with none it is refused.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np

from avex_serve.audio.reader import Wave
from avex_serve.errors import InputError

FinalClip = Literal["none", "extend", "remainder", "full"]
EVIDENCE: Final = 0.1  # of a window: a shorter remainder is not answered for itself


class Window(NamedTuple):
    """A piece of a recording."""

    start: int  # its first sample
    stop: int  # after its last sample, never beyond the end of the recording
    samples: np.ndarray  # (S,) float32; zeros after the end of the recording


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `length` samples every `hop` samples, and at the end as `final_clip` says."""

    total: int  # samples of the recording
    length: int  # samples of a window
    hop: int  # samples from the start of a window to the start of the next
    sample_rate: int  # Hz
    shortest: int  # samples of the shortest window that the model takes
    final_clip: FinalClip

    @property
    def count(self) -> int:
        """How many windows there are: the fewest that cover the recording, at least one unless none is asked for."""
        beyond = self.total - self.length
        if self.final_clip == "none":
            return max(0, beyond // self.hop + 1)
        return -(-max(0, beyond) // self.hop) + 1

    @property
    def starts(self) -> np.ndarray:
        """(N,) int64: the first sample of each window."""
        starts = np.arange(self.count, dtype=np.int64) * self.hop
        if self.count > 1 and _moves_back(self.total - int(starts[-1]), self.length, self.final_clip):
            starts[-1] = self.total - self.length
        return starts

    @property
    def spans(self) -> np.ndarray:
        """(N, 2) float64: start and end of each window in seconds, the end never after that of the recording."""
        starts = self.starts
        ends = np.minimum(starts + self.length, self.total)
        return np.stack([starts, ends], axis=1) / float(self.sample_rate)

    def cut(self, wave: Wave) -> Iterator[np.ndarray]:
        """The windows of the recording (total,) in order, each (length,) float32, the last one perhaps shorter."""
        windows = cut_windows([wave], self.length, self.hop, self.shortest, self.final_clip)
        return (window.samples for window in windows)


def plan_windows(
    total: int,
    length: int,
    sample_rate: int,
    overlap: float,
    shortest: int | None = None,
    final_clip: FinalClip = "remainder",
) -> WindowPlan:
    """Plan the windows of a recording.

    Args:
        total: samples of the recording.
        length: samples of a window.
        sample_rate: of both, in Hz.
        overlap: of neighbouring windows, in seconds; at least 0, less than a window.
        shortest: samples of the shortest window that the model takes; None: all windows have one length.
        final_clip: what happens at the end; see the module.

    Raises:
        InputError: an overlap outside that range.
    """
    hop = hop_samples(length, sample_rate, overlap)
    return WindowPlan(total, length, hop, sample_rate, length if shortest is None else shortest, final_clip)


def _moves_back(remainder: int, length: int, final_clip: FinalClip) -> bool:
    """Whether a last window with that number of samples ends with the recording instead of starting after a hop."""
    if final_clip == "remainder":
        return remainder < EVIDENCE * length
    return final_clip == "full"


def hop_samples(length: int, sample_rate: int, overlap: float) -> int:
    """Samples from the start of a window to the start of the next; see `plan_windows`."""
    window_seconds = length / sample_rate
    if not 0 <= overlap < window_seconds:
        raise InputError(
            f"overlap is {overlap} s; expected at least 0 and less than the window of {window_seconds:g} s"
        )
    return max(1, length - round(overlap * sample_rate))


def cut_windows(
    blocks: Iterable[Wave], length: int, hop: int, shortest: int, final_clip: FinalClip = "remainder"
) -> Iterator[Window]:
    """Cut a recording while it is read; the windows are those of `WindowPlan`.

    Args:
        blocks: the recording in order, each block (S,) float32.
        length: samples of a window.
        hop: samples from the start of a window to the start of the next, at most `length`.
        shortest: samples of the shortest window that the model takes.
        final_clip: what happens at the end; see the module.

    Raises:
        InputError: a recording shorter than a window, and `final_clip` is none.
    """
    start = 0  # of the next window
    before = np.empty(0, np.float32)  # the recording up to there, for one hop
    pieces: list[Wave] = []  # the recording from there on
    size = 0  # of the pieces
    for block in blocks:
        pieces.append(block)
        size += block.size
        if size <= length:  # decoders of AAC make blocks of 1024 samples: each is copied once, not with each block
            continue
        kept = np.concatenate(pieces) if len(pieces) > 1 else block
        # A window is yielded here only if more samples follow: the one that ends with the recording is the last one.
        while kept.size > length:
            yield Window(start, start + length, kept[:length])
            start += hop
            before, kept = kept[:hop], kept[hop:]
        pieces, size = [kept], kept.size
    kept = np.concatenate(pieces or [before])
    if kept.size < length and final_clip == "none":
        if start == 0:
            raise InputError(
                f"the recording is shorter than a window ({kept.size} of {length} samples), and final_clip is none; "
                "choose another final_clip"
            )
        return
    stop = start + kept.size
    if start > 0 and kept.size < length and _moves_back(kept.size, length, final_clip):
        kept = np.concatenate([before[kept.size - length :], kept])
    padding = max(0, (length if final_clip == "extend" else shortest) - kept.size)
    yield Window(stop - kept.size, stop, np.pad(kept, (0, padding)) if padding else kept)


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
