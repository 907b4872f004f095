"""Record what the service answers to the table of requests, or compare it with the recording.

    python -m tests.recorded.record            write recording.json and messages.json
    python -m tests.recorded.record --check    ask again and print what differs; exit 1 if anything does

`--strict` compares byte for byte, for a recording of the same machine. The wording of messages is kept apart, since
it may change on purpose: `--wording` prints how it differs, and doesn't fail for it.
"""

import argparse
import contextlib
import difflib
import json
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

with warnings.catch_warnings():
    # BentoML itself uses what pydantic and pathspec call deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from .asking import Asked
    from .comparing import differences
    from .requests import TABLE
    from .servers import serving, situation

HERE = Path(__file__).parent
RECORDING, MESSAGES = HERE / "recording.json", HERE / "messages.json"
AT_ONCE = 2  # servers


def answers(name, folder):
    """What a server says: by request its record, and the wording of those that have any."""
    records, wording = {}, {}
    with serving(name, folder) as server, contextlib.closing(Asked(server, folder)) as asked:
        for state, requests in groupby(TABLE[name], lambda request: request.situation):
            with situation(state, server):
                for request in requests:
                    try:
                        records[request.name], words = request.ask(asked)
                    except Exception as error:
                        error.add_note(f"{name}: {request.name}")
                        raise
                    if words is not None:
                        wording[request.name] = words
    return records, wording


def compare(name, records, recording, *, strict=False):
    """What differs from the recording of a server, a line each, with the request's name."""
    found = []
    for request in TABLE[name]:
        if request.name not in recording:
            found.append(f"{name}: {request.name}: not in the recording")
            continue
        parts = differences(recording[request.name], records[request.name], strict=strict, lossy=request.lossy)
        found += [f"{name}: {request.name}: {part}" for part in parts]
    known = {request.name for request in TABLE[name]}
    return found + [f"{name}: {gone}: no longer in the table" for gone in recording if gone not in known]


def read(path):
    """A file as `write` leaves it."""
    return json.loads(path.read_text("utf-8"))


def write(path, servers):
    """A line for each request, so that a difference between two recordings can be read."""
    parts = []
    for server, entries in servers.items():
        lines = ",\n".join(f"  {_dumped(name)}: {_dumped(entry)}" for name, entry in entries.items())
        parts.append(f" {_dumped(server)}: {{\n{lines}\n }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


def _dumped(value):
    return json.dumps(value, ensure_ascii=False)


def _all_answers():
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        asking = {name: pool.submit(answers, name, Path(folder) / name) for name in TABLE}
        return {name: future.result() for name, future in asking.items()}


def _check(found, *, strict, wording):
    recording, messages = read(RECORDING), read(MESSAGES)
    lines = [
        line
        for name, (records, _) in found.items()
        for line in compare(name, records, recording.get(name, {}), strict=strict)
    ]
    if wording:
        for name, (_, words) in found.items():
            before, now = (_lines(each) for each in (messages.get(name, {}), words))
            for line in difflib.unified_diff(before, now, f"{name} as recorded", f"{name} now", n=0, lineterm=""):
                print(line)
    print("\n".join(lines) or "every answer is as recorded")
    return 1 if lines else 0


def _lines(wording):
    return [f"{name}: {_dumped(words)}" for name, words in wording.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the recording")
    parser.add_argument("--strict", action="store_true", help="compare byte for byte")
    parser.add_argument("--wording", action="store_true", help="print how messages differ")
    options = parser.parse_args()
    began = time.monotonic()
    found = _all_answers()
    counts = {name: len(records) for name, (records, _) in found.items()}
    print(f"{sum(counts.values())} requests in {time.monotonic() - began:.0f} s: {counts}", file=sys.stderr)
    if options.check:
        return _check(found, strict=options.strict, wording=options.wording)
    write(RECORDING, {name: records for name, (records, _) in found.items()})
    write(MESSAGES, {name: wording for name, (_, wording) in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
