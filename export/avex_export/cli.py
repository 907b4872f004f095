"""``avex-export``: from a trained probe to a bundle."""

import argparse
import contextlib
import difflib
import re
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avex_serve.bundles.manifest import NAME_PATTERN
from avex_serve.errors import AvexServeError, DependencyError, ExportError, InputError
from avex_serve.terminal import drop_output, escape_unprintable

if TYPE_CHECKING:
    from avex_export.recipes import Recipe
    from avex_export.sources import Request

_BUNDLES = Path("export") / "bundles"
_USUAL_PROBE = "linear_last"
# Windows lacks the second.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Torch and onnxruntime have no error class for a failed allocation.
_NO_MEMORY = re.compile(r"can't allocate memory|failed to allocate memory|bad_alloc|bad allocation", re.IGNORECASE)
_LONGEST_CLIP = 3600  # seconds; beyond it, numbers are slips of the keyboard that end in the allocator's messages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or the error's own (see `avex_serve.errors`)."""
    arguments = _parser().parse_args(argv)
    escape_unprintable()
    try:
        with _ended_by_signals(), _memory_errors():
            _run(arguments)
    except AvexServeError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:  # of the output folder; those of other files were told by name
        told = str(error) if error.filename is None else f"--output {error.filename}: {error.strerror}"
        return _fail(told, InputError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if not (arguments.probe or arguments.embeddings or arguments.list or arguments.explain):
        raise InputError("nothing to export: give --probe, or --list to see what there is")
    if arguments.list:
        _refuse_beside("--list", arguments, {"list"})
    elif not (arguments.probe or arguments.embeddings):
        _refuse_beside("--explain without --probe", arguments, {"explain", "without"})
    try:
        if arguments.list:
            from avex_export.listing import listing

            _say(listing())
        elif arguments.explain:
            _explain(arguments)
        else:
            _export(arguments)
    except ModuleNotFoundError as error:
        raise DependencyError(f"{error.name} is not installed; pip install 'avex-serve[export]'") from error


def _refuse_beside(what: str, arguments: argparse.Namespace, used: Collection[str]) -> None:
    """Raise InputError for an option that is given and would have no effect."""
    for name, usual in vars(_parser().parse_args([])).items():
        if name not in used and getattr(arguments, name) != usual:
            raise InputError(f"--{name.replace('_', '-')} has no effect beside {what}; leave out one of them")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a lost terminal end the command as Ctrl-C does, so that the half-written folder goes."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        for number in _ENDINGS:
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
            "there is not enough memory: long clips take most of it; give a smaller --clip-seconds, or more memory. "
            "Nothing was written"
        ) from error


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `avex-export … | head`: the bundle is made all the same
        drop_output()


def _fail(message: str, code: int) -> int:
    print(f"avex-export: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avex-export",
        description="Export a trained probe with its backbone to ONNX and TorchScript, verified, as a bundle.",
    )
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        help="a named variant (see --list), a YAML file, or a saved probe's folder; several share one pass of the "
        "backbone",
    )
    parser.add_argument(
        "--embeddings",
        action="store_true",
        help=f"the backbone alone, answering what the heads of these probes read (default: of {_USUAL_PROBE})",
    )
    parser.add_argument("--model", help="backbone: a registered name or a YAML file (default: the saved probe's)")
    parser.add_argument("--weights", type=Path, help="weights of the head: a state dict, or a saved probe's folder")
    parser.add_argument("--labels", type=Path, help="JSON {label: index}, or text with one label a line")
    parser.add_argument("--clip-seconds", type=_seconds, help="length of a clip (default: the backbone's)")
    parser.add_argument(
        "--dynamic-length",
        action="store_true",
        help="take clips of any length; recordings are cut to --clip-seconds",
    )
    parser.add_argument(
        "--padding-mask", action="store_true", help="take a padding mask beside the clips, for BEATs and EAT"
    )
    parser.add_argument(
        "--activation", choices=("sigmoid", "softmax", "none"), help="of the scores (default: sigmoid)"
    )
    parser.add_argument(
        "--format", choices=("onnx", "torchscript", "pt2"), action="append", help="default: onnx and torchscript"
    )
    parser.add_argument("--quantize", choices=("int8",), help="add a graph in 8-bit integers, for BEATs and EAT")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="with --quantize: recordings (default: built-in sounds)"
    )
    parser.add_argument("--name", help="of the bundle (default: the probe's, or after the backbone)")
    parser.add_argument("--bundle-version", default="1", metavar="VERSION", help="of the bundle (default: 1)")
    parser.add_argument("--output", type=Path, help=f"the bundle's folder (default: {_BUNDLES}/NAME)")
    parser.add_argument("--offline", action="store_true", help="the head alone, for clients that bring embeddings")
    parser.add_argument("--input-dim", type=_shape, metavar="D|T,D", help="with --offline: shape of one embedding")
    parser.add_argument("--allow-untrained", action="store_true", help="export a head with random weights")
    parser.add_argument(
        "--verify-audio",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="recordings to verify on (default: synthetic ones)",
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="PASS", help="leave out a pass (see --explain)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="tell which passes make the graph fast; write nothing"
    )
    parser.add_argument("--profile", action="store_true", help="measure what each pass buys on this machine")
    parser.add_argument("--half", action="store_true", help="TorchScript in float16, for CUDA; the front end is not")
    parser.add_argument("--list", action="store_true", help="list probes, backbones and formats")
    return parser


def _explain(arguments: argparse.Namespace) -> None:
    from avex_export.assemble import assemble
    from avex_export.graph import export_graph
    from avex_export.passes import SUMMARIES

    applied, without = None, _without(arguments)
    if arguments.probe or arguments.embeddings:
        applied = export_graph(assemble(_request(arguments)), without).passes
    _say("passes, in order:")
    for name, summary in SUMMARIES.items():
        _say(f"  {name:14} {summary}{_told(name, applied, without)}")


def _told(name: str, applied: Sequence[str] | None, without: Sequence[str]) -> str:
    from avex_export.passes import CONSTANTS, EXTERNAL_DATA

    if name in without:
        return " [left out]"
    if applied is None or name in (CONSTANTS, EXTERNAL_DATA):
        return ""
    return " [applied]" if name in applied else " [nothing to do]"


def _without(arguments: argparse.Namespace) -> list[str]:
    from avex_export.passes import SUMMARIES

    for name in arguments.without:
        if name not in SUMMARIES:
            close = difflib.get_close_matches(name, SUMMARIES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"--without {name}: no such pass; {hint}there are {', '.join(SUMMARIES)}")
    return list(arguments.without)


def _request(arguments: argparse.Namespace) -> "Request":
    from avex_export.sources import Request

    recipes = _recipes(arguments)
    if arguments.embeddings:
        for option in ("offline", "labels", "activation"):
            if getattr(arguments, option):
                raise InputError(f"--{option} is for heads, which --embeddings leaves out; give one of them")
    if len(recipes) > 1:
        if arguments.offline:
            raise InputError("--offline exports one head; give one --probe, or export the heads one by one")
        if arguments.weights is not None:
            raise InputError("--weights is for one probe; save each probe with save_probe() and give its folder")
        if arguments.labels is not None and any(recipe.saved is not None for recipe in recipes):
            raise InputError(
                "--labels would name the classes of every probe, and saved ones bring their own; write the others "
                "with save_probe() and their labels too"
            )
    for option, given in {"name": arguments.name, "bundle-version": arguments.bundle_version}.items():
        if given is not None and not re.fullmatch(NAME_PATTERN, given):
            raise InputError(f"--{option} {given!r}: expected letters, digits, '.', '_' and '-', at most 128")
    if arguments.input_dim is not None and not arguments.offline:
        raise InputError("--input-dim is for --offline; an audio bundle takes its shapes from the backbone")
    if arguments.clip_seconds is not None and arguments.offline:
        raise InputError("--clip-seconds is for audio; with --offline clients bring embeddings")
    for option in ("dynamic_length", "padding_mask", "verify_audio"):
        if getattr(arguments, option) and arguments.offline:
            raise InputError(f"--{option.replace('_', '-')} is for audio; with --offline clients bring embeddings")
    for option in ("profile", "explain", "without"):
        if getattr(arguments, option) and arguments.offline:
            raise InputError(f"--{option} is for passes, of which a head alone has none; leave out --offline")
    if arguments.half and arguments.offline:
        raise InputError("--half is for backbones, which --offline leaves out; give one of them")
    if arguments.calibration is not None and arguments.quantize is None:
        raise InputError("--calibration is for --quantize int8; without it nothing is calibrated")
    return Request(
        recipes=recipes,
        model=arguments.model,
        weights=arguments.weights,
        labels=arguments.labels,
        clip_seconds=arguments.clip_seconds,
        dynamic_length=arguments.dynamic_length,
        padding_mask=arguments.padding_mask,
        offline=arguments.offline,
        input_dim=arguments.input_dim,
        allow_untrained=arguments.allow_untrained,
        half=arguments.half,
        int8=arguments.quantize == "int8",
        calibration=arguments.calibration,
        headless=arguments.embeddings,
        name=arguments.name,
        version=arguments.bundle_version,
    )


def _recipes(arguments: argparse.Namespace) -> "tuple[Recipe, ...]":
    from avex_export.recipes import find_recipe

    recipes = []
    for probe in arguments.probe or [_USUAL_PROBE]:
        try:
            recipes.append(find_recipe(probe))
        except (ValueError, FileNotFoundError) as error:
            raise InputError(f"--probe {probe}: {error}") from error
        if not re.fullmatch(NAME_PATTERN, name := recipes[-1].name):
            raise InputError(
                f"--probe {probe}: {name!r} can't be a name in URLs; rename it to letters, digits, '.', '_' and '-'"
            )
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--probe: two are called {twice[0]}; rename the folder or the file of one")
    return tuple(recipes)


def _export(arguments: argparse.Namespace) -> None:
    from avex_export.assemble import bundle_name
    from avex_export.export import USUAL_FORMATS, export_bundle

    request = _request(arguments)
    output = arguments.output or _BUNDLES / bundle_name(request)
    formats = tuple(dict.fromkeys(arguments.format or USUAL_FORMATS))
    if arguments.half and "torchscript" not in formats:
        raise InputError(f"--half is for TorchScript, which --format {' '.join(formats)} leaves out; add it")
    if arguments.dynamic_length and "pt2" in formats:
        raise InputError(
            "--dynamic-length is for ONNX and TorchScript: a PT2 program is bound to lengths; leave it out"
        )
    manifest = export_bundle(
        request,
        output,
        formats,
        arguments.activation or "sigmoid",
        arguments.verify_audio,
        _say,
        without=_without(arguments),
        profiled=arguments.profile,
    )
    if not manifest.trained:
        print("avex-export: the head has random weights: its answers mean nothing", file=sys.stderr)
    if formats == ("pt2",):
        _say("PT2 is to be compiled and is not served; a bundle to serve needs --format onnx or torchscript")
    else:
        _say(f"serve it: AVEX_BUNDLE={output} bentoml serve avex_serve.service:AvexService")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _LONGEST_CLIP:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of a clip; expected seconds up to {_LONGEST_CLIP}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected D or T,D")
    return shape
