"""``avex-export``: from a trained probe to a bundle."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from avex_serve.errors import AvexServeError, DependencyError, InputError

_BUNDLES = Path("export") / "bundles"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or the error's own (see `avex_serve.errors`)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.list:
            _list()
        elif arguments.probe is None:
            raise InputError("nothing to export: give --probe, or --list to see what there is")
        else:
            _export(arguments)
    except AvexServeError as error:
        print(f"avex-export: {error}", file=sys.stderr)
        return error.exit_code
    except FileExistsError as error:
        print(f"avex-export: {error}", file=sys.stderr)
        return InputError.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avex-export",
        description="Export a trained probe with its backbone to ONNX and TorchScript, verified, as a bundle.",
    )
    parser.add_argument("--probe", help="a named variant (see --list), a YAML file, or a saved probe's folder")
    parser.add_argument("--model", help="backbone: a registered name or a YAML file (default: the saved probe's)")
    parser.add_argument("--weights", type=Path, help="weights of the head: a state dict, or a saved probe's folder")
    parser.add_argument("--labels", type=Path, help="JSON {label: index}, or text with one label a line")
    parser.add_argument("--clip-seconds", type=_positive, help="length of a clip (default: the backbone's)")
    parser.add_argument(
        "--activation", choices=("sigmoid", "softmax", "none"), default="sigmoid", help="of the scores"
    )
    parser.add_argument("--format", choices=("onnx", "torchscript"), action="append", help="default: both")
    parser.add_argument("--output", type=Path, help=f"the bundle's folder (default: {_BUNDLES}/NAME)")
    parser.add_argument("--offline", action="store_true", help="the head alone, for clients that bring embeddings")
    parser.add_argument("--input-dim", type=_shape, metavar="D|T,D", help="with --offline: shape of one embedding")
    parser.add_argument("--allow-untrained", action="store_true", help="export a head with random weights")
    parser.add_argument("--verify-audio", type=Path, nargs="+", default=[], help="recordings to verify on as well")
    parser.add_argument("--list", action="store_true", help="list the named variants and the models")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    try:
        from avex_export.assemble import Request
        from avex_export.export import FORMATS, export_bundle
        from avex_export.recipes import find_recipe
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[export]'") from error
    try:
        recipe = find_recipe(arguments.probe)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"--probe {arguments.probe}: {error}") from error
    if arguments.input_dim is not None and not arguments.offline:
        raise InputError("--input-dim is for --offline; an audio bundle takes its shapes from the backbone")
    request = Request(
        recipe=recipe,
        model=arguments.model,
        weights=arguments.weights,
        labels=arguments.labels,
        clip_seconds=arguments.clip_seconds,
        offline=arguments.offline,
        input_dim=arguments.input_dim,
        allow_untrained=arguments.allow_untrained,
    )
    output = arguments.output or _BUNDLES / recipe.name
    formats = tuple(dict.fromkeys(arguments.format or FORMATS))
    export_bundle(request, output, formats, arguments.activation, arguments.verify_audio)
    print(f"serve it: AVEX_BUNDLE={output} bentoml serve avex_serve.service:AvexService")


def _list() -> None:
    from avex_export.recipes import variants
    from avex_serve.models.utils.registry import list_models

    print("probes (--probe):")
    for name, line in variants().items():
        print(f"  {name:18} {line}")
    print("models (--model):")
    for name, model in list_models().items():
        print(f"  {name:38} {model['description']}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected D or T,D")
    return shape
