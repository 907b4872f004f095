"""``avex-serve``: answers from a bundle without a server, its verification, the settings, and the demo.

Each command imports its modules when it runs, so that a small command starts at once.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from avex_serve import __version__
from avex_serve.errors import AvexServeError, VerificationError

if TYPE_CHECKING:
    from avex_serve.inference.results import Prediction


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or the error's own (see `avex_serve.errors`)."""
    arguments = _parser().parse_args(argv)
    escape_unprintable()
    try:
        if arguments.command == "predict":
            return _predict(arguments)
        if arguments.command == "verify":
            return _verify(arguments)
        if arguments.command == "settings":
            return _settings(arguments)
        from avex_serve.demo.run import run_demo

        run_demo()
    except AvexServeError as error:
        return _fail(error)
    except BrokenPipeError:  # `avex-serve predict … | head`: the reader has what it wanted
        drop_output()
        return 1
    return 0


def escape_unprintable() -> None:
    """Make standard output escape characters that it can't show: labels and file names may have any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard further output: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="avex-serve", description="Name the sounds in recordings with a bundle.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="name the sounds in recordings, without a server")
    predict.add_argument("bundle", type=Path, help="made by avex-export")
    predict.add_argument("files", type=Path, nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    predict.add_argument("--threshold", type=float, help="lowest score to report (default: 0.5)")
    predict.add_argument("--top-k", type=int, help="report at most this number of labels for each window")
    predict.add_argument("--overlap", type=float, default=0.0, help="of neighbouring windows, in seconds")
    predict.add_argument("--probe", help="which head of the bundle to run")
    predict.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    predict.add_argument("--precision", choices=("auto", "float32", "int8"), default="auto")
    predict.add_argument(
        "--json", action="store_true", help="a line of JSON for each file: the service's, with the file"
    )
    verify = commands.add_parser("verify", help="run the bundle's evidence again, on this machine")
    verify.add_argument("bundle", type=Path, help="made by avex-export")
    verify.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    settings = commands.add_parser("settings", help="list the settings of the service with their values")
    settings.add_argument("--json", action="store_true", help="as a JSON list")
    commands.add_parser("demo", help="export the demo probe, serve it and query it over HTTP and gRPC")
    return parser


def _predict(arguments: argparse.Namespace) -> int:
    """Print an answer for each file; continue after a file that can't be read."""
    from avex_serve.audio.reader import open_audio
    from avex_serve.inference import pipeline
    from avex_serve.inference.backend import open_bundle
    from avex_serve.inference.pipeline import Query

    query = Query(
        threshold=arguments.threshold, top_k=arguments.top_k, overlap=arguments.overlap, probe=arguments.probe
    )
    code = 0
    with open_bundle(arguments.bundle, arguments.device, precision=arguments.precision) as engine:
        if not engine.manifest.trained:
            print("avex-serve: the head has random weights: its answers mean nothing", file=sys.stderr)
        for path in arguments.files:
            try:
                prediction = pipeline.predict(engine, partial(open_audio, path), query)
            except AvexServeError as error:
                code = _fail(error)
                continue
            print(_json(path, prediction) if arguments.json else _table(path, prediction), flush=True)
    return code


def _verify(arguments: argparse.Namespace) -> int:
    from avex_serve.evidence.verify import verify_bundle

    report, passed = verify_bundle(arguments.bundle, arguments.device)
    print(report)
    if not passed:
        raise VerificationError(
            f"on this machine {arguments.bundle} differs from its evidence (✗ above); copy it again, or send this "
            "table to its makers"
        )
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    from avex_serve.service.settings import list_settings, table

    settings = list_settings()
    print(json.dumps([setting._asdict() for setting in settings], indent=2) if arguments.json else table(settings))
    return 0


def _json(path: Path, prediction: "Prediction") -> str:
    return json.dumps({"file": str(path), **asdict(prediction)})


def _table(path: Path, prediction: "Prediction") -> str:
    lines = [f"{path}: {prediction.duration:.1f} s, {len(prediction.detections)} detections"]
    lines += [f"  {d.start:8.2f} {d.end:8.2f}  {d.score:6.3f}  {d.label}" for d in prediction.detections]
    return "\n".join(lines)


def _fail(error: AvexServeError) -> int:
    print(f"avex-serve: {error}", file=sys.stderr)
    return error.exit_code
