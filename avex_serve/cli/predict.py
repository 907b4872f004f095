"""``avex-serve predict``: answers from a bundle, without a server."""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.cli.output import fail, parse_channel
from avex_serve.errors import AvexServeError

if TYPE_CHECKING:
    from avex_serve.inference.results import Prediction


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("predict", help="name the sounds in recordings, without a server")
    parser.set_defaults(run=run)
    parser.add_argument("bundle", type=Path, help="made by avex-export")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    parser.add_argument("--threshold", type=float, help="lowest score to report (default: 0.5)")
    parser.add_argument("--top-k", type=int, help="report at most this number of labels for each window")
    parser.add_argument("--overlap", type=float, default=0.0, help="of neighbouring windows, in seconds")
    parser.add_argument(
        "--final-clip",
        choices=("none", "extend", "remainder", "full"),
        default="remainder",
        help="an end shorter than a window: left out, padded, as it is (default), or a window moved back",
    )
    parser.add_argument("--channel", type=parse_channel, default="mix", help="N, from 1, or mix: the mean of all")
    parser.add_argument("--probe", help="which head of the bundle to run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "int8"), default="auto")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON for each file: the service's, with the file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print an answer for each file; continue after a file that can't be read."""
    from avex_serve.audio.reader import open_audio
    from avex_serve.inference import pipeline
    from avex_serve.inference.backend import open_bundle
    from avex_serve.inference.pipeline import Query

    query = Query(
        threshold=arguments.threshold,
        top_k=arguments.top_k,
        overlap=arguments.overlap,
        final_clip=arguments.final_clip,
        channel=arguments.channel,
        probe=arguments.probe,
    )
    code = 0
    with open_bundle(arguments.bundle, arguments.device, precision=arguments.precision) as engine:
        if not engine.manifest.trained:
            print("avex-serve: the head has random weights: its answers mean nothing", file=sys.stderr)
        for path in arguments.files:
            try:
                prediction = pipeline.predict(engine, partial(open_audio, path), query)
            except AvexServeError as error:
                code = fail(error)
                continue
            for warning in prediction.warnings:
                print(f"avex-serve: {path}: {warning}", file=sys.stderr)
            print(_json(path, prediction) if arguments.json else _table(path, prediction), flush=True)
    return code


def _json(path: Path, prediction: "Prediction") -> str:
    return json.dumps({"file": str(path), **asdict(prediction)})


def _table(path: Path, prediction: "Prediction") -> str:
    lines = [f"{path}: {prediction.duration:.1f} s, {len(prediction.detections)} detections"]
    lines += [f"  {d.start:8.2f} {d.end:8.2f}  {d.score:6.3f}  {d.label}" for d in prediction.detections]
    return "\n".join(lines)
