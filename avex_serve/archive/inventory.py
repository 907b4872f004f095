"""What an archive holds: the recordings with their lengths, times and places, without decoding them."""

import os
from collections.abc import Iterator, Mapping
from datetime import tzinfo
from typing import NamedTuple

from avex_serve.archive.files import shown
from avex_serve.audio.reader import describe
from avex_serve.audio.recorder import find_origin, format_offset
from avex_serve.errors import AvexServeError


class Row(NamedTuple):
    """A recording; None: unknown."""

    path: str
    duration: float | None  # seconds
    sample_rate: int | None  # Hz
    channels: int | None
    format: str | None
    start: str | None  # local time in ISO 8601
    offset: str | None  # of that time from UTC, such as +10:00
    start_source: str | None  # name, or the kind of header
    latitude: float | None  # degrees, north positive
    longitude: float | None  # degrees, east positive
    recorder: str | None
    warnings: list[str]


def list_recordings(recordings: Mapping[str, AvexServeError | None], zone: tzinfo | None = None) -> Iterator[Row]:
    """A row for each recording, in order; one that can't be read has the reason among its warnings.

    Args:
        recordings: paths, and why they can't be read; see `avex_serve.archive.files.Found`.
        zone: of times that come without an offset from UTC; None: their offset stays unknown.
    """
    for path, error in recordings.items():
        yield _row(path, error, zone)


def _row(path: str, error: AvexServeError | None, zone: tzinfo | None) -> Row:
    text = shown(path)
    header = None
    if error is None:
        try:
            header = describe(path)
        except AvexServeError as raised:
            error = raised
    name = os.path.basename(text)  # noqa: PTH119 - a Path for each of 100,000 names is slow
    duration = header.duration if header is not None else None
    origin = find_origin(name, header.metadata if header is not None else {}, duration, zone)
    warnings = list(origin.warnings)
    if header is not None:
        warnings = [*header.warnings, *warnings]
        if duration is None:
            warnings.append("its header does not say how long it is")
    start = origin.start.isoformat() if origin.start is not None else None
    return Row(
        path=text,
        duration=duration if duration is None else round(duration, 6),
        sample_rate=header.sample_rate if header is not None else None,
        channels=header.channels if header is not None else None,
        format=header.format if header is not None else None,
        start=start.rstrip("0") if start is not None and "." in start else start,
        offset=format_offset(origin.offset),
        start_source=origin.source,
        latitude=origin.latitude,
        longitude=origin.longitude,
        recorder=origin.recorder,
        warnings=[f"can't be read: {error}", *warnings] if error is not None else warnings,
    )
