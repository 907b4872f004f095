"""Window arithmetic: where a recording is cut for a model that hears a fixed length at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from avex_serve.errors import InputError
from avex_serve.runtime.audio import Wave


@dataclass(frozen=True)
class WindowPlan:
    """Windows of `length` samples every `hop` samples; the last one reaches the end and is padded with zeros."""

    total: int  # samples of the recording
    length: int  # samples of a window
    hop: int  # samples from one window's start to the next
    sample_rate: int  # Hz

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
        """The windows in order, each (length,) float32; the last one padded with zeros."""
        for start in self.starts:
            piece = wave[start : start + self.length]
            yield piece if piece.size == self.length else np.pad(piece, (0, self.length - piece.size))


def plan_windows(total: int, length: int, sample_rate: int, overlap: float) -> WindowPlan:
    """Plan the windows of a recording.

    Args:
        total: samples of the recording.
        length: samples of a window.
        sample_rate: of both, in Hz.
        overlap: of neighbouring windows, in seconds; at least 0, less than a window.

    Raises:
        InputError: an overlap outside that range.
    """
    window_seconds = length / sample_rate
    if not 0 <= overlap < window_seconds:
        raise InputError(
            f"overlap is {overlap} s; expected at least 0 and less than the window of {window_seconds:g} s"
        )
    hop = max(1, length - round(overlap * sample_rate))
    return WindowPlan(total=total, length=length, hop=hop, sample_rate=sample_rate)
