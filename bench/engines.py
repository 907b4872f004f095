"""Graphs of bundles in other engines than the one that serves them, on this machine.

    python bench/engines.py --openvino .bench/openvino/bin/python [--write docs/engines.md] [--only beats]

Every engine takes turns with onnxruntime in float32, one thread each. The figure is the median of the ratios of
neighbours, with the smallest and the largest of them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from run import BACKBONES, HERE, INT8, Worker, cpu, export, multiplication_rate, ours, race

COUNTS = (1, 8)
# Extensions of a processor without which it is slower in bfloat16 than in float32, as /proc/cpuinfo names them.
BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def main() -> None:
    """Make the models if they aren't there, export them, measure, print, and write the page."""
    arguments = parse_arguments()
    home: Path = arguments.folder
    subprocess.run([sys.executable, str(HERE / "models.py"), str(home)], check=True)
    columns = {}
    for name in arguments.only or BACKBONES:
        options = ["--quantize", "int8"] if name in INT8 else []
        export(home / name / "last", home / name / "bundle_last", options)
        columns[name] = compare(name, home, arguments.openvino, arguments.rounds)
        print(json.dumps({name: columns[name]}, ensure_ascii=False), flush=True)
    page = render(columns, arguments.openvino, arguments.rounds)
    print(page)
    if arguments.write is not None:
        arguments.write.write_text(page, "utf-8")


def compare(name: str, home: Path, openvino: Path, rounds: int) -> dict[str, str]:
    """How many times as fast as onnxruntime in float32 the others answer, as rows of the table."""
    clips, bundle = home / "clips.npy", home / name / "bundle_last"
    rows: dict[str, str] = {}
    served = Worker(ours(bundle), clips)
    for engine, command, environment in engines(name, bundle, openvino):
        other = Worker(command, clips, environment)
        for count in COUNTS:
            rows[f"{engine}, {count} clip{'s' if count > 1 else ''}"] = str(race(served, other, count, rounds))
        rows[f"{engine}, largest difference of a logit"] = difference(served, other, home / name)
        other.stop()
    served.stop()
    return rows


def engines(name: str, bundle: Path, openvino: Path) -> list[tuple[str, list[str], Mapping[str, str]]]:
    """What is compared: its name, the command of its worker, and variables of its environment."""
    found: list[tuple[str, list[str], Mapping[str, str]]] = []

    def add(engine: str, graph: str, precision: str, **environment: str) -> None:
        command = [str(openvino), str(HERE / "worker_openvino.py"), str(bundle / graph), precision]
        found.append((f"OpenVINO, {engine}", command, environment))

    extensions = processor_extensions()
    add("float32", "model.onnx", "f32")
    if "avx512f" in extensions:
        add("float32, with AVX2 at most", "model.onnx", "f32", ONEDNN_MAX_CPU_ISA="AVX2")
    if BFLOAT16 & extensions:
        add("bfloat16", "model.onnx", "bf16")
    if name in INT8:
        found.append(("onnxruntime, int8", ours(bundle, "int8"), {}))
        add("int8", "model_int8.onnx", "f32")
    return found


def difference(served: Worker, other: Worker, folder: Path) -> str:
    """The largest difference of a logit of all clips."""
    import numpy as np

    files = [folder / "served.npy", folder / "other.npy"]
    for worker, file in zip((served, other), files, strict=True):
        worker.answer(max(COUNTS), file)
    expected, found = map(np.load, files)
    return f"{np.abs(found - expected).max() / np.abs(expected).max():.1e} × largest"


def processor_extensions() -> set[str]:
    """Of the processor, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line.partition(":")[2] for line in lines if line.startswith("flags")).split())


def render(columns: Mapping[str, Mapping[str, str]], openvino: Path, rounds: int) -> str:
    """The page, Markdown."""
    measured = dict.fromkeys(row for column in columns.values() for row in column)
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            "| " + " | ".join([row, *(column.get(row, "") for column in columns.values())]) + " |"
            for row in measured
        ),
    ]
    extensions = sorted(processor_extensions() & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", *BFLOAT16})
    versions = ", ".join(f"{name} {version(name)}" for name in ("avex-serve", "onnxruntime"))
    return PAGE.format(
        table="\n".join(lines),
        cpu=cpu(),
        extensions=", ".join(extensions),
        rate=multiplication_rate(),
        cores=os.cpu_count(),
        load=", ".join(f"{value:.1f}" for value in os.getloadavg()),
        versions=f"{versions}, {version_of(openvino)}",
        rounds=rounds,
    )


def version_of(python: Path) -> str:
    """OpenVINO's."""
    code = "from importlib.metadata import version; print('OpenVINO', version('openvino'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


PAGE = """# Engines

Made by `make bench-engines`. Bundles are served by onnxruntime. Other engines answer from the same files here.
Figures say how many times as fast as onnxruntime in float32 they are: below 1 is slower. 10 s clips, full-size
backbones with random weights, one thread on each side, taking turns; medians of the ratios of neighbouring runs, and
in brackets the smallest and the largest of them.

{table}

- Rounds: {rounds}.
- Machine: {cpu} with {extensions}, {cores} cores; load averages at the end: {load}. A float32 product of BEATs' size
  reaches {rate:.0f} GFLOP/s in onnxruntime.
- Versions: {versions}.
- *8 clips*: OpenVINO answers them as one batch, the service clip by clip.
- *With AVX2 at most*: what the processor has beyond AVX2 is hidden from OpenVINO. onnxruntime can't be told so, and
  uses all of it.
- bfloat16 is measured where the processor computes in it.
"""


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure other engines on the graphs of bundles.")
    parser.add_argument("--openvino", type=Path, required=True, help="a Python that has it (`make bench-engines`)")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for models and bundles")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=BACKBONES, help="backbones")
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
