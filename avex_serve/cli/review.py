"""``avex-serve review``: look at and listen to what was found, and decide, in a browser on this machine."""

import argparse
import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.output import note
from avex_serve.cli.retrain import add_retraining, given_again
from avex_serve.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from avex_serve.review.app import Material
    from avex_serve.review.retraining import Retraining


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "review",
        help="review detections in a browser on this machine, and label them",
        description="Open a page on this machine to look at and listen to windows of a run, or to rows of other "
        "programs' tables, and to decide by one key each. Every decision is written at once to a file for each "
        "annotator, which fit, evaluate and calibrate read.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, nargs="?", metavar="RUN_DIR", help="made by avex-serve run")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="in place of RUN_DIR: tables of detections, such as BirdNET's CSV or Raven's selections",
    )
    parser.add_argument("--probe", help="the probe whose scores count (default: the first)")
    parser.add_argument(
        "--reviews", type=Path, metavar="DIR", help="where decisions are kept (default: RUN_DIR/reviews)"
    )
    parser.add_argument("--port", type=int, default=8766, help="on 127.0.0.1; 0: any that is free (default: 8766)")
    parser.add_argument(
        "--target-precision",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of detections above the thresholds that the page shows (default: 0.9)",
    )
    retraining = parser.add_argument_group("retraining from the page, as avex-serve retrain does it")
    retraining.add_argument("--model", help="backbone of the run: a registered name or a YAML file")
    add_retraining(retraining)
    parser.add_argument("--open", action="store_true", help="open the page in the usual browser")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from avex_serve.review.server import serve

    if (arguments.store is None) == (arguments.table is None):
        raise InputError("expected either RUN_DIR or --table FILE")
    if not 0 < arguments.target_precision < 1:
        raise InputError(f"--target-precision {arguments.target_precision}; expected more than 0 and less than 1")

    def say(address: str) -> None:
        print(f"Open {address}\nCtrl-C ends it. Decisions are kept in {material.book.folder}.", flush=True)
        if arguments.open:
            webbrowser.open(address)

    material = _from_store(arguments) if arguments.table is None else _from_tables(arguments)
    serve(material, arguments.port, say)
    return 0


def _from_store(arguments: argparse.Namespace) -> "Material":
    from avex_serve.archive.report import PAGE
    from avex_serve.archive.store import Store
    from avex_serve.review.app import Material, ScoredPool
    from avex_serve.review.book import REVIEWS, Book
    from avex_serve.review.sources import embeddings_of, list_probes, read_pool, read_scores, similarity_to

    store = Store(arguments.store)
    pool, results = read_pool(store, arguments.probe)
    first = next(each for each in results.probes if arguments.probe in (None, each.name))
    similar = partial(similarity_to, store, pool, results) if embeddings_of(store, results) else None
    book = Book(arguments.reviews or store.folder.resolve() / REVIEWS)

    def probes() -> list[str]:
        return [probe.name for _, probe in list_probes(Store(arguments.store), results)]

    def rescore(name: str) -> ScoredPool:
        now = Store(arguments.store)
        for each, probe in list_probes(now, results):
            if probe.name == name:
                return ScoredPool(read_scores(now, pool, each, probe), probe.scale, name, probe.calibrator)
        raise NotFoundError(f"the run has no scores of a probe {name!r}")

    return Material(
        title=store.folder.resolve().name,
        scored=ScoredPool(pool, first.scale, first.name, first.calibrator),
        book=book,
        channel=results.identity.get("channel", "mix"),
        target_precision=arguments.target_precision,
        similar=similar,
        probes=probes,
        rescore=rescore,
        report=store.folder / PAGE,
        retraining=_retraining(arguments, book.folder, first.name, embeddings=similar is not None),
    )


def _retraining(arguments: argparse.Namespace, reviews: Path, probe: str, *, embeddings: bool) -> "Retraining":
    """What the page needs to retrain, or the reason why it can't."""
    from avex_serve.review.retraining import Retraining, missing_packages

    missing = missing_packages()
    if not embeddings:
        missing = "The run has no embeddings. Start the same avex-serve run again with --embeddings."
    elif missing is None and arguments.model is None:
        missing = "The backbone is not known. Start avex-serve review with --model, as for avex-serve fit."
    options = ["--model", str(arguments.model), "--reviews", str(reviews), "--probe", probe]
    options += ["--target-precision", str(arguments.target_precision)]
    return Retraining(arguments.store, [*options, *given_again(arguments)], missing)


def _from_tables(arguments: argparse.Namespace) -> "Material":
    from avex_serve.review.app import Material, ScoredPool
    from avex_serve.review.book import REVIEWS, Book
    from avex_serve.review.sources import read_tables

    tables = arguments.table
    pool, left_out = read_tables(tables)
    if left_out:
        note(f"left out: {left_out} rows without a label, or about recordings that are not there or end before them")
    return Material(
        title=", ".join(table.name for table in tables[:3]),
        scored=ScoredPool(pool),
        book=Book(arguments.reviews or tables[0].resolve().parent / REVIEWS),
        target_precision=arguments.target_precision,
    )
