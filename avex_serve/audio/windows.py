"""Window arithmetic: where a recording is cut for a model that hears so much at once."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from avex_serve.audio.waveform import Wave
from avex_serve.errors import InputError


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `length` samples every `hop` samples; the last one reaches the end.

    It may be shorter than the others, down to `shortest` samples; what lacks to that is padded with zeros.
    """

    total: int  # samples of the recording
    length: int  # samples of a window
    hop: int  # samples from one window's start to the next
    sample_rate: int  # Hz
    shortest: int  # samples of the shortest window that the model takes

    @property
    def starts(self) -> range:
        """First sample of each window: as few as cover the recording, at least one."""
        beyond = max(0, self.total - self.length)
        return range(0, -(-beyond // self.hop) * self.hop + 1, self.hop)

    @property
    def spans(self) -> np.ndarray:
        """(N, 2) float64: start and end of each window in seconds, the end never after the recording's."""
        starts = np.asarray(self.starts, dtype=np.int64)
        ends = np.minimum(starts + self.length, self.total)
        return np.stack([starts, ends], axis=1) / float(self.sample_rate)

    def cut(self, wave: Wave) -> Iterator[np.ndarray]:
        """The windows in order, each (length,) float32 but for the last one, which is padded up to the shortest."""
        for start in self.starts:
            piece = wave[start : start + self.length]
            yield piece if piece.size >= self.shortest else np.pad(piece, (0, self.shortest - piece.size))

    def batches(self, wave: Wave, most: int, *, masked: bool) -> Iterator[tuple[np.ndarray, ...]]:
        """The windows in order, at most so many at once, those of one length together.

        Args:
            wave: (total,) float32.
            most: windows of a batch.
            masked: whether the model takes a padding mask.

        Yields:
            Windows (B, S) float32 and, if masked, their padding (B, S) bool, True where padded.
        """
        windows = zip(self.starts, self.cut(wave), strict=True)
        for size, alike in itertools.groupby(windows, key=lambda window: window[1].size):
            while group := list(itertools.islice(alike, most)):
                batch = np.stack([piece for _, piece in group])
                ends = np.array([self.total - start for start, _ in group])
                yield (batch, np.arange(size) >= ends[:, None]) if masked else (batch,)


def plan_windows(
    total: int, length: int, sample_rate: int, overlap: float, shortest: int | None = None
) -> WindowPlan:
    """Plan the windows of a recording.

    Args:
        total: samples of the recording.
        length: samples of a window.
        sample_rate: of both, in Hz.
        overlap: of neighbouring windows, in seconds; at least 0, less than a window.
        shortest: samples of the shortest window that the model takes; None: all windows are of one length.

    Raises:
        InputError: an overlap outside that range.
    """
    window_seconds = length / sample_rate
    if not 0 <= overlap < window_seconds:
        raise InputError(
            f"overlap is {overlap} s; expected at least 0 and less than the window of {window_seconds:g} s"
        )
    hop = max(1, length - round(overlap * sample_rate))
    return WindowPlan(
        total=total,
        length=length,
        hop=hop,
        sample_rate=sample_rate,
        shortest=length if shortest is None else shortest,
    )
