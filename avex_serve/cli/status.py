"""``avex-serve status``: what a run has done, what is missing and what failed."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avex_serve.archive.store import Store


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("status", help="what a run has done, what is missing, and what failed and why")
    parser.set_defaults(run=run)
    parser.add_argument("store", metavar="DIR", help="made by avex-serve run: a folder or a URL")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print it; also while another process writes to the store."""
    from avex_serve.archive.store import opened

    with opened(arguments.store) as store:
        status = describe(store)
    print(json.dumps(status, ensure_ascii=False) if arguments.json else _text(status))
    return 0


def describe(store: "Store") -> dict[str, Any]:
    """Recordings by their state, and the sets of results."""
    entries = sorted(store.journal().values(), key=lambda entry: entry.path)
    current = store.current()
    done = {results.name: store.done(results) for results in store.sets().values()}
    computed = [entry for entry in entries if entry.computed]
    whole = [entry for entry in computed if all(entry.recording in done[results.name] for results in current)]
    failed = {entry.path: entry.error for entry in entries if entry.error is not None}
    here = {entry.path for entry in whole} | failed.keys()
    return {
        "recordings": len(entries),
        "done": len(whole),
        "seconds": sum(entry.duration for entry in whole),
        "missing": [entry.path for entry in entries if entry.path not in here],
        "failed": failed,
        "warnings": {entry.path: list(entry.warnings) for entry in whole if entry.warnings},
        "results": [
            {
                "name": name,
                "kind": results.kind,
                "bundle": results.bundle,
                "version": results.version,
                "current": results in current,
                "recordings": len(done[name]),
            }
            for name, results in store.sets().items()
        ],
    }


def _text(status: dict[str, Any]) -> str:
    hours = status["seconds"] / 3600
    lines = [
        f"{status['recordings']} recordings: {status['done']} done ({hours:.1f} h), "
        f"{len(status['missing'])} missing, {len(status['failed'])} failed"
    ]
    for each in status["results"]:
        note = "" if each["current"] else ", not of the last run"
        bundle = f"{each['bundle']} {each['version']}"
        lines.append(f"  {each['kind']} {each['name']}: {bundle}, {each['recordings']} recordings{note}")
    lines += [f"missing: {path}" for path in status["missing"]]
    lines += [f"warning: {path}: {each}" for path, warnings in status["warnings"].items() for each in warnings]
    lines += [f"failed: {reason}" for reason in status["failed"].values()]
    return "\n".join(lines)
