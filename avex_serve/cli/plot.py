"""``avex-serve plot``: the spectrogram of a recording with its detections."""

import argparse
import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avex_serve.errors import InputError, NotFoundError, quoted

if TYPE_CHECKING:
    from avex_serve.seeing.pictures import Mark

KINDS = (".png", ".svg")


def add_parser(commands: Any) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("plot", help="draw the spectrogram of a recording with its detections")
    parser.set_defaults(run=run)
    parser.add_argument("recording", metavar="FILE")
    parser.add_argument("--output", type=Path, help="NAME.png or NAME.svg (default: FILE's name with .png, here)")
    parser.add_argument("--start", type=float, default=0.0, help="of the part to draw, in seconds")
    parser.add_argument("--end", type=float, default=math.inf, help="of the part to draw, in seconds")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", help="run this bundle, a folder or a URL, on the recording")
    source.add_argument(
        "--detections",
        type=Path,
        metavar="DIR|TABLE",
        help="made by avex-serve run, or a table (Raven, Audacity, CSV)",
    )
    parser.add_argument(
        "--threshold", type=float, help="lowest score to draw (default: the bundle's, else 0.5; of tables: all)"
    )
    parser.add_argument("--label", action="append", metavar="LABEL", help="draw this label only; several times")
    parser.add_argument("--overlap", type=float, default=0.0, help="of neighbouring windows of --bundle, in seconds")
    parser.add_argument("--probe", help="which head of --bundle to run")


def run(arguments: argparse.Namespace) -> int:
    """Draw it, and print where the picture is."""
    from avex_serve.seeing import clips, pictures
    from avex_serve.writing import new_file

    pictures.check_installed()
    path, start, end = arguments.recording, arguments.start, arguments.end
    target = arguments.output or Path(f"{Path(path).stem}.png")
    kind = target.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{target} is neither .png nor .svg; name a file that ends in one of these")
    if not 0 <= start < end:
        raise InputError(f"from {start} to {end} s; expected a start of 0 or more, then the end")
    with clips.open_span(path, start, end) as stream:
        spectrogram = pictures.make_spectrogram(stream.blocks, stream.sample_rate, start, stream.frames)
    first, last = spectrogram.span
    if first == last:
        raise InputError(f"{quoted(path)} ends before {start} s; choose an earlier --start")
    marks = [
        mark._replace(start=max(mark.start, first), end=min(mark.end, last))
        for mark in _marks(arguments)
        if mark.end > first and mark.start < last and (arguments.label is None or mark.label in arguments.label)
    ]
    picture = pictures.draw_recording(spectrogram, marks, Path(path).name, kind[1:])
    with new_file(target) as file:
        file.buffer.write(picture)
    print(target)
    return 0


def _marks(arguments: argparse.Namespace) -> "list[Mark]":
    """The detections of the recording, from where the options say."""
    from avex_serve.archive.store import DESCRIPTION

    if arguments.bundle is not None:
        return _predict(arguments)
    if arguments.detections is None:
        return []
    if (arguments.detections / DESCRIPTION).exists():
        return _from_store(arguments)
    return _from_table(arguments)


def _predict(arguments: argparse.Namespace) -> "list[Mark]":
    from avex_serve.audio.reader import open_audio
    from avex_serve.inference import pipeline
    from avex_serve.inference.backend import open_bundle
    from avex_serve.seeing.pictures import Mark

    query = pipeline.Query(threshold=arguments.threshold, overlap=arguments.overlap, probe=arguments.probe)
    with open_bundle(arguments.bundle) as engine:
        prediction = pipeline.predict(engine, partial(open_audio, arguments.recording), query)
    return [Mark(each.start, each.end, each.label, each.score) for each in prediction.detections]


def _from_store(arguments: argparse.Namespace) -> "list[Mark]":
    from avex_serve.archive.store import Store
    from avex_serve.archive.tables import Choice, make_table
    from avex_serve.seeing.pictures import Mark

    path = os.path.abspath(arguments.recording)  # noqa: PTH100 - as `run` writes it
    choice = Choice(threshold=arguments.threshold, labels=arguments.label)
    table = make_table(Store(arguments.detections), choice, {path})
    if not table.recordings:
        raise NotFoundError(f"{arguments.detections} has no results of {quoted(path)}; add it by avex-serve run")
    return [Mark(each.start, each.end, each.label, each.score) for _, rows in table.rows for each in rows]


def _from_table(arguments: argparse.Namespace) -> "list[Mark]":
    from avex_serve.annotations.reading import read_annotations
    from avex_serve.seeing.pictures import Mark

    path = Path(arguments.recording).absolute()
    marks = []
    for each in read_annotations(arguments.detections):
        if each.file is not None and path != Path(each.file).absolute() and path.name != each.file:
            continue
        score = _score(each.fields)
        if arguments.threshold is None or score is None or score >= arguments.threshold:
            marks.append(Mark(each.start, each.end, each.label, score))
    return marks


def _score(fields: Any) -> float | None:
    """The score in a row of a table; None: it has none."""
    for name in ("score", "confidence", "probability"):
        try:
            return float(fields[name])
        except (KeyError, ValueError):
            continue
    return None
