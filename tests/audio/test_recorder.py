"""When and where, by names and headers of recorders."""

import csv
import struct
from datetime import timedelta

import pytest

from avex_serve.audio.recorder import find_origin, format_offset, parse_zone
from tests.shared import SHARED

RECORDERS = SHARED / "reference" / "recorders.tsv"


def rows():
    if not RECORDERS.is_file():
        return []
    with RECORDERS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def iso(origin):
    text = origin.start.isoformat() if origin.start else ""
    return text.rstrip("0") if "." in text else text


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["file"])
def test_names_of_recorders(row):
    origin = find_origin(row["file"], {}, None)
    assert iso(origin) == row["start"]
    assert (format_offset(origin.offset) or "") == (row["offset"] or "")
    assert origin.latitude == (float(row["latitude"]) if row["latitude"] else None)
    assert origin.longitude == (float(row["longitude"]) if row["longitude"] else None)
    assert origin.warnings == ([row["flag"]] if row["flag"] else [])


def audiomoth(text):
    return {"ICMT": text.encode() + b"\0"}


def wamd(**records):
    kinds = {"model": 1, "serial": 2, "time": 5, "place": 6}
    return {
        "wamd": b"".join(
            struct.pack("<HI", kinds[name], len(text)) + text.encode() for name, text in records.items()
        )
    }


def guano(*lines):
    return {"guan": "\n".join(["GUANO|Version: 1.0", *lines]).encode()}


def bext(day, clock):
    return {
        "bext": bytes(256) + b"Zoom H5".ljust(32, b"\0") + bytes(32) + day.encode() + clock.encode() + bytes(264)
    }


MOTH = (
    "Recorded at 19:31:30 03/09/2024 ({}) by AudioMoth 24E144036045D8F1 at medium gain while battery was 4.3V and "
    "temperature was 18.7C."
)
HEADERS = {
    "AudioMoth": (audiomoth(MOTH.format("UTC+1")), "2024-09-03T19:31:30", "+01:00", None, None),
    "AudioMoth west": (audiomoth(MOTH.format("UTC-5")), "2024-09-03T19:31:30", "-05:00", None, None),
    "AudioMoth half an hour": (audiomoth(MOTH.format("UTC+5:30")), "2024-09-03T19:31:30", "+05:30", None, None),
    "AudioMoth UTC": (audiomoth(MOTH.format("UTC")), "2024-09-03T19:31:30", "+00:00", None, None),
    "GUANO": (
        guano("Timestamp: 2012-03-29T21:41:18-07:00", "Loc Position: 37.1878016 -86.1057312", "Make: Pettersson"),
        *("2012-03-29T21:41:18", "-07:00", 37.1878016, -86.1057312),
    ),
    "GUANO without a space or a zone": (
        guano("Timestamp:2012-03-29 21:41:18.5", "Loc Position:-37.1 86"),
        *("2012-03-29T21:41:18.5", None, -37.1, 86.0),
    ),
    "WAMD": (
        wamd(model="SM4", time="2022-08-15 21:34:14+0100", place="WGS84,50.25,N,5.5,W,12"),
        *("2022-08-15T21:34:14", "+01:00", 50.25, -5.5),
    ),
    "WAMD signed": (
        wamd(time="2022-08-15 21:34:14.250-05:00", place="WGS84,-50.25,5.5"),
        *("2022-08-15T21:34:14.25", "-05:00", -50.25, 5.5),
    ),
    "WAMD bare": (wamd(time="2022-08-15 21:34:14"), "2022-08-15T21:34:14", None, None, None),
    "BWF": (bext("2021-05-06", "04:05:06"), "2021-05-06T04:05:06", None, None, None),
    "Frontier Labs": (
        {"RECORDINGSTART": b"2020-08-02T04:00:00.22+1000", "SENSORLOCATION": b"-27.3888 +152.8808"},
        *("2020-08-02T04:00:00.22", "+10:00", -27.3888, 152.8808),
    ),
}


@pytest.mark.parametrize(("metadata", "start", "offset", "latitude", "longitude"), HEADERS.values(), ids=HEADERS)
def test_headers_of_recorders(metadata, start, offset, latitude, longitude):
    origin = find_origin("recording.wav", metadata, None)
    assert (iso(origin), format_offset(origin.offset)) == (start, offset)
    assert (origin.latitude, origin.longitude) == (latitude, longitude)
    assert origin.source != "name"
    assert origin.warnings == []


def test_a_header_counts_more_than_a_name_and_a_disagreement_is_reported():
    metadata = guano("Timestamp: 2020-01-01T10:00:00+10:00", "Loc Position: -27.5 153.0", "Length: 60")
    agreeing = find_origin("SITE_20200101_100000.wav", metadata, 60.0)
    assert (agreeing.source, agreeing.warnings) == ("GUANO", [])
    assert find_origin("SITE_20200101_000000.wav", metadata, 60.0).warnings == [], "the name is in UTC"
    other = find_origin("20200101_113000_A [-28.5000 153.0000].wav", metadata, 30.0)
    assert (iso(other), other.latitude) == ("2020-01-01T10:00:00", -27.5)
    time, place, length = other.warnings
    assert "2020-01-01 10:00:00+10:00 by GUANO" in time
    assert "2020-01-01 11:30:00 by name" in time
    assert "-28.5 153.0 by its name" in place
    assert length == "30.0 s long, and 60.0 s by its name or header"
    name = "S20100308T153541.293831+1000_E20100308T153636.222717+1000_+42.28800+038.86300.wav"
    assert find_origin(name, {}, 55.0).warnings == []
    assert find_origin(name, {}, 20.0).warnings == ["20.0 s long, and 54.9 s by its name or header"]


def test_time_expansion_unset_clocks_and_places():
    assert "expanded 10 times" in find_origin("a.wav", guano("TE: 10", "Length: 1"), 10.0).warnings[-1]
    assert "clock not set" in find_origin("A_20000101_000312.wav", {}, None).warnings
    assert "starts in the future" in find_origin("A_20980101_000312.wav", {}, None).warnings
    nowhere = find_origin("A_20200101_000000.wav", guano("Loc Position: 0.0 0.0"), None)
    assert (nowhere.latitude, nowhere.warnings) == (None, ["place not set"])
    assert "impossible place" in find_origin("A_20200101_000000.wav", guano("Loc Position: 95 0"), None).warnings[0]
    assert "unreadable time in GUANO" in find_origin("a.wav", guano("Timestamp: yesterday"), None).warnings[-1]


def test_a_zone_is_used_where_none_is_known():
    brisbane, berlin = parse_zone("Australia/Brisbane"), parse_zone("Europe/Berlin")
    assert find_origin("A_20200701_100000.wav", {}, None, brisbane).offset == timedelta(hours=10)
    assert find_origin("A_20200701_100000.wav", {}, None, berlin).offset == timedelta(hours=2)
    assert find_origin("A_20200101_100000.wav", {}, None, parse_zone("+05:30")).offset == timedelta(hours=5.5)
    assert find_origin("20200701_100000Z.wav", {}, None, brisbane).offset == timedelta(0)
    assert find_origin("a.wav", {}, None, brisbane).offset is None
    twice = find_origin("A_20201025_023000.wav", {}, None, berlin)
    assert "change of the clock" in twice.warnings[0]
    with pytest.raises(ValueError, match="'Brisbane' is no zone; expected a name such as"):
        parse_zone("Brisbane")


@pytest.mark.parametrize("text", ["9999-12-31T24:00:00", "0001-01-01T00:00:00+14:00", "2500-01-01T00:00:00"])
def test_dates_at_the_ends_of_the_calendar(text):
    """A table adds the duration to them, and the offset, which Python can't do there."""
    origin = find_origin("a.wav", guano(f"Timestamp: {text}"), 1e9)
    assert origin.start is None
    assert "impossible date" in origin.warnings


def test_an_offset_of_days_is_none():
    origin = find_origin("a.wav", guano("Timestamp: 2026-05-01T04:30:00+99:99"), None)
    assert origin.offset is None
    assert origin.start is not None
    with pytest.raises(ValueError, match="no zone"):
        parse_zone("+99:00")
