"""``avex-serve predict``: answers from a bundle, without a server."""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from avex_serve.cli.output import add_device, add_shown, fail, note, parse_channel, read_labels, read_threshold
from avex_serve.errors import AudioError, AvexServeError, NotFoundError, naming, quoted

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine
    from avex_serve.inference.pipeline import Query
    from avex_serve.inference.results import Prediction
    from avex_serve.inference.scores import ScoreScale

# Labels by which heads say that nothing is heard. The table counts them as no detections.
NOTHING: Final = frozenset({"background", "noise", "silence"})


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("predict", help="name the sounds in recordings, without a server")
    parser.set_defaults(run=run)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    parser.add_argument(
        "recordings",
        nargs="+",
        metavar="RECORDING",
        help="files (WAV, FLAC, OGG or MP3), folders, patterns ('**/*.wav'), @list.txt, or - for standard input",
    )
    parser.add_argument(
        "--threshold",
        metavar="SCORE|FILE",
        help="lowest score to report, or a CSV file of label,threshold (default: those of the bundle, else 0.5)",
    )
    parser.add_argument("--top-k", type=int, help="report at most this number of labels for each window")
    add_shown(parser)
    add_reading(parser)
    parser.add_argument("--probe", help="which head of the bundle to run")
    parser.add_argument(
        "--hide", action="append", default=[], metavar="LABEL", help="don't report this label; repeat it for several"
    )
    parser.add_argument(
        "--show",
        action="append",
        default=[],
        metavar="LABEL",
        help="report this label in the table, although its name is background, noise or silence",
    )
    add_device(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="a line of JSON for each recording: the service's answer, or an error, with the file",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a recording is cut into windows, and which part of it is run."""
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--overlap", type=float, default=0.0, help="of neighbouring windows, in seconds")
    cut.add_argument("--hop", type=float, help="from the start of a window to the start of the next, in seconds")
    parser.add_argument(
        "--final-clip",
        choices=("none", "extend", "remainder", "full"),
        default="remainder",
        help="an end shorter than a window: left out, padded, as it is (default), or a window moved back",
    )
    parser.add_argument("--channel", type=parse_channel, default="mix", help="N, from 1, or mix: the mean of all")


def read_cut(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading`, as fields of a query."""
    return {name: getattr(arguments, name) for name in ("overlap", "hop", "final_clip", "channel")}


def run(arguments: argparse.Namespace) -> int:
    """Print an answer for each recording; continue after one that can't be read."""
    from avex_serve.archive.files import find_recordings
    from avex_serve.inference.backend import open_bundle
    from avex_serve.inference.pipeline import Query, select

    query = Query(
        threshold=read_threshold(arguments.threshold),
        top_k=arguments.top_k,
        label=read_labels(arguments.label),
        merge=arguments.merge,
        merge_score=arguments.merge_score,
        probe=arguments.probe,
        **read_cut(arguments),
    )
    found = find_recordings(arguments.recordings)
    code = 0
    with open_bundle(
        arguments.bundle, arguments.device, precision=arguments.precision, runtime=arguments.runtime
    ) as engine:
        _check(engine, query)
        head = engine.probe(query.probe)
        labels = engine.labels(head.name)
        hidden, shown = _known(arguments.hide, labels), _known(arguments.show, labels)
        if not arguments.json:
            hidden |= {label for label in labels if label.casefold() in NOTHING} - shown
        if not engine.manifest.trained:
            note("the head has random weights: its answers mean nothing")
        if (left_out := found.note()) is not None:
            note(left_out)
        about_all = {*engine.warnings, *select(engine, head, query.threshold, query.top_k).warnings}
        for warning in sorted(about_all):
            note(warning)
        calibrated = engine.calibrator(head.name) is not None
        headed = arguments.json
        for path, fault in found.recordings.items():
            try:
                if fault is not None:
                    raise fault
                prediction = _predict(engine, path, query)
            except AvexServeError as error:
                code = fail(error)
                if arguments.json:
                    print(json.dumps({"file": path, "error": str(error)}), flush=True)
                continue
            for warning in prediction.warnings:
                if warning not in about_all:
                    note(f"{_name(path)}: {warning}")
            kept = [each for each in prediction.detections if each.label not in hidden]
            count = len(prediction.detections) - len(kept)
            prediction.detections = kept
            if not headed:
                print(_columns(prediction.score_scale, calibrated))
                headed = True
            text = _json(path, prediction) if arguments.json else _table(path, prediction, count, calibrated)
            print(text, flush=True)
    return code


def _check(engine: "Engine", query: "Query") -> None:
    """Raise the error of an option, or of a bundle that takes no audio: the pipeline opens the recording last."""
    from avex_serve.inference import pipeline

    class Opened(Exception): ...

    def audio(channel: object) -> NoReturn:
        raise Opened

    with suppress(Opened):
        pipeline.predict(engine, audio, query)


def _known(names: Sequence[str], labels: Collection[str]) -> set[str]:
    """These labels; NotFoundError for one that the head doesn't have."""
    for name in names:
        if name not in labels:
            nearest = get_close_matches(name, labels, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(sorted(labels)[:20])} …"
            raise NotFoundError(f"the head has no label {name!r}; {hint}")
    return set(names)


def _predict(engine: "Engine", path: str, query: "Query") -> "Prediction":
    from avex_serve.archive.files import STDIN
    from avex_serve.audio.reader import open_audio
    from avex_serve.inference import pipeline

    if path == STDIN and sys.stdin.isatty():
        raise AudioError("standard input is a terminal; send a recording through a pipe, or name a file")
    with naming(_name(path)):
        return pipeline.predict(engine, partial(open_audio, sys.stdin.buffer if path == STDIN else path), query)


def _name(path: str) -> str:
    """What messages and the table call a recording."""
    from avex_serve.archive.files import STDIN

    return "standard input" if path == STDIN else quoted(path)


def _json(path: str, prediction: "Prediction") -> str:
    import msgspec

    from avex_serve.inference.results import known

    return json.dumps({"file": path, **msgspec.to_builtins(known(prediction))})


def _columns(scale: "ScoreScale", calibrated: bool) -> str:
    """What the numbers of the tables are."""
    score = "raw logit" if scale == "logits" else f"{scale} score"
    probability = " calibrated probability," if calibrated else ""
    return f"start (s), end (s), {score},{probability} label"


def _table(path: str, prediction: "Prediction", hidden: int, calibrated: bool) -> str:
    others = f", and {hidden} of hidden labels" if hidden else ""
    lines = [f"{_name(path)}: {prediction.duration:.1f} s, {len(prediction.detections)} detections{others}"]
    for each in prediction.detections:
        known = "     –" if each.probability is None else f"{each.probability:5.0%} "
        probability = f"{known} " if calibrated else ""
        lines.append(f"  {each.start:8.2f} {each.end:8.2f}  {each.score:6.3f}  {probability}{each.label}")
    return "\n".join(lines)
