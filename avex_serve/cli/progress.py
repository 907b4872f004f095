"""How far a run is: a bar on a terminal, or lines of JSON for a program."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avex_serve.archive.run import Progress, Report
    from avex_serve.archive.store import Entry


@contextmanager
def reporting(kind: str) -> Iterator["Report"]:
    """A function that reports a run as ``bar``, ``json`` or ``none``; ``auto``: a bar on a terminal."""
    if kind == "json":
        yield _report_json
    elif kind == "bar" or (kind == "auto" and sys.stderr.isatty()):
        with _bar() as report:
            yield report
    else:
        yield _report_failure


def _report_json(progress: "Progress", entry: "Entry | None") -> None:
    event: dict[str, Any] = {"event": "start"}
    if entry is not None:
        event = {"event": "recording", "path": entry.path, "seconds": entry.duration, "error": entry.error}
    print(json.dumps({**event, **summary(progress)}), flush=True)


def summary(progress: "Progress") -> dict[str, Any]:
    """The numbers of a run, for JSON."""
    return {
        "total": progress.total,
        "known": progress.known,
        "done": progress.done,
        "failed": progress.failed,
        "elapsed": round(progress.elapsed, 3),
        "rate": round(progress.rate, 1),
        "left": None if progress.left is None else round(progress.left, 1),
    }


def _report_failure(progress: "Progress", entry: "Entry | None") -> None:
    if entry is not None and entry.error is not None:
        print(f"avex-serve: {entry.error}", file=sys.stderr)


@contextmanager
def _bar() -> Iterator["Report"]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def report(progress: "Progress", entry: "Entry | None") -> None:
            finished = progress.known + progress.done + progress.failed
            text = f"{progress.rate:,.0f} × real time, {progress.failed} failed"
            bar.update(task, total=progress.total, completed=finished, description=text)
            if entry is not None and entry.error is not None:
                bar.console.print(entry.error, markup=False, highlight=False)

        yield report
