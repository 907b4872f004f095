"""``avex-serve evaluate``: any bundle on labelled recordings."""

import argparse
import sys
from pathlib import Path
from typing import Any

from avex_serve.cli.fit import add_data, add_data_options, given_options


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a bundle on labelled recordings",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `EvaluationRequest`
        description="Evaluate a bundle on labelled recordings that it was not trained on. DATA is as for fit.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    add_data(parser)
    parser.add_argument("--probe", help="which head of the bundle (default: the first)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write the report: report.html and tables"
    )
    add_data_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the figures, and write the report if a folder was given."""
    from avex_serve.training.evaluate import EvaluationRequest, evaluate_bundle
    from avex_serve.training.files import report_in
    from avex_serve.training.report import summary

    request = EvaluationRequest(**given_options(arguments, EvaluationRequest))
    evaluation = evaluate_bundle(request, lambda text: print(text, file=sys.stderr, flush=True))
    print(summary(evaluation))
    if request.output is not None:
        print(f"wrote {request.output}; the report is {report_in(request.output)}")
    return 0
