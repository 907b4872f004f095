"""What every format is written from, and what a format is."""

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from avex_serve.errors import StorageError
from avex_serve.writing import new_file

BREAKS: Final = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A recording, as tables know it."""

    path: str  # absolute, or a URL
    digest: str  # SHA-256 of the file
    duration: float  # seconds
    sample_rate: int  # Hz
    channels: int = 1
    start: datetime | None = None  # without a zone if that is not known
    latitude: float | None = None
    longitude: float | None = None

    @property
    def name(self) -> str:
        """The name of the file."""
        return os.path.basename(self.path)  # noqa: PTH119 - 100,000 of them


class Annotation(NamedTuple):
    """A label over a span of a recording."""

    start: float  # seconds from the beginning of the recording
    end: float
    label: str
    score: float
    bandwidth: float  # Hz: the highest frequency that the model receives
    bundle: str
    version: str
    probe: str
    probability: float | None = None  # that the label is right; None: it is not calibrated

    def high_frequency(self, recording: Recording) -> float:
        """Hz: the highest frequency that the recording has and the model receives."""
        return min(self.bandwidth, recording.sample_rate / 2)


@dataclass
class Table:
    """Detections of many recordings, computed while they are written."""

    recordings: Sequence[Recording]  # in order of their paths, those without detections too
    rows: Iterable[tuple[Recording, Sequence[Annotation]]]  # for each of them, once
    about: Mapping[str, Any]  # what the detections were made from, and how they were selected
    calibrated: bool = False  # whether detections may have probabilities

    @property
    def root(self) -> str:
        """The deepest folder that holds all recordings; empty if a client names one without a folder."""
        folders = [recording.path.split("/")[:-1] for recording in self.recordings]  # of paths or URLs
        if not folders:
            return os.sep
        both = zip(min(folders), max(folders), strict=False)
        root = "/".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both))
        return root or (os.sep if min(folders) else "")

    def folder_of(self, recording: Recording) -> str:
        """The folder of a recording, relative to `root`. A client may name recordings without a folder."""
        folder = os.path.dirname(recording.path)  # noqa: PTH120
        return os.path.relpath(folder or os.curdir, self.root or os.curdir)


@dataclass(frozen=True)
class Format:
    """A format of tables."""

    name: str  # for --format
    target: str  # the usual name of its file, or of its folder
    write: Callable[[Table, Path], None]  # whole or not at all
    media_type: str | None = None  # of the table of one recording; None: that is a folder
    text: Callable[[Table, TextIO], None] | None = None  # writes the table of one recording, if it is text

    def content(self, table: Table) -> bytes:
        """The table of one recording as bytes.

        Raises:
            StorageError: there is no room on disk.
        """
        if self.text is not None:
            file = io.StringIO(newline="")
            self.text(table, file)
            return file.getvalue().encode()
        try:
            with tempfile.TemporaryDirectory(prefix="avex-table-") as folder:
                target = Path(folder) / self.target
                self.write(table, target)
                return target.read_bytes()
        except (OSError, StorageError):
            raise StorageError("the table can't be written to disk; choose a format of text, such as csv") from None


def text_format(name: str, target: str, media_type: str, text: Callable[[Table, TextIO], None]) -> Format:
    """A format of one file of text, for any number of recordings."""

    def write(table: Table, target: Path) -> None:
        with new_file(target) as file:
            text(table, file)

    return Format(name, target, write, media_type, text)


def absolute_time(recording: Recording, seconds: float) -> str:
    """ISO 8601 of a moment in a recording, in milliseconds, with the zone if that is known; empty: unknown."""
    if recording.start is None:
        return ""
    return (recording.start + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def one_line(text: str) -> str:
    """The text with spaces in place of tabs and line breaks, for formats that can't quote."""
    return BREAKS.sub(" ", text)
