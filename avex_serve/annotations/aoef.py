"""AOEF 1.1, the JSON of soundevent: a prediction for each window in which something was found."""

import itertools
import json
import uuid
from typing import Any, Final, TextIO

from avex_serve.annotations.table import Recording, Table, text_format
from avex_serve.errors import InputError

VERSION: Final = "1.1.0"
SPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/mbsantiago/soundevent")


def write(table: Table, file: TextIO) -> None:
    """Write one document. Its identifiers are digests, so that the same detections give the same bytes.

    Raises:
        InputError: scores outside 0 to 1, which AOEF doesn't allow.
    """
    tags: dict[str, int] = {}
    clips: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    for recording, annotations in table.rows:
        source = str(uuid.uuid5(SPACE, recording.path))
        ordered = sorted(annotations, key=lambda one: (one.start, one.end))
        for (start, end), group in itertools.groupby(ordered, key=lambda one: (one.start, one.end)):
            clip = str(uuid.uuid5(SPACE, f"{source} {start!r} {end!r}"))
            clips.append({"uuid": clip, "recording": source, "start_time": start, "end_time": end})
            scored = []
            for one in group:
                if not 0 <= one.score <= 1:
                    raise InputError(
                        f"AOEF allows scores from 0 to 1; probe {one.probe} has raw logits such as {one.score:g}: "
                        "choose another format, or export the probe with --activation sigmoid"
                    )
                scored.append([tags.setdefault(one.label, len(tags)), one.score])
            predictions.append({"uuid": str(uuid.uuid5(SPACE, f"{clip} prediction")), "clip": clip, "tags": scored})
    data = {
        "uuid": str(uuid.uuid5(SPACE, json.dumps(table.about, sort_keys=True))),
        "collection_type": "prediction_set",
        "name": "avex-serve",
        "description": json.dumps(table.about, ensure_ascii=False, sort_keys=True),
        "tags": [{"id": number, "key": "label", "value": label} for label, number in tags.items()],
        "recordings": [_recording(recording) for recording in table.recordings],
        "clips": clips,
        "clip_predictions": predictions,
    }
    json.dump({"version": VERSION, "data": data}, file, ensure_ascii=False)


def _recording(recording: Recording) -> dict[str, Any]:
    start = recording.start
    known = {
        "date": start and start.date().isoformat(),
        "time": start and start.timetz().isoformat(),
        "latitude": recording.latitude,
        "longitude": recording.longitude,
    }
    return {
        "uuid": str(uuid.uuid5(SPACE, recording.path)),
        "path": recording.path,
        "duration": recording.duration,
        "channels": recording.channels,
        "samplerate": recording.sample_rate,
        "hash": recording.digest,
        **{name: value for name, value in known.items() if value is not None},
    }


FORMAT = text_format("aoef", "detections.aoef.json", "application/json", write)
