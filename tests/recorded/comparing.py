"""Whether an answer is the recorded one."""

import base64
import json
import math
import re

import numpy as np

# Between processors, and where a lossy format was decoded between their decoders.
RELATIVE, ABSOLUTE = 1e-5, 2e-6
LOSSY = 1e-3
CLASSIFIED = re.compile(r"(-?\d+\.\d{6})(:\d+(?::.*)?)", re.DOTALL)  # value:index:label
SHOWN = (
    300  # characters of a value that a difference shows, of long texts from a little before the first that differs
)
BEFORE = 60


def differences(recorded, got, *, strict=False, lossy=False):
    """What of an answer is not as recorded, a line for each part.

    Args:
        recorded: see `asking.Asked`.
        got: the same.
        strict: byte for byte; otherwise numbers may differ a little, as those of another processor do.
        lossy: they may differ a little more.
    """
    if strict:
        recorded, got = _plain(recorded), _plain(got)
    else:
        recorded, got = _parsed(recorded), _parsed(got)
    return list(_walk("", recorded, got, LOSSY if lossy else 0))


def _plain(record):
    return json.loads(json.dumps(record))


def _parsed(record):
    """The record with the documents and tensors in it."""
    record = _plain(record)
    if "json" in record:
        record["json"] = json.loads(record["json"])
    answers = [record.get("answer", {}), *record.get("answers", [])]
    for holder, name in ((record, "tensors"), *((answer, "raw_output_contents") for answer in answers)):
        if name in holder:
            holder[name] = [[kind, _tensor(kind, base64.b64decode(data))] for kind, data in holder[name]]
    return record


def _tensor(kind, data):
    if kind == "FP32":
        return np.frombuffer(data, "<f4").astype(float).tolist()
    if kind == "BYTES":
        texts, at = [], 0
        while at < len(data):
            start = at + 4
            at = start + int.from_bytes(data[at:start], "little")
            texts.append(data[start:at].decode())
        return texts
    return data.hex()


def _walk(path, recorded, got, lossy):
    if type(recorded) is not type(got):
        yield _line(path, recorded, got)
    elif isinstance(recorded, dict):
        if list(recorded) != list(got):
            yield _line(f"{path} (keys)", list(recorded), list(got))
        for name in recorded:
            if name in got:
                yield from _walk(f"{path}.{name}".lstrip("."), recorded[name], got[name], lossy)
    elif isinstance(recorded, list):
        if len(recorded) != len(got):
            yield _line(path, recorded, got)
        else:
            for index, pair in enumerate(zip(recorded, got, strict=True)):
                yield from _walk(f"{path}[{index}]", *pair, lossy)
    elif not _same(recorded, got, lossy):
        yield _line(path, recorded, got)


def _same(recorded, got, lossy):
    if isinstance(recorded, float):
        return _close(recorded, got, lossy)
    if (
        isinstance(recorded, str)
        and (pair := [CLASSIFIED.fullmatch(text) for text in (recorded, got)])
        and all(pair)
    ):
        (value, rest), (got_value, got_rest) = (match.groups() for match in pair)
        return rest == got_rest and _close(float(value), float(got_value), lossy)
    return recorded == got


def _close(recorded, got, lossy):
    return math.isclose(recorded, got, rel_tol=max(RELATIVE, lossy), abs_tol=max(ABSOLUTE, lossy))


def _line(path, recorded, got):
    if isinstance(recorded, str) and isinstance(got, str) and max(len(recorded), len(got)) > SHOWN:
        pairs = enumerate(zip(recorded, got, strict=False))
        first = next((index for index, (one, other) in pairs if one != other), min(len(recorded), len(got)))
        start = max(0, first - BEFORE)
        path, recorded, got = f"{path} from {start}", recorded[start:], got[start:]
    return f"{path}: recorded {_shown(recorded)}, now {_shown(got)}"


def _shown(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
