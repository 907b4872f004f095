"""``avex-serve fit``: from labelled recordings to a head with an honest report."""

import argparse
import sys
from pathlib import Path
from typing import Any

from avex_serve.cli.output import interruptible
from avex_serve.errors import DependencyError


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "fit",
        help="train a probe on labelled recordings, and evaluate it",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `FitRequest`
        description="Train a probe on labelled recordings, and evaluate it on recordings that did not train it. "
        "DATA is a folder with a folder for each class, a folder with annotation tables (Raven, Audacity, CSV with "
        "the columns file, start, end, label), or such a table.",
    )
    parser.set_defaults(run=run)
    add_data(parser)
    parser.add_argument("--output", type=Path, help="folder of the probe and its report; --check needs none")
    parser.add_argument("--model", help="backbone: a registered name or a YAML file (default: avex_demo)")
    parser.add_argument("--probe", help="a named variant or a YAML file (default: linear_last)")
    parser.add_argument("--check", action="store_true", help="print what would be trained on, and exit")
    parser.add_argument(
        "--export",
        nargs="?",
        type=Path,
        const=None,
        metavar="DIR",
        help="export the probe as a bundle too (default folder: export/bundles/NAME)",
    )
    add_data_options(parser)
    parser.add_argument(
        "--run",
        dest="store",
        type=Path,
        metavar="RUN_DIR",
        help="use the embeddings that run --embeddings stored there; give its --overlap too",
    )
    parser.add_argument(
        "--target-precision", type=float, metavar="SHARE", help="of the detections above thresholds (default: 0.9)"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the argument of labelled recordings, for the commands that read them."""
    parser.add_argument(
        "data", type=Path, nargs="+", metavar="DATA", help="labelled recordings; several are joined, such as reviews"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about labelled recordings, for the commands that read them."""
    labels = parser.add_argument_group("labelled recordings")
    add_label_options(labels)
    labels.add_argument("--overlap", type=float, metavar="SECONDS", help="of neighbouring windows (default: 0)")
    labels.add_argument("--seed", type=int, help="of all random choices (default: 0)")
    labels.add_argument(
        "--cache", type=Path, metavar="DIR", help="where embeddings are kept (default: ~/.cache/avex-serve)"
    )


def add_label_options(labels: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add the fields of `LabelOptions`."""
    labels.add_argument(
        "--negative",
        dest="negatives",
        action="append",
        metavar="NAME",
        help="a label of stretches without any of the sounds, besides noise, background and other; repeatable",
    )
    labels.add_argument(
        "--fully-annotated", action="store_true", help="stretches without an annotation have none of the sounds"
    )
    labels.add_argument(
        "--label-column", metavar="COLUMN", help="column of the tables with the labels; reviews keep their own"
    )
    labels.add_argument(
        "--group-by", metavar="COLUMN", help="keep recordings with the same value together, such as site"
    )
    labels.add_argument(
        "--min-overlap",
        type=float,
        metavar="SECONDS",
        help="how much of an annotation a window must share to have its label (default: 0.25, or all of it)",
    )


def given_options(arguments: argparse.Namespace, request: type[Any]) -> dict[str, Any]:
    """The fields of a request that were given on the command line."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()}
    return {name: given[name] for name in request.__dataclass_fields__ if name in given}


def run(arguments: argparse.Namespace) -> int:
    """Print the check, or train and print the figures."""
    try:
        from avex_serve.training.files import report_in
        from avex_serve.training.fit import FitRequest, check_data, fit_probe, run_exporter
        from avex_serve.training.report import summary
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[export]'") from error

    request = FitRequest(**given_options(arguments, FitRequest))
    if "check" in arguments:
        print(check_data(request))
        return 0
    with interruptible("embeddings are kept, so that the same command goes on from there"):
        evaluation = fit_probe(request, lambda text: print(text, file=sys.stderr, flush=True))
        print(summary(evaluation))
        print(f"wrote {arguments.output}; the report is {report_in(arguments.output)}")
        if "export" in arguments:
            target = [] if arguments.export is None else ["--output", str(arguments.export)]
            print(run_exporter(["--probe", str(arguments.output), *target]).splitlines()[-1])
    return 0
