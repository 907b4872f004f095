"""Camtrap DP 1.0 for sound: deployments, media and observations, with a description of the columns.

A folder of recordings is a deployment. What isn't known, such as the place or the time zone, is left empty: fill it
in before you publish the package. A score is a tag. `classificationProbability` is that of a calibrated label.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from avex_serve.annotations.birdnet import names
from avex_serve.annotations.table import Annotation, Format, Recording, Table, absolute_time
from avex_serve.writing import new_folder

SPECIES: Final = re.compile(r"[A-Z][a-z-]+ [a-z-]+(?: [a-z-]+)?")  # genus, species and perhaps subspecies
PACKAGE: Final = "datapackage.json"
PROFILE: Final = "https://raw.githubusercontent.com/tdwg/camtrap-dp/1.0.1/camtrap-dp-profile.json"
MEDIA_TYPES: Final = {
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    **dict.fromkeys((".ogg", ".oga", ".opus"), "audio/ogg"),
    **dict.fromkeys((".aif", ".aiff", ".aifc"), "audio/aiff"),
    **dict.fromkeys((".au", ".snd"), "audio/basic"),
    ".caf": "audio/x-caf",
    ".m4a": "audio/mp4",
    ".aac": "audio/aac",
    ".webm": "audio/webm",
}
KEY: Final = {"type": "string", "constraints": {"required": True, "unique": True}}
REFERENCE: Final = {"type": "string", "constraints": {"required": True}}
TEXT: Final = {"type": "string"}
PROBABILITY: Final = "classificationProbability"  # a column of the packages of calibrated bundles
TIME: Final = {"type": "datetime", "format": "any"}
HERTZ: Final = {"type": "number", "constraints": {"minimum": 0}}
TABLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "deployments": {
        "deploymentID": KEY,
        "locationName": TEXT,
        "latitude": {"type": "number", "constraints": {"minimum": -90, "maximum": 90}},
        "longitude": {"type": "number", "constraints": {"minimum": -180, "maximum": 180}},
        "deploymentStart": TIME,
        "deploymentEnd": TIME,
        "timestampIssues": {"type": "boolean"},
    },
    "media": {
        "mediaID": KEY,
        "deploymentID": REFERENCE,
        "timestamp": TIME,
        "filePath": REFERENCE,
        "filePublic": {"type": "boolean", "constraints": {"required": True}},
        "fileName": TEXT,
        "fileMediatype": {"type": "string", "constraints": {"required": True, "pattern": "^audio/.*$"}},
        "mediaComments": TEXT,
    },
    "observations": {
        "observationID": KEY,
        "deploymentID": REFERENCE,
        "mediaID": REFERENCE,
        "eventID": TEXT,
        "eventStart": TIME,
        "eventEnd": TIME,
        "observationLevel": {"type": "string", "constraints": {"required": True, "enum": ["media", "event"]}},
        "observationType": {"type": "string", "constraints": {"required": True, "enum": ["animal", "unknown"]}},
        "scientificName": TEXT,
        "frequencyLow": HERTZ,
        "frequencyHigh": HERTZ,
        "classificationMethod": {"type": "string", "constraints": {"enum": ["human", "machine"]}},
        "classifiedBy": TEXT,
        PROBABILITY: {"type": "number", "constraints": {"minimum": 0, "maximum": 1}},
        "observationTags": TEXT,
        "observationComments": TEXT,
    },
}


def write(table: Table, target: Path) -> None:
    """Write the folder of a package."""
    root = table.root
    by_folder: dict[str, list[Recording]] = defaultdict(list)
    for recording in table.recordings:
        by_folder[_deployment(recording, root)].append(recording)
    with new_folder(target, PACKAGE) as folder:
        with (folder / "deployments.csv").open("w", encoding="utf-8", newline="") as file:
            writer = _writer(file, table, "deployments")
            for name, recordings in by_folder.items():
                writer.writerow(_deployment_row(name, recordings))
        with (
            (folder / "media.csv").open("w", encoding="utf-8", newline="") as media_file,
            (folder / "observations.csv").open("w", encoding="utf-8", newline="") as observations_file,
        ):
            media = _writer(media_file, table, "media")
            observations = _writer(observations_file, table, "observations")
            count = 0
            for recording, annotations in table.rows:
                path = os.path.relpath(recording.path, root)
                deployment = _deployment(recording, root)
                media.writerow(_media_row(recording, path, deployment))
                for one in annotations:
                    count += 1
                    observations.writerow((count, deployment, path, *_observation(table, recording, one)))
        (folder / PACKAGE).write_text(json.dumps(_package(table), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _columns(table: Table, name: str) -> dict[str, dict[str, Any]]:
    """The columns of a resource; without probabilities if there are none."""
    return {column: kind for column, kind in TABLES[name].items() if table.calibrated or column != PROBABILITY}


def _writer(file: Any, table: Table, name: str) -> Any:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_columns(table, name))
    return writer


def _deployment(recording: Recording, root: str) -> str:
    """The folder of the recording."""
    folder = os.path.relpath(os.path.dirname(recording.path), root)  # noqa: PTH120
    return os.path.basename(root) or "recordings" if folder == "." else folder  # noqa: PTH119


def _deployment_row(name: str, recordings: Sequence[Recording]) -> tuple[Any, ...]:
    zoned = [one for one in recordings if one.start is not None and one.start.tzinfo is not None]
    starts = sorted((one.start, _zoned(one, 0.0)) for one in zoned)
    ends = sorted((one.start.timestamp() + one.duration, _zoned(one, one.duration)) for one in zoned if one.start)
    places = {(one.latitude, one.longitude) for one in recordings if one.latitude is not None}
    latitude, longitude = places.pop() if len(places) == 1 else ("", "")
    times = (starts[0][1], ends[-1][1]) if zoned else ("", "")
    return name, name, latitude, longitude, *times, str(len(zoned) < len(recordings)).lower()


def _zoned(recording: Recording, seconds: float) -> str:
    """A moment in the recording; empty if its zone isn't known, since Camtrap DP allows no other times."""
    known = recording.start is not None and recording.start.tzinfo is not None
    return absolute_time(recording, seconds) if known else ""


def _media_row(recording: Recording, path: str, deployment: str) -> tuple[Any, ...]:
    kind = MEDIA_TYPES.get(os.path.splitext(path)[1].lower(), "audio/wav")  # noqa: PTH122
    local = "" if _zoned(recording, 0.0) else absolute_time(recording, 0.0)
    comment = f"local time of unknown zone: {local}" if local else ""
    return path, deployment, _zoned(recording, 0.0), path, "false", recording.name, kind, comment


def _observation(table: Table, recording: Recording, one: Annotation) -> tuple[Any, ...]:
    scientific = names(one.label)[0]
    known = SPECIES.fullmatch(scientific) is not None
    probability = "" if one.probability is None else f"{one.probability:.4f}"
    return (
        "",
        _zoned(recording, one.start),
        _zoned(recording, one.end),
        "media",
        "animal" if known else "unknown",
        scientific if known else "",
        0,
        f"{one.high_frequency(recording):g}",
        "machine",
        f"{one.bundle} {one.version}, {one.probe}",
        *([probability] if table.calibrated else []),
        f"score:{one.score:.4f}|offset:{one.start:.3f}|duration:{one.end - one.start:.3f}",
        one.label,
    )


def _package(table: Table) -> dict[str, Any]:
    resources = [
        {
            "name": name,
            "path": f"{name}.csv",
            "profile": "tabular-data-resource",
            "format": "csv",
            "mediatype": "text/csv",
            "encoding": "utf-8",
            "schema": {
                "fields": [{"name": column, **kind} for column, kind in columns.items()],
                "missingValues": [""],
                "primaryKey": next(iter(columns)),
                "foreignKeys": [
                    {"fields": key, "reference": {"resource": resource, "fields": key}}
                    for key, resource in (("deploymentID", "deployments"), ("mediaID", "media"))
                    if key in columns and resource != name
                ],
            },
        }
        for name, columns in ((name, _columns(table, name)) for name in TABLES)
    ]
    return {
        "resources": resources,
        "profile": PROFILE,
        "name": "avex-serve",
        "sources": [{"title": "avex-serve", **table.about}],
    }


FORMAT = Format("camtrap-dp", "camtrap-dp", write)
