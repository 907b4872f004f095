"""``avex-serve run``: bundles on an archive of recordings."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.predict import add_reading, read_cut
from avex_serve.cli.progress import reporting, summary
from avex_serve.cli.tables import add_choice, read_choice, write_tables
from avex_serve.errors import InputError

if TYPE_CHECKING:
    from avex_serve.archive.run import Progress

SOME_FAILED = 1
INTERRUPTED = 130


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "run",
        help="run bundles on many recordings; start it again to go on",
        epilog="Exit codes: 0, all recordings are done; 1, some failed, and status says why; 130, interrupted.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="BUNDLE… PATH…",
        help="one or more bundles, then recordings: files, folders, patterns, @list.txt, or - for standard input",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results are kept")
    add_reading(parser)
    parser.add_argument("--embeddings", action="store_true", help="keep the embeddings, for classify and training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "int8"), default="auto")
    add_progress(parser)
    add_choice(parser)


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add the option of how progress is shown."""
    parser.add_argument(
        "--progress",
        choices=("auto", "bar", "json", "none"),
        default="auto",
        help="on standard error; json: an event a line on standard output (default: a bar on a terminal)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compute what is missing, and write the tables; the exit code tells whether recordings failed."""
    from avex_serve.archive.plan import plan_passes
    from avex_serve.archive.run import run as run_passes
    from avex_serve.archive.store import Store
    from avex_serve.archive.tables import check_choice
    from avex_serve.inference.backend import open_bundle
    from avex_serve.inference.pipeline import Query

    bundles, paths = _split(arguments.arguments)
    choice = read_choice(arguments)
    recordings = _find(paths)
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(open_bundle(bundle, arguments.device, precision=arguments.precision))
            for bundle in bundles
        ]
        for engine in engines:
            if not engine.manifest.trained:
                print(
                    f"avex-serve: bundle {engine.manifest.name} has random weights: its scores mean nothing",
                    file=sys.stderr,
                )
        passes = plan_passes(engines, Query(**read_cut(arguments)), keep_embeddings=arguments.embeddings)
        scores = [results for each in passes for results in each.sets if results.kind == "scores"]
        if scores:
            check_choice(scores, choice)
        store = stack.enter_context(Store.writing(arguments.out))
        try:
            with end_on_sigterm(), reporting(arguments.progress) as report:
                progress = run_passes(store, passes, recordings, report)
        except KeyboardInterrupt:
            print("avex-serve: interrupted; start the same command again to go on", file=sys.stderr)
            return INTERRUPTED
        tables = write_tables(store, arguments.format, choice) if scores else []
    return finish(progress, tables, arguments.progress)


def finish(progress: "Progress", tables: Sequence[Path], kind: str) -> int:
    """Print where the tables are, and the summary of a run; returns the exit code."""
    if kind == "json":
        print(json.dumps({"event": "end", **summary(progress), "tables": [str(table) for table in tables]}))
    else:
        for table in tables:
            print(table)
        print(f"{progress.done} computed, {progress.known} known, {progress.failed} failed")
    return SOME_FAILED if progress.failed else 0


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Make SIGTERM, which schedulers of clusters send, end the block as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _find(paths: list[str]) -> dict[str, str | None]:
    """The recordings by absolute path, sorted; with the reason where there is none.

    Raises:
        AvexServeError: there are no recordings at all.
    """
    from avex_serve.archive.files import LIST, STDIN, find_recordings

    found = find_recordings(LIST + STDIN if path == STDIN else path for path in paths)
    if (note := found.note()) is not None:
        print(f"avex-serve: {note}", file=sys.stderr)
    errors = [error for error in found.recordings.values() if error is not None]
    if len(errors) == len(found.recordings):
        raise errors[0] if errors else InputError("the lists name no recordings; expected one path a line")
    absolute = {os.path.abspath(path): error for path, error in found.recordings.items()}  # noqa: PTH100
    return {path: None if error is None else str(error) for path, error in sorted(absolute.items())}


def _split(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The bundles, which come first, and the paths of recordings."""
    from avex_serve.bundles.manifest import MANIFEST

    count = next((i for i, each in enumerate(arguments) if not (Path(each) / MANIFEST).is_file()), len(arguments))
    if count == 0:
        raise InputError(
            f"{arguments[0]} is no bundle: it has no {MANIFEST}; name the bundles first, then recordings"
        )
    if count == len(arguments):
        raise InputError("no recordings are named; add files, folders, patterns, @list.txt or -")
    return [Path(each) for each in arguments[:count]], arguments[count:]
