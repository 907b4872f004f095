"""``avex-export``: from a trained probe to a bundle."""

import argparse
import contextlib
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from avex_serve import __version__
from avex_serve.bundles.hub import check_push, push_bundle
from avex_serve.bundles.manifest import Activation
from avex_serve.bundles.reading import Bundle, read_manifest
from avex_serve.cli.output import drop_output, escape_unprintable
from avex_serve.errors import AvexServeError, DependencyError, ExportError, InputError

# Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Torch and onnxruntime have no error class for a failed allocation.
_NO_MEMORY = re.compile(r"can't allocate memory|failed to allocate memory|bad_alloc|bad allocation", re.IGNORECASE)
_LONGEST_CLIP = 3600  # seconds; a longer clip is a typing error, and there would not be enough memory for it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or the error's own (see `avex_serve.errors`)."""
    options = vars(_parser().parse_args(argv)).items()  # those that were given
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options}
    escape_unprintable()
    try:
        with _signals_interrupt(), _memory_errors():
            _run(given)
    except AvexServeError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:  # of the output folder; errors of other files are AvexServeErrors
        reason = str(error) if error.filename is None else f"--output {error.filename}: {error.strerror}"
        return _fail(reason, InputError.exit_code)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {str(error) or 'nothing was written'}", 130)
    return 0


def _run(given: dict[str, Any]) -> None:
    no_probe = not given.keys() & {"probe", "embeddings"}
    try:
        if "list" in given:
            _refuse_others(given, {"list"}, "--list")
            from avex_export.recipes import listing

            _say(listing())
        elif "private" in given and "push" not in given:
            raise InputError("--private is for --push; add it, or leave out --private")
        elif "explain" in given:
            if no_probe:
                _refuse_others(given, {"explain", "without"}, "--explain without --probe")
            _explain(given, no_probe=no_probe)
        elif "push" in given and no_probe:
            _refuse_others(given, {"push", "private", "output"}, "--push without --probe")
            if "output" not in given:
                raise InputError(
                    "nothing to push: give --probe to export one, or --output with the folder of a bundle"
                )
            bundle = read_manifest(given["output"])
            _say_how_to_serve(_push(bundle, given["push"], private="private" in given))
        elif no_probe:
            raise InputError("nothing to export: give --probe, or --list to see the probes")
        else:
            _export(given)
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[export]'") from error


def _refuse_others(given: dict[str, Any], used: set[str], mode: str) -> None:
    """Raise InputError for an option that has no effect in this mode."""
    if others := [name for name in given if name not in used]:
        raise InputError(f"--{others[0].replace('_', '-')} has no effect with {mode}; leave out one of them")


def _explain(given: dict[str, Any], *, no_probe: bool) -> None:
    from avex_export.assemble import assemble
    from avex_export.graph import export_graph
    from avex_export.passes import CONSTANTS, EXTERNAL_DATA, SUMMARIES
    from avex_export.request import ExportRequest, read_probes

    request, applied = ExportRequest(**given), None
    if not no_probe:
        applied = export_graph(assemble(request, read_probes(request)), request.without).passes
    _say("passes, in order:")
    for name, summary in SUMMARIES.items():
        effect = ""
        if name in request.without:
            effect = " [left out]"
        elif applied is not None and name not in (CONSTANTS, EXTERNAL_DATA):
            effect = " [applied]" if name in applied else " [nothing to do]"
        _say(f"  {name:14} {summary}{effect}")


def _export(given: dict[str, Any]) -> None:
    from avex_export.export import export_bundle
    from avex_export.request import ExportRequest

    push, private = given.pop("push", None), given.pop("private", False)
    request = ExportRequest(**given)
    if push is not None:
        check_push(push)  # now, since the export may take minutes
    warnings: list[str] = []
    bundle = export_bundle(request, _say, warnings.append)
    if not bundle.manifest.trained:
        print("avex-export: the head has random weights: its answers mean nothing", file=sys.stderr)
    address = str(bundle.directory) if push is None else _push(bundle, push, private=private)
    if set(request.format) == {"pt2"}:
        _say("PT2 is for compilation and can't be served; to serve the bundle, export --format onnx or torchscript")
    else:
        _say_how_to_serve(address)
    for warning in warnings:  # once more, below the table of the verification
        print(f"avex-export: {warning}", file=sys.stderr)


def _push(bundle: Bundle, url: str, *, private: bool) -> str:
    """The address of what was pushed."""
    try:
        pushed = push_bundle(bundle, url, private=private)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{bundle.directory} is whole, and was not pushed") from None
    _say(f"pushed {pushed}")
    return pushed


def _say_how_to_serve(address: str) -> None:
    _say(f"serve it: AVEX_BUNDLE={shlex.quote(address)} bentoml serve avex_serve.service:AvexService")


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Handle SIGTERM and a lost terminal as Ctrl-C, so that no unfinished folder is left."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        for number in _SIGNALS:
            if (previous := signal.getsignal(number)) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, interrupt)
                stack.callback(signal.signal, number, previous)
        yield


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn failed allocations of numpy, torch and onnxruntime into an ExportError with the remedy."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        raise ExportError(
            "there is not enough memory, and long clips take most of it; give a smaller --clip-seconds, or more "
            "memory. Nothing was written"
        ) from error


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `avex-export … | head`: finish the bundle all the same
        drop_output()


def _fail(message: str, code: int) -> int:
    print(f"avex-export: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avex-export",
        argument_default=argparse.SUPPRESS,  # the defaults are those of `ExportRequest`
        description="Export a trained probe with its backbone to ONNX and TorchScript, verify the result, and write "
        "it as a bundle.",
    )
    what = parser.add_argument_group("what to export")
    what.add_argument(
        "--probe",
        action="append",
        help="a named variant (see --list), a YAML file, or the folder of a saved probe; repeat it to export "
        "several probes on one backbone, which then runs once for all",
    )
    what.add_argument(
        "--embeddings",
        action="store_true",
        help="export the backbone without heads; it returns the embeddings that are the input of the probes' heads "
        "(default probe: linear_last)",
    )
    what.add_argument("--model", help="backbone: a registered name or a YAML file (default: the saved probe's)")
    what.add_argument("--weights", type=Path, help="weights of the head: a state dict, or a saved probe's folder")
    what.add_argument(
        "--labels", type=Path, help="text with a label on each line, a table (.csv, .tsv), JSON or YAML"
    )
    what.add_argument("--allow-untrained", action="store_true", help="export a head with random weights")
    what.add_argument(
        "--offline", action="store_true", help="export only the head, for clients that send embeddings"
    )
    what.add_argument("--input-dim", type=_shape, metavar="D|T,D", help="with --offline: the shape of one embedding")

    where = parser.add_argument_group("where to write it")
    where.add_argument("--output", type=Path, help="folder of the bundle (default: export/bundles/NAME)")
    where.add_argument("--name", help="name of the bundle (default: the probe's, or one made from the backbone's)")
    where.add_argument("--bundle-version", metavar="VERSION", help="version of the bundle (default: 1)")
    where.add_argument(
        "--push",
        metavar="hf://OWNER/NAME",
        help="upload the bundle to a repository of the Hugging Face Hub, which is made if there is none; without "
        "--probe: the bundle that is in --output",
    )
    where.add_argument("--private", action="store_true", help="with --push: make a new repository private")

    formats = parser.add_argument_group("formats and precision")
    formats.add_argument(
        "--format",
        choices=("onnx", "torchscript", "pt2"),
        action="append",
        help="repeat it for several formats (default: onnx and torchscript)",
    )
    formats.add_argument(
        "--activation",
        choices=get_args(Activation),
        help="function that turns logits into scores, as in the training (default: the one that save_probe saved)",
    )
    formats.add_argument(
        "--half", action="store_true", help="TorchScript in float16, for CUDA; the front end stays in float32"
    )
    formats.add_argument(
        "--quantize", choices=("int8",), help="add an ONNX graph in 8-bit integers, for transformers (see --list)"
    )
    formats.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="with --quantize: recordings to calibrate on (default: built-in sounds)",
    )
    formats.add_argument(
        "--without", action="append", metavar="PASS", help="leave out an optimising pass (see --explain)"
    )

    clips = parser.add_argument_group("clips")
    clips.add_argument("--clip-seconds", type=_seconds, help="length of a clip (default: the backbone's)")
    clips.add_argument(
        "--dynamic-length",
        action="store_true",
        help="accept clips of any length; recordings are still cut into windows of --clip-seconds",
    )
    clips.add_argument(
        "--padding-mask", action="store_true", help="accept a padding mask with the clips, for transformers"
    )

    verification = parser.add_argument_group("verification")
    verification.add_argument(
        "--verify-audio",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="recordings to verify on (default: synthetic ones)",
    )

    information = parser.add_argument_group("information")
    information.add_argument("--version", action="version", version=__version__)
    information.add_argument("--list", action="store_true", help="list probes, backbones and formats, and exit")
    information.add_argument(
        "--explain", action="store_true", help="list the optimising passes and which apply to the probe, and exit"
    )
    information.add_argument(
        "--profile", action="store_true", help="during the export, measure how much time each pass saves"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _LONGEST_CLIP:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the length of a clip; expected seconds, at most {_LONGEST_CLIP}"
        )
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; expected D or T,D")
    return shape
