"""When and where a recording was made, and by which recorder, from its name and its header.

Nothing is guessed. A time is local time of an unknown zone unless the name or the header says its offset from UTC. A
header counts more than a name; where they disagree, a warning says so. The formats:

    names       of AudioMoth, Song Meter, SWIFT, Frontier Labs, OwlSense and SoundTrap, and ISO 8601 in general
    AudioMoth   its comment in LIST/INFO/ICMT (https://github.com/OpenAcousticDevices)
    GUANO       the chunk guan (https://github.com/riggsd/guano-spec)
    WAMD        the chunk wamd of Wildlife Acoustics
    BWF         the chunk bext (EBU Tech 3285)
    Frontier    the comments of its FLAC files
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from typing import Final

NO_TIME: Final = "no time in the name"
NOT_SET: Final = "clock not set"
# Where clocks start that were never set: Unix, FAT and some real-time clocks.
UNSET_DAYS: Final = (date(1980, 1, 1), date(2000, 1, 1))
YEARS: Final = range(1900, 2200)  # of dates; Python can't add to those at the end of its calendar
FIRST_HEXADECIMAL: Final = 0x50000000  # AudioMoth's names in seconds: July 2012, before there was one
APART: Final = timedelta(seconds=2)  # by which times of one recording may differ
DEGREES: Final = 0.01  # by which its places may differ, about a kilometre


@dataclass(frozen=True)
class Origin:
    """When and where a recording began; None: unknown."""

    start: datetime | None = None  # local time, without a zone
    offset: timedelta | None = None  # of that time from UTC
    source: str | None = None  # of the start: name, AudioMoth, GUANO, WAMD, BWF or Frontier Labs
    latitude: float | None = None  # degrees, north positive
    longitude: float | None = None  # degrees, east positive
    recorder: str | None = None  # make, model or serial number
    length: float | None = None  # seconds that it says the recording has
    warnings: list[str] = field(default_factory=list)

    @property
    def moment(self) -> datetime | None:
        """The start with its offset, where that is known."""
        if self.start is None or self.offset is None:
            return self.start
        return self.start.replace(tzinfo=timezone(self.offset))

    @property
    def utc(self) -> datetime | None:
        """The start in UTC."""
        if self.start is None or self.offset is None:
            return None
        return (self.start - self.offset).replace(tzinfo=UTC)


def find_origin(
    name: str, metadata: Mapping[str, bytes], duration: float | None, zone: tzinfo | None = None
) -> Origin:
    """When and where a recording was made.

    Args:
        name: of the file, without its folder.
        metadata: `Header.metadata` of the file.
        duration: in seconds, to compare with what names and headers say.
        zone: of times that come without an offset; None: their offset stays unknown.
    """
    origin = from_name(name)
    for read in (_from_frontier, _from_bext, _from_audiomoth, _from_wamd, _from_guano):  # the last one counts most
        found = read(metadata)
        if found is not None:
            origin = _merged(found, origin)
    if (
        (length := origin.length) is not None
        and duration is not None
        and abs(length - duration) > 1 + duration / 100
    ):
        origin.warnings.append(f"{duration:.1f} s long, and {length:.1f} s by its name or header")
    if origin.start is not None:
        if origin.start.year == 1970 or origin.start.date() in UNSET_DAYS:
            origin.warnings.append(NOT_SET)
        elif origin.start > datetime.now() + timedelta(days=2):
            origin.warnings.append("starts in the future")
        if origin.offset is None and zone is not None:
            local = origin.start.replace(tzinfo=zone)
            offset = local.utcoffset()
            if offset != local.replace(fold=1).utcoffset():
                origin.warnings.append("its time is in the hour of a change of the clock: the offset may be another")
            origin = replace(origin, offset=offset)
    if (origin.latitude, origin.longitude) == (0, 0):
        origin = replace(origin, latitude=None, longitude=None)
        origin.warnings.append("place not set")
    return origin


def parse_zone(text: str) -> tzinfo:
    """A zone by its name, such as Australia/Brisbane, or its offset, such as +10:00; ValueError for another text."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if (offset := _offset(text)) is not None:
        return timezone(offset)
    try:
        return ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{text!r} is no zone; expected a name such as Australia/Brisbane, or +10:00") from None


def _merged(header: Origin, other: Origin) -> Origin:
    """What a header says, completed by what counts less; warnings where they disagree."""
    warnings = [*other.warnings, *header.warnings]
    if header.start is not None:
        # That a name has no time, or an impossible one, matters only while nothing else has it.
        warnings = [each for each in warnings if each != NO_TIME]
        if other.start is not None and not _same_time(header, other):
            warnings.append(f"starts at {_iso(header)} by {header.source}, and at {_iso(other)} by {other.source}")
    if header.latitude is not None and header.longitude is not None and other.latitude is not None:
        assert other.longitude is not None
        if max(abs(header.latitude - other.latitude), abs(header.longitude - other.longitude)) > DEGREES:
            warnings.append(
                f"is at {header.latitude} {header.longitude} by its header, and at {other.latitude} "
                f"{other.longitude} by its name"
            )
    timed, placed = (header if header.start else other), (header if header.latitude is not None else other)
    return Origin(
        start=timed.start,
        offset=timed.offset,
        source=timed.source,
        latitude=placed.latitude,
        longitude=placed.longitude,
        recorder=header.recorder or other.recorder,
        length=header.length if header.length is not None else other.length,
        warnings=warnings,
    )


def _same_time(one: Origin, other: Origin) -> bool:
    assert one.start is not None
    assert other.start is not None
    if one.utc is not None and other.utc is not None:
        return abs(one.utc - other.utc) <= APART
    # A name may be in UTC where the header is in local time.
    shifts = {timedelta(0), one.offset or timedelta(0), other.offset or timedelta(0)}
    return any(abs(abs(one.start - other.start) - abs(shift)) <= APART for shift in shifts)


def _iso(origin: Origin) -> str:
    return f"{origin.start:%Y-%m-%d %H:%M:%S}{format_offset(origin.offset) or ''}"


def format_offset(offset: timedelta | None) -> str | None:
    """An offset from UTC such as +10:00."""
    if offset is None:
        return None
    minutes = round(offset.total_seconds() / 60)
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


# -- names ----------------------------------------------------------------------------------------------------------

_OFFSET: Final = r"[+-](?:0\d|1[0-4]):?(?:00|15|30|45)"
_TIME: Final = re.compile(
    r"(?<!\d)((?:19|20)\d\d)(-?)(\d\d)\2(\d\d)"  # date
    r"(?:[_T\-$ ]|_T|)"
    r"(\d\d)([-:]?)(\d\d)\6(\d\d)(?!\d)"  # time
    r"([.,]\d{1,9}(?!\d)|_\d{3}(?![\d.]*\d))?"  # fraction
    rf"(?:_?({_OFFSET})(?!\d)|(Z)(?![A-Za-z]))?"
)
_PLACE: Final = re.compile(
    r"[\[_]([+-]?\d{1,2}\.\d{2,}) ([+-]?\d{1,3}\.\d{2,})[\]_]"  # [lat lon], or with underscores
    r"|(?:^|_)([+-]\d{1,2}\.\d{2,})([+-]\d{1,3}\.\d{2,})(?=[_.]|$)"  # signed
)
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_SOUNDTRAP: Final = re.compile(r"\d{6,10}\.(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)$")
_MAKERS: Final = (
    (re.compile(r"SwiftOne|SWIFT", re.IGNORECASE), "SWIFT"),
    (re.compile(r"OWL_\d"), "OwlSense"),
    (re.compile(r"S4A\d|SM[M234U]?\w*\d{4,}"), "Song Meter"),
)


def from_name(name: str) -> Origin:
    """What the name of a file says."""
    stem = name.rsplit(".", 1)[0]
    text = _UUID.sub("", stem)
    latitude, longitude, warnings = _place_in(text)
    origin = Origin(latitude=latitude, longitude=longitude, warnings=warnings)
    if re.fullmatch(r"[0-9A-Fa-f]{8}", stem):
        seconds = int(stem, 16)
        if seconds < 366 * 86400 or FIRST_HEXADECIMAL <= seconds < 2**31:
            start = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
            return replace(origin, start=start, offset=timedelta(0), source="name", recorder="AudioMoth")
    if found := _SOUNDTRAP.match(stem):
        parts = [int(part) for part in found.groups()]
        return _timed(origin, [2000 + parts[0], *parts[1:]], timedelta(0), None, "SoundTrap")
    times = list(_TIME.finditer(text))
    if not times:
        origin.warnings.append(NO_TIME)
        return origin
    first = times[0]
    year, _, month, day, hour, _, minute, second, fraction, offset, utc = first.groups()
    if fraction and fraction[0] == "_" and first.start() == 0:
        fraction = None  # without a prefix it may be a counter
    part = timedelta(microseconds=round(float(f"0.{fraction[1:]}") * 1e6)) if fraction else timedelta(0)
    maker = next((maker for pattern, maker in _MAKERS if pattern.search(text[: first.start()])), None)
    if maker is None and offset and "T" in first[0]:
        maker = "Frontier Labs"
    fields = [int(each) for each in (year, month, day, hour, minute, second)]
    origin = _timed(origin, fields, part, timedelta(0) if utc else _offset(offset), maker)
    if origin.start is not None and text.startswith("S") and len(times) == 2 and text[times[1].start() - 1] == "E":
        ended = from_name(text[times[1].start() :] + ".wav").start
        if ended is not None:
            origin = replace(origin, length=(ended - origin.start).total_seconds())
    return origin


def _timed(
    origin: Origin, fields: list[int], part: timedelta, offset: timedelta | None, recorder: str | None
) -> Origin:
    year, month, day, hour, minute, second = fields
    try:
        start = datetime(year, month, day)
    except ValueError:
        start = None
    if start is None or year not in YEARS:
        origin.warnings.append("impossible date")
        return origin
    if hour > 24 or minute > 59 or second > 59 or (hour == 24 and (minute or second)):
        origin.warnings.append("impossible time")
        return origin
    start += timedelta(hours=hour, minutes=minute, seconds=second) + part
    return replace(origin, start=start, offset=offset, source="name", recorder=recorder)


def _place_in(text: str) -> tuple[float | None, float | None, list[str]]:
    found = _PLACE.search(text)
    if found is None:
        return None, None, []
    latitude, longitude = (float(each) for each in found.groups() if each is not None)
    return _place(latitude, longitude)


def _place(latitude: float, longitude: float) -> tuple[float | None, float | None, list[str]]:
    if abs(latitude) > 90 or abs(longitude) > 180:
        return None, None, [f"impossible place {latitude} {longitude}"]
    return latitude, longitude, []


def _offset(text: str | None) -> timedelta | None:
    """An offset from UTC: Z, +10, +1000 or +10:00; None: there is none."""
    found = re.fullmatch(r"Z|([+-])(\d{1,2}):?(\d\d)?", (text or "").strip())
    if found is None:
        return None
    if found[1] is None:
        return timedelta(0)
    offset = timedelta(hours=int(found[2]), minutes=int(found[3] or 0))
    if offset >= timedelta(days=1):
        return None
    return -offset if found[1] == "-" else offset


# -- headers --------------------------------------------------------------------------------------------------------


def _text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode("utf-8", "replace").strip()


_ISO: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)([.,]\d+)?\s*(Z|[+-]\d\d:?(?:\d\d)?)?$", re.IGNORECASE
)


def _from_iso(text: str, source: str) -> Origin:
    """The time that a text says in ISO 8601."""
    found = _ISO.match(text.strip())
    if found is None:
        return Origin(warnings=[f"unreadable time in {source}: {text[:40]!r}"] if text.strip() else [])
    fraction = timedelta(microseconds=round(float(f"0{found[7]}".replace(",", ".")) * 1e6) if found[7] else 0)
    fields = [int(each) for each in found.groups()[:6]]
    origin = _timed(Origin(), fields, fraction, _offset((found[8] or "").upper()), None)
    return replace(origin, source=source if origin.start else None)


_AUDIOMOTH: Final = re.compile(
    r"Recorded at (\d\d):(\d\d):(\d\d)(\.\d+)? (\d\d)/(\d\d)/(\d{4}) \(UTC([+-]\d{1,2}(?::?\d\d)?)?\)"
    r"(?:[^.]*? by (AudioMoth \w+))?"
)


def _from_audiomoth(metadata: Mapping[str, bytes]) -> Origin | None:
    found = _AUDIOMOTH.search(_text(metadata.get("ICMT", b"")))
    if found is None:
        return None
    hour, minute, second, fraction, day, month, year, offset, recorder = found.groups()
    part = timedelta(seconds=float(fraction or 0))
    fields = [int(each) for each in (year, month, day, hour, minute, second)]
    origin = _timed(Origin(), fields, part, _offset(offset or "Z"), recorder or _text(metadata.get("IART", b"")))
    return replace(origin, source="AudioMoth" if origin.start else None)


def _from_guano(metadata: Mapping[str, bytes]) -> Origin | None:
    if "guan" not in metadata:
        return None
    lines = (line.partition(":") for line in metadata["guan"].decode("utf-8", "replace").strip("\0").splitlines())
    values = {key.strip().lower(): value.strip() for key, _, value in lines if value.strip()}
    origin = _from_iso(values.get("timestamp", ""), "GUANO")
    numbers = re.findall(r"[+-]?\d+(?:\.\d+)?", values.get("loc position", ""))
    latitude, longitude, warnings = _place(*map(float, numbers[:2])) if len(numbers) >= 2 else (None, None, [])
    expansion, length = (_number(values.get(key)) for key in ("te", "length"))
    if expansion is not None and expansion != 1:
        warnings.append(f"its time is expanded {expansion:g} times: its sounds are that much slower and lower")
        length = None  # of the sound, not of the file
    return replace(
        origin,
        latitude=latitude,
        longitude=longitude,
        recorder=" ".join(values[key] for key in ("make", "model", "serial") if key in values) or None,
        length=length,
        warnings=[*origin.warnings, *warnings],
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _from_wamd(metadata: Mapping[str, bytes]) -> Origin | None:
    content = metadata.get("wamd")
    if content is None:
        return None
    records: dict[int, str] = {}
    position = 0
    while position + 6 <= len(content):
        kind, size = struct.unpack("<HI", content[position : position + 6])
        records.setdefault(kind, _text(content[position + 6 : position + 6 + size]))
        position += 6 + size
    origin = _from_iso(records.get(5, ""), "WAMD")
    latitude, longitude, warnings = None, None, list[str]()
    found = re.match(r"[^,]*,\s*([+-]?[\d.]+)\s*,?\s*([NS])?\s*,\s*([+-]?[\d.]+)\s*,?\s*([EW])?", records.get(6, ""))
    if found is not None and (one := _number(found[1])) is not None and (other := _number(found[3])) is not None:
        latitude, longitude, warnings = _place(
            -one if found[2] == "S" else one, -other if found[4] == "W" else other
        )
    return replace(
        origin,
        latitude=latitude,
        longitude=longitude,
        recorder=" ".join(records[kind] for kind in (1, 2) if records.get(kind)) or None,
        warnings=[*origin.warnings, *warnings],
    )


def _from_bext(metadata: Mapping[str, bytes]) -> Origin | None:
    content = metadata.get("bext", b"")
    day, clock = _text(content[320:330]), _text(content[330:338])
    if not re.search("[1-9]", day) or not clock:
        return None
    stamp = f"{re.sub(r'[^0-9]', '-', day)} {re.sub(r'[^0-9]', ':', clock)}"
    return replace(_from_iso(stamp, "BWF"), recorder=_text(content[256:288]) or None)


def _from_frontier(metadata: Mapping[str, bytes]) -> Origin | None:
    if "RECORDINGSTART" not in metadata:
        return None
    origin = _from_iso(_text(metadata["RECORDINGSTART"]), "Frontier Labs")
    numbers = re.findall(r"[+-]?\d+\.\d+", _text(metadata.get("SENSORLOCATION", b"")))
    latitude, longitude, warnings = _place(*map(float, numbers[:2])) if len(numbers) >= 2 else (None, None, [])
    return replace(
        origin,
        latitude=latitude,
        longitude=longitude,
        recorder=f"Frontier Labs {_text(metadata.get('SENSORUID', b''))}".strip(),
        warnings=[*origin.warnings, *warnings],
    )
