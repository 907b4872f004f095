"""How long training takes, and how much memory; the page that ``--write`` makes says what is measured.

    python bench/fit.py [speed] [large] [--write docs/training-performance.md]

speed   1,000 embedded windows of 20 classes: search, cross-validation and report, with each head
large   the linear head with 10,000 and 100,000 clips whose embeddings are stored: peak memory, and time a clip

Without a name, all are run. Each measurement is a process of its own. Embeddings are drawn from a mixture: each
label has a direction, each recording a background of its own. Two cores, unless `--cores` says otherwise.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES, WIDTH, STEPS = 20, 768, 24  # labels, and an embedding: (768,) of a mean, (24, 768) of a sequence
LAYERS = 13  # that `linear_all` merges
HEADS = ("linear_last", "linear_all", "mlp_last", "attention_last", "lstm_last", "transformer_last")
WINDOWS = {"speed": (1000,), "large": (10_000, 100_000)}


def make_targets(count, each):
    """Targets (N, C) and recordings (N,): windows of a recording have one label, or none."""
    member = np.arange(count) // each
    label = member % (CLASSES + 1)
    return (label[:, None] == np.arange(CLASSES)).astype(np.int8), member


def make_rows(targets, member, shape, block):
    """Embeddings (N, ...) float32 of some windows: directions of their labels, and backgrounds of recordings."""
    directions = np.random.default_rng(0).standard_normal((CLASSES, shape[-1]), dtype=np.float32)
    rng = np.random.default_rng([1, block])
    _, own = np.unique(member, return_inverse=True)
    background = rng.standard_normal((own.max() + 1, shape[-1]), dtype=np.float32)[own]
    signal = 0.35 * (targets.astype(np.float32) @ directions) + background
    steps = signal.reshape(-1, *(1,) * (len(shape) - 1), shape[-1])
    return rng.standard_normal((len(signal), *shape), dtype=np.float32) + steps


def make_windows(folder, count, shape, inputs, each=5):
    """Embedded windows of recordings, on disk."""
    from avex_serve.training import Recording, Windows

    targets, member = make_targets(count, each)
    outputs = []
    for i in range(inputs):
        array = np.lib.format.open_memmap(folder / f"{i}.npy", mode="w+", dtype=np.float32, shape=(count, *shape))
        for start in range(0, count, 1000):
            rows = slice(start, start + 1000)
            array[rows] = make_rows(targets[rows], member[rows], shape, start)
        outputs.append(array)
    names = [f"{i:06}.wav" for i in range(member[-1] + 1)]
    recordings = tuple(
        Recording(Path(name), name, digest=f"{name:0>64}", seconds=50.0, group=name) for name in names
    )
    starts = np.arange(count) % each * 10.0
    return Windows(outputs, targets, np.stack([starts, starts + 10], axis=1), member, recordings)


def read_windows(folder, count):
    """The same from a file for each recording of 10 s, as `fit` stores them; and the seconds that reading takes."""
    import math

    from avex_serve.annotations.reading import TableRow
    from avex_serve.inference.backend import open_bundle
    from avex_serve.service.settings import DEMO_BUNDLE
    from avex_serve.training import Dataset, Recording, embed

    targets, member = make_targets(count, 1)
    labels = tuple(f"label {i:02}" for i in range(CLASSES))
    recordings = []
    with open_bundle(DEMO_BUNDLE, "cpu") as engine:
        outputs = [engine.manifest.embeddings[0].output]
        store = folder / "store" / embed._key(engine, outputs, 0.0)
        for start in range(0, count, 1000):
            part = slice(start, start + 1000)
            rows = make_rows(targets[part], member[part], (WIDTH,), start)
            for i, row in enumerate(rows, start):
                label = labels[int(targets[i].argmax())] if targets[i].any() else "noise"
                name = f"{i:06}.wav"
                recording = Recording(
                    Path(name),
                    name,
                    (TableRow(None, 0.0, math.inf, label),),
                    digest=f"{i:064x}",
                    seconds=10.0,
                    group=name,
                )
                path = embed._file(store, recording)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, **{"spans": np.array([[0.0, 10.0]]), "0": row[None]})
                recordings.append(recording)
        dataset = Dataset(labels, tuple(recordings), frozenset(("noise",)), False, ())
        begun = time.perf_counter()
        windows, _ = embed.run_windows(engine, outputs, dataset, folder / "store", folder, say=lambda text: None)
        return windows, time.perf_counter() - begun


def measure(name, count, stored):
    """Fit a head and make its report; seconds and peak memory in MB of this process."""
    from avex_serve.training import fit_windows
    from avex_serve.training.files import write_report
    from avex_serve.training.fit import probe_config
    from avex_serve.training.report import report

    config = probe_config(name)
    inputs = LAYERS if config.target_layers == ["all"] else 1
    shape = (STEPS, WIDTH) if config.input_processing == "sequence" else (WIDTH,)
    labels = tuple(f"label {i:02}" for i in range(CLASSES))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        windows, read = read_windows(folder, count) if stored else (make_windows(folder, count, shape, inputs), 0.0)
        start = time.perf_counter()
        fitted = fit_windows(config, labels, windows, 0, say=lambda text: None)
        trained = time.perf_counter()
        evaluation = report(
            fitted.windows,
            labels,
            fitted.predictions,
            model="synthetic",
            probe=name,
            chosen=fitted.head.chosen,
            evaluated=fitted.how,
            calibration=fitted.head.calibration,
            noise={},
            problems=[],
            seed=0,
        )
        write_report(folder, evaluation, fitted.windows, fitted.predictions, page=False)
        end = time.perf_counter()
    return {
        "read": read,
        "train": trained - start,
        "report": end - trained,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "average precision": evaluation.macro.average_precision.value,
    }


def in_process(cores, *arguments):
    """The result of this program with such arguments, in a process on these cores."""
    command = [sys.executable, __file__, "--cores", str(cores), "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def speed(cores, heads):
    """The table of all heads."""
    lines = ["| head | training | report | peak memory | mean average precision |", "|---|---|---|---|---|"]
    for name in heads:
        found = in_process(cores, name, WINDOWS["speed"][0], 0)
        lines.append(
            f"| `{name}` | {found['train']:.1f} s | {found['report']:.1f} s | {found['memory']:,.0f} MB | "
            f"{found['average precision']:.3f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def large(cores):
    """The table of the linear head on more and more windows."""
    lines = ["| clips | reading | training | report | time a clip | peak memory |", "|---|---|---|---|---|---|"]
    for count in WINDOWS["large"]:
        found = in_process(cores, "linear_last", count, 1)
        seconds = found["read"] + found["train"] + found["report"]
        lines.append(
            f"| {count:,} | {found['read']:.0f} s | {found['train']:.0f} s | {found['report']:.0f} s | "
            f"{1000 * seconds / count:.2f} ms | "
            f"{found['memory']:,.0f} MB |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


PAGE = """# How long training takes

`python bench/fit.py --write docs/training-performance.md` made this page, on {cores} cores of {cpu},
Python {python}.

## 1,000 windows, 20 classes

Settings chosen in four folds, evaluation, calibration, intervals and report, from stored embeddings: {width} values
a window for heads on a mean, {steps} × {width} for heads on a sequence, {layers} layers for `linear_all`.

{speed}

## 100,000 clips of 10 s

The linear head on stored embeddings of {width} values, a file for each clip. Memory is of the whole process, with
torch.

{large}
"""


def main():
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help="speed, large (default: both)")
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page to write")
    parser.add_argument("--one", nargs=3, metavar=("HEAD", "WINDOWS", "STORED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.one[2] == "1")))
        return
    what = arguments.what or ["speed", "large"]
    found = {
        "speed": speed(arguments.cores, arguments.heads) if "speed" in what else "",
        "large": large(arguments.cores) if "large" in what else "",
    }
    if arguments.write:
        facts = {"cores": arguments.cores, "cpu": cpu(), "python": platform.python_version()}
        arguments.write.write_text(PAGE.format(**facts, **found, width=WIDTH, steps=STEPS, layers=LAYERS), "utf-8")


def cpu():
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
