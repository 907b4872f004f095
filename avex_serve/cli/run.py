"""``avex-serve run``: bundles on an archive of recordings."""

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.output import add_device, interruptible, note
from avex_serve.cli.predict import add_reading, read_cut
from avex_serve.cli.progress import reporting, summary
from avex_serve.cli.tables import add_choice, read_choice, write_tables
from avex_serve.errors import InputError

if TYPE_CHECKING:
    from avex_serve.archive.cloud import Look
    from avex_serve.archive.plan import Pass
    from avex_serve.archive.run import Progress
    from avex_serve.archive.shards import Shard

SOME_FAILED = 1
GO_ON = "start the same command again to go on"  # after an interruption


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
        help="one or more bundles (folders or URLs), then recordings: files, folders, patterns, s3:// or gs:// "
        "URLs, @list.txt, or - for standard input",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results are kept: a folder or a URL")
    add_reading(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="compute this part of the recordings, from 1/N to N/N, into a folder of DIR; merge joins them "
        "(default: by the variables of a Slurm job array or of a Kubernetes Indexed Job; none: all recordings)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the Ray cluster of this machine or of RAY_ADDRESS, or else on a new one of this machine",
    )
    parser.add_argument("--embeddings", action="store_true", help="keep the embeddings, for classify and training")
    add_device(parser)
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
    from avex_serve.archive.cluster import connected
    from avex_serve.archive.plan import Job
    from avex_serve.archive.run import run as run_passes
    from avex_serve.archive.store import adding
    from avex_serve.archive.tables import check_choice
    from avex_serve.evidence.first import read_mode
    from avex_serve.inference.pipeline import Query

    bundles, paths = _split(arguments.arguments)
    choice = read_choice(arguments)
    shard = _find_shard(arguments)
    (recordings, objects), part, out = _find(paths), None, arguments.out
    if shard is not None:
        recordings, part = shard.take(recordings)
        out = f"{out.rstrip('/')}/{shard.folder}"
    job = Job(
        bundles=tuple(_absolute(bundle) for bundle in bundles),
        device=arguments.device,
        precision=arguments.precision,
        runtime=arguments.runtime,
        check=read_mode(),
        query=Query(**read_cut(arguments)),
        keep_embeddings=arguments.embeddings,
    )
    with contextlib.ExitStack() as stack:
        passes = stack.enter_context(job.opened())
        _warn_of_random(passes)
        scores = [results for each in passes for results in each.sets if results.kind == "scores"]
        if scores:
            check_choice(scores, choice)
        store = stack.enter_context(adding(out))
        engine = stack.enter_context(connected(job)) if arguments.engine == "ray" else None
        with interruptible(GO_ON), reporting(arguments.progress) as report:
            progress = run_passes(store, passes, recordings, report, objects=objects, part=part, engine=engine)
        tables = write_tables(store, arguments.format, choice) if scores else []
    return finish(progress, tables, arguments.progress)


def _warn_of_random(passes: "Sequence[Pass]") -> None:
    for each in passes:
        for engine in (each.source, *(target.engine for target in each.targets if target.engine is not each.source)):
            if not engine.manifest.trained:
                note(f"bundle {engine.manifest.name} has random weights: its scores mean nothing")


def finish(progress: "Progress", tables: list[str], kind: str) -> int:
    """Print where the tables are, and the summary of a run; returns the exit code."""
    if kind == "json":
        print(json.dumps({"event": "end", **summary(progress), "tables": tables}))
    else:
        for table in tables:
            print(table)
        print(f"{progress.done} computed, {progress.known} known, {progress.failed} failed")
    return SOME_FAILED if progress.failed else 0


def _find_shard(arguments: argparse.Namespace) -> "Shard | None":
    """The shard to compute, which is printed if no option says it; None: all recordings."""
    from avex_serve.archive.shards import check_siblings, find_shard

    found = find_shard(arguments.shard, os.environ)
    if found is None:
        return None
    shard, source = found
    if arguments.shard is None:
        note(f"shard {shard}, by {source}")
    check_siblings(arguments.out, shard)
    return shard


def _find(paths: list[str]) -> "tuple[dict[str, str | None], dict[str, Look]]":
    """The recordings by absolute path, sorted; with the reason where there is none. And what was listed of objects.

    Raises:
        AvexServeError: there are no recordings at all.
    """
    from avex_serve.archive.files import LIST, STDIN, find_recordings

    found = find_recordings((LIST + STDIN if path == STDIN else path for path in paths), remote=True)
    if (hidden := found.note()) is not None:
        note(hidden)
    errors = [error for error in found.recordings.values() if error is not None]
    if len(errors) == len(found.recordings):
        raise errors[0] if errors else InputError("the lists name no recordings; expected one path a line")
    absolute = {_absolute(path): error for path, error in found.recordings.items()}
    reasons = {path: None if error is None else str(error) for path, error in sorted(absolute.items())}
    return reasons, found.objects


def _absolute(path: str) -> str:
    """A path for another process, which may have another working directory; a URL as it is."""
    from avex_serve.bundles.remote import is_remote

    return path if is_remote(path) else os.path.abspath(path)  # noqa: PTH100


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The bundles, which come first, and the paths of recordings."""
    from avex_serve.bundles.reading import no_manifest
    from avex_serve.bundles.remote import is_bundle

    count = next((i for i, each in enumerate(arguments) if not is_bundle(each)), len(arguments))
    if count == 0:
        raise InputError(
            f"{arguments[0]} {no_manifest(Path(arguments[0]))}. The bundles come first, then the recordings"
        )
    if count == len(arguments):
        raise InputError("no recordings are named; add files, folders, patterns, @list.txt or -")
    return arguments[:count], arguments[count:]
