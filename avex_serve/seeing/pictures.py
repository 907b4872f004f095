"""Spectrograms and counts as pictures, by matplotlib, which is in the extra `plot`."""

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from avex_serve.audio.reader import Wave
from avex_serve.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

FRAME_SECONDS: Final = 0.02  # of a spectrogram, rounded to a power of 2 of samples
LARGEST_FRAME: Final = 2048  # samples
COLUMNS: Final = 2048  # most columns of a spectrogram: more than a picture has
BATCH: Final = 1024  # frames that are transformed at once
LONG: Final = 2**23  # samples, three minutes at 48 kHz: frames of longer recordings don't overlap
FLOOR: Final = 1e-12  # power of digital silence, -120 dB
CONTRAST: Final = (5, 99.8)  # percentiles of the levels that are drawn as the darkest and the brightest
LANES: Final = 25  # labels that one picture shows
COLOURS: Final = "magma"


class Mark(NamedTuple):
    """A labelled span of a recording."""

    start: float  # seconds
    end: float
    label: str
    score: float | None  # None: the label has none, as those that people set


@dataclass(frozen=True)
class Spectrogram:
    """The levels of a recording, or of a stretch of it."""

    levels: np.ndarray  # (F, T) dB, from 0 Hz to half the sample rate
    first: float  # seconds, the middle of the first column
    step: float  # seconds from column to column
    span: tuple[float, float]  # seconds, from where to where there are samples
    sample_rate: int  # Hz


def check_installed() -> None:
    """Raise DependencyError unless the extra `plot` is installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[plot]'") from None


def printable(text: str) -> str:
    """The text with characters that can't be shown as escapes: line breaks, control characters, broken UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


# -- spectrograms -----------------------------------------------------------------------------------------------


def make_spectrogram(
    blocks: Iterable[Wave], sample_rate: int, start: float = 0.0, frames: int | None = None
) -> Spectrogram:
    """The spectrogram of a stream, in memory that doesn't grow with its length.

    Args:
        blocks: the samples in order, each block (S,).
        sample_rate: Hz.
        start: seconds from the start of the recording to the first sample.
        frames: samples in all; None: not known.
    """
    size = 2 ** round(math.log2(max(16, sample_rate * FRAME_SECONDS)))
    size = min(size, LARGEST_FRAME)
    hop = size if frames is not None and frames > LONG else size // 4
    window = np.hanning(size).astype(np.float32)
    columns = _Columns(size // 2 + 1)
    rest, samples = np.empty(0, np.float32), 0
    for block in blocks:
        samples += block.size
        rest = np.concatenate([rest, block])
        while rest.size >= size:
            count = min(BATCH, (rest.size - size) // hop + 1)
            columns.add(_powers(rest, window, hop, count))
            rest = rest[count * hop :]
    if not columns.frames:
        columns.add(_powers(np.pad(rest, (0, size - rest.size)), window, hop, 1))
    step = columns.every * hop / sample_rate
    first = start + (size + (columns.every - 1) * hop) / 2 / sample_rate
    levels = 10 * np.log10(np.maximum(columns.means(), FLOOR)).T
    return Spectrogram(levels, first, step, (start, start + samples / sample_rate), sample_rate)


def _powers(wave: Wave, window: np.ndarray, hop: int, count: int) -> np.ndarray:
    """(count, F) power of frames, relative to a sine at full scale."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, window.size)[::hop][:count]
    powers = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2 * (4 / window.sum() ** 2)
    return np.asarray(powers, np.float32)


class _Columns:
    """Means of frames. Once there are too many columns, two become one."""

    def __init__(self, height: int) -> None:
        self.every = 1  # frames in a column
        self.frames = 0
        self._sums = np.zeros((COLUMNS, height), np.float32)

    def add(self, powers: np.ndarray) -> None:
        while (self.frames + len(powers) - 1) // self.every >= COLUMNS:
            half = self._sums[0::2] + self._sums[1::2]
            self._sums[: COLUMNS // 2], self._sums[COLUMNS // 2 :] = half, 0
            self.every *= 2
        column = np.arange(self.frames, self.frames + len(powers)) // self.every
        starts = np.flatnonzero(np.diff(column, prepend=-1))
        self._sums[column[starts]] += np.add.reduceat(powers, starts, axis=0)
        self.frames += len(powers)

    def means(self) -> np.ndarray:
        """(T, F)."""
        whole = -(-self.frames // self.every)
        counts = np.full((whole, 1), self.every, np.float32)
        counts[-1] = self.frames - (whole - 1) * self.every
        return np.asarray(self._sums[:whole] / counts)


# -- pictures ---------------------------------------------------------------------------------------------------


def draw_recording(spectrogram: Spectrogram, marks: Sequence[Mark], title: str, kind: str) -> bytes:
    """A spectrogram with labelled spans below, a row for each label, as a file of a kind: png or svg.

    If there are too many labels for one picture, those with the highest scores are shown.
    """
    best: dict[str, float] = {}
    for mark in marks:
        best[mark.label] = max(best.get(mark.label, -math.inf), math.inf if mark.score is None else mark.score)
    labels = sorted(sorted(best, key=lambda label: -best[label])[:LANES])
    with _drawing(11, 4 + 0.22 * len(labels)) as figure:
        heights = [3.5, 0.22 * len(labels) + 0.2] if labels else [1]
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _draw_levels(axes[0], spectrogram)
        left_out = f" ({len(best) - len(labels)} more labels)" if len(best) > len(labels) else ""
        axes[0].set_title(_shortened(title, 90) + left_out, loc="left", parse_math=False)
        axes[-1].set_xlabel("seconds")
        if labels:
            bars = _draw_marks(axes[1], labels, [mark for mark in marks if mark.label in labels])
            if any(mark.score is not None for mark in marks):
                figure.colorbar(bars, ax=list(axes), label="score", pad=0.01, fraction=0.03)
        return _saved(figure, kind)


def draw_clip(spectrogram: Spectrogram, span: tuple[float, float]) -> bytes:
    """A small WebP of a clip; lines are around a span in seconds."""
    with _drawing(4, 2.2, margins=(0.12, 0.12)) as figure:
        axes = figure.subplots()
        _draw_levels(axes, spectrogram)
        for moment in span:
            axes.axvline(moment, color="white", linewidth=1, linestyle=(0, (4, 3)))
        axes.tick_params(labelsize=8)
        return _saved(figure, "webp")


def draw_grid(rows: Sequence[str], columns: Sequence[str], counts: np.ndarray, recorded: np.ndarray) -> bytes:
    """A WebP of counts as colours.

    Args:
        rows: R labels.
        columns: C times.
        counts: (R, C).
        recorded: (C,) hours of the recordings; bars on top of the columns, without which counts say little.
    """
    with _drawing(9, 1.9 + 0.24 * len(rows)) as figure:
        bars, grid = figure.subplots(2, 1, sharex=True, height_ratios=[0.9, 0.24 * len(rows) + 0.1])
        places = np.arange(len(columns))
        bars.bar(places, recorded, color="grey", width=1, edgecolor="white", linewidth=0.5)
        bars.set_ylabel("hours\nrecorded", fontsize=8)
        bars.tick_params(labelsize=8)
        shown = np.ma.masked_equal(counts, 0)
        edges = np.arange(len(columns) + 1) - 0.5
        mesh = grid.pcolormesh(
            edges, np.arange(len(rows) + 1), shown, cmap="viridis_r", vmin=0, edgecolors="white", linewidth=0.3
        )
        grid.set_xlim(edges[0], edges[-1])
        every = -(-len(columns) // 12)
        grid.set_xticks(places[::every], [columns[place] for place in places[::every]], fontsize=8)
        _name_rows(grid, rows)
        figure.colorbar(mesh, ax=[bars, grid], label="detections", pad=0.01, fraction=0.04)
        return _saved(figure, "webp")


def draw_curves(
    precision_recall: Sequence[tuple[float, float]],
    threshold: tuple[float, float] | None,
    reliability: Sequence[tuple[float, float]],
) -> bytes:
    """A WebP of a label's precision along its recall, and of its share of sounds along their probability.

    Args:
        precision_recall: points of the curve.
        threshold: the point at the threshold, if there is one.
        reliability: mean probability and share of each bin; empty: the label has no probabilities.
    """
    with _drawing(5.6 if reliability else 2.9, 2.6, margins=(0.1 if reliability else 0.19, 0.17)) as figure:
        axes = figure.subplots(1, 2 if reliability else 1, squeeze=False)[0]
        precisions, recalls = zip(*precision_recall, strict=True)
        axes[0].step(recalls, precisions, where="pre", color="#3b528b")
        if threshold is not None:
            axes[0].plot(threshold[1], threshold[0], "o", color="#c2410c", label="threshold")
            axes[0].legend(fontsize=8, loc="lower left")
        axes[0].set_xlabel("recall", fontsize=8)
        axes[0].set_ylabel("precision", fontsize=8)
        if reliability:
            probabilities, shares = zip(*reliability, strict=True)
            axes[1].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            axes[1].plot(probabilities, shares, "o-", color="#3b528b", markersize=4)
            axes[1].set_xlabel("probability", fontsize=8)
            axes[1].set_ylabel("share with the sound", fontsize=8)
        for each in axes:
            each.set_xlim(-0.03, 1.03)
            each.set_ylim(-0.03, 1.03)
            each.tick_params(labelsize=8)
        return _saved(figure, "webp")


def _draw_levels(axes: "Axes", spectrogram: Spectrogram) -> None:
    levels, step = spectrogram.levels, spectrogram.step
    darkest, brightest = np.percentile(levels, CONTRAST)
    left = spectrogram.first - step / 2
    axes.imshow(
        levels,
        origin="lower",
        aspect="auto",
        cmap=COLOURS,
        extent=(left, left + step * levels.shape[1], 0, spectrogram.sample_rate / 2000),
        vmin=darkest,
        vmax=max(brightest, darkest + 1),  # dB; silence has one level
    )
    axes.set_xlim(*spectrogram.span)
    axes.set_ylabel("kHz", fontsize=8)


def _draw_marks(axes: "Axes", labels: Sequence[str], marks: Sequence[Mark]) -> "PolyCollection":
    scores = [mark.score for mark in marks if mark.score is not None] or [0.0]
    lowest, highest = math.floor(10 * min(scores)) / 10, math.ceil(10 * max(scores)) / 10
    for row, label in enumerate(labels):
        own = [mark for mark in marks if mark.label == label]
        spans = [(mark.start, mark.end - mark.start) for mark in own]
        bars = axes.broken_barh(spans, (row + 0.1, 0.8), cmap="viridis_r", edgecolor="white", linewidth=0.5)
        bars.set_array([highest if mark.score is None else mark.score for mark in own])
        bars.set_clim(lowest, max(highest, lowest + 0.1))
    _name_rows(axes, labels)
    return bars


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    # A name such as $x$ is a name and not a formula.
    shown = [_shortened(name, 40) for name in names]
    axes.set_yticks(np.arange(len(names)) + 0.5, shown, fontsize=8, parse_math=False)
    axes.set_ylim(len(names), 0)


def _shortened(text: str, most: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


@contextmanager
def _drawing(width: float, height: float, margins: tuple[float, float] | None = None) -> "Iterator[Figure]":
    """A figure of a size in inches, with shares of it left and below for text; None: as needed, twice as slow."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A fixed salt makes the same SVG each time.
    with rc_context({"svg.hashsalt": "avex-serve"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        if margins is None:
            yield Figure(figsize=(width, height), dpi=100, layout="constrained")
            return
        figure = Figure(figsize=(width, height), dpi=100)
        figure.subplots_adjust(*margins, 0.98, 0.97, wspace=0.3)
        yield figure


def _saved(figure: "Figure", kind: str) -> bytes:
    target = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    if kind == "webp":
        options["pil_kwargs"] = {"quality": 80}
    figure.savefig(target, format=kind, **options)
    return target.getvalue()
