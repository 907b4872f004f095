"""``avex-serve retrain``: another head from the decisions about a run, and its scores."""

import argparse
import sys
from pathlib import Path
from typing import Any

from avex_serve.cli.fit import add_label_options, given_options
from avex_serve.cli.output import interruptible
from avex_serve.errors import DependencyError


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "retrain",
        help="train another head on the decisions about a run, and score the run with it",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `RetrainRequest`
        description="Train a head on the decisions about a run with stored embeddings, compare it with the head "
        "that was reviewed, on recordings that did not train it, and score the run with it. The head, its bundle "
        "and both reports are in RUN_DIR/retrained. It is fit, classify and compare in one.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("store", type=Path, metavar="RUN_DIR", help="made by avex-serve run --embeddings")
    parser.add_argument("--model", required=True, help="backbone of the run: a registered name or a YAML file")
    add_retraining(parser)
    parser.add_argument("--reviews", type=Path, metavar="DIR", help="the decisions (default: RUN_DIR/reviews)")
    parser.add_argument("--probe", help="whose scores were reviewed (default: the first)")
    parser.add_argument("--seed", type=int, help="of all random choices (default: 0)")
    parser.add_argument(
        "--target-precision", type=float, metavar="SHARE", help="of the detections above thresholds (default: 0.9)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where embeddings are kept (default: ~/.cache/avex-serve)"
    )


def add_retraining(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the options that review has too, for `given_again`."""
    parser.add_argument(
        "--variant", metavar="NAME", help="of the new head: a named variant or a YAML file (default: linear_last)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        action="append",
        metavar="DATA",
        help="labelled recordings that train it too, such as those of the first fit; repeatable",
    )
    add_label_options(parser)


def given_again(arguments: argparse.Namespace) -> list[str]:
    """The options of `add_retraining` as they were given, for a command that is started with them."""
    values = {
        "--variant": arguments.variant,
        "--labels": arguments.labels,
        "--negative": arguments.negatives,
        "--label-column": arguments.label_column,
        "--group-by": arguments.group_by,
        "--min-overlap": arguments.min_overlap,
    }
    given = [
        f"{option}={each}"
        for option, value in values.items()
        if value is not None
        for each in (value if isinstance(value, list) else [value])
    ]
    return [*given, *(["--fully-annotated"] if arguments.fully_annotated else [])]


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison."""
    try:
        from avex_serve.training.compare import table
        from avex_serve.training.retrain import RetrainRequest, retrain
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[export]'") from error

    given = given_options(arguments, RetrainRequest)
    with interruptible("embeddings are kept"):
        folder, comparison = retrain(RetrainRequest(**given), lambda text: print(text, file=sys.stderr, flush=True))
    if comparison is not None:
        print(table(comparison))
    print(f"wrote {folder}; review its scores by: avex-serve review {arguments.store} --probe {folder.name}")
    return 0
