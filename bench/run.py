"""Speed and memory against avex on this machine, side by side in one run; see docs/performance.md.

    python bench/run.py --avex .bench/avex/bin/python [--write docs/performance.md] [--rounds 9] [--only beats]

Every comparison starts both workers, one thread each, and lets them take turns; the figure is the median of the
ratios of neighbours, and what is printed beside it is the smallest and largest of them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Installed packages are there in bytecode; a checkout's is written when it is first used, unless this forbids it.
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)


class Worker:
    """A process that answers clips; see `worker.serve`."""

    def __init__(self, command: Sequence[str], clips: Path, environment: Mapping[str, str] | None = None) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**ENVIRONMENT, **(environment or {})},
        )
        self._say(str(clips))
        ready = self._hear().split()
        self.cold = time.perf_counter() - started  # seconds from nothing to the first answer
        self.memory = float(ready[1])  # MB, peak

    def answer(self, count: int, path: Path | None = None) -> float:
        """Seconds to answer so many clips."""
        self._say(str(count) if path is None else f"{count} {path}")
        return float(self._hear())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def stop(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _say(self, line: str) -> None:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{' '.join(self._process.args)} ended")
        return line


@dataclass
class Ratio:
    """How often one thing fits into the other."""

    values: list[float]

    def __str__(self) -> str:
        return f"{statistics.median(self.values):.2f} ({min(self.values):.2f}–{max(self.values):.2f})"


def race(slow: Worker, fast: Worker, count: int, rounds: int) -> Ratio:
    """Time of one over time of the other, taking turns."""
    for worker in (slow, fast):
        worker.answer(count)
    return Ratio([slow.answer(count) / fast.answer(count) for _ in range(rounds)])


def starts(
    slow: Sequence[str], fast: Sequence[Sequence[str]], clips: Path, forgotten: Sequence[Path] = (), count: int = 7
) -> list[str]:
    """Time of one from nothing to its first answer over that of each of the others, taking turns; and the times.

    Files in the folders that are forgotten are read from the disk, as on a machine that starts its first worker.
    """
    turns = []
    for _ in range(count):
        turn = []
        for command in (slow, *fast):
            for folder in forgotten:
                forget(folder)
            worker = Worker(command, clips)
            worker.stop()
            turn.append(worker.cold)
        turns.append(turn)
    before, *after = zip(*turns, strict=True)
    return [
        f"{Ratio([a / b for a, b in zip(before, times, strict=True)])} "
        f"({statistics.median(before):.1f} s → {statistics.median(times):.2f} s)"
        for times in after
    ]


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of a folder's files in memory.

    It keeps those that a process has mapped: this one must not have imported numpy or onnxruntime yet.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def environments(pythons: Sequence[str]) -> list[Path]:
    """The folders that hold what Python loads: its own library, the packages of an environment."""
    asked = "import sys, sysconfig; print(sys.prefix, sysconfig.get_path('stdlib'), sep='\\n')"
    answers = [
        subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True) for python in pythons
    ]
    return [Path(line) for line in dict.fromkeys("".join(answer.stdout for answer in answers).splitlines())]


def multiplication_rate(rows: int = 496, inner: int = 768, columns: int = 3072) -> float:
    """Floating-point operations a second that onnxruntime reaches with one product of BEATs' size, in 1e9."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((inner, columns)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(1).standard_normal((rows, inner)).astype(np.float32)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        session.run(None, {"x": x})
        times.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / statistics.median(times) / 1e9


BACKBONES = ("beats", "efficientnet", "eat")
# Operations of one 10 s clip, counted from the shapes, in 1e9.
WORK = {"beats": 99.0, "eat": 97.5}
INT8 = ("beats", "eat")  # those that the exporter quantises


def compare_starts(home: Path, baseline: Sequence[str]) -> dict[str, str]:
    """What a first answer takes, as rows of the table."""
    clips, bundle = home.parent / "clips.npy", home / "bundle_last"
    least = [sys.executable, str(HERE / "worker_onnxruntime.py"), str(bundle)]
    commands = [ours(bundle), least]
    on_disk = [home, *environments([baseline[0], sys.executable])]
    rows: dict[str, str] = {}
    for kind, forgotten in (("cold start to first answer", on_disk), ("start to first answer, files in memory", ())):
        rows[kind], rows[f"{kind}: onnxruntime alone"] = starts(baseline, commands, clips, forgotten)
    return rows


def compare(name: str, home: Path, baseline: Sequence[str], rounds: int) -> dict[str, str]:
    """What is measured of one backbone's workers once they run, as rows of the table."""
    import numpy as np

    clips = home.parent / "clips.npy"
    rows: dict[str, str] = {}
    slow, fast = (Worker(command, clips) for command in (baseline, ours(home / "bundle_last")))
    for count in (1, 8):
        rows[f"{count} clip{'s' if count > 1 else ''}"] = str(race(slow, fast, count, rounds))
    files = [home / "slow.npy", home / "fast.npy"]
    for worker, file in zip((slow, fast), files, strict=True):
        worker.answer(8, file)
    expected, found = (np.load(file) for file in files)
    rows["largest difference of a logit"] = (
        f"{np.abs(found - expected).max() / np.abs(expected).max():.1e} × largest"
    )
    if name in WORK:
        seconds = statistics.median(fast.answer(1) for _ in range(rounds))
        rate = multiplication_rate()
        rows["of the rate of one product"] = f"{100 * WORK[name] / seconds / rate:.0f} % of {rate:.0f} GFLOP/s"
    every = Worker(ours(home / "bundle_all"), clips)
    rows["all layers over the last, time"] = str(race(every, fast, 1, 5 * rounds))
    rows["peak memory"] = f"{fast.memory:.0f} MB ({slow.memory:.0f} MB)"
    workers = [slow, fast, every]
    if name in INT8:
        small = Worker(ours(home / "bundle_last", "int8"), clips)
        workers.append(small)
        for count in (1, 8):
            rows[f"int8, {count} clip{'s' if count > 1 else ''}"] = str(race(slow, small, count, rounds))
        rows["int8, embedding against float32"] = agreement(home / "bundle_last" / "manifest.json")
        rows["int8, peak memory"] = f"{small.memory:.0f} MB"
    for worker in workers:
        worker.stop()
    return rows


def agreement(manifest: Path) -> str:
    """What the gates of the export found, on clips that int8 wasn't calibrated on."""
    found = json.loads(manifest.read_text())["quantisation"]["agreement"]
    return f"cosine {found['cosine']:.4f}, centred {found['centred_cosine']:.4f}"


def ours(bundle: Path, precision: str = "float32") -> list[str]:
    """The command of a worker that answers from a bundle."""
    return [sys.executable, str(HERE / "worker_serve.py"), str(bundle), precision]


def main() -> None:
    """Make the models if they aren't there, export them, measure, print, and write the page."""
    arguments = parse_arguments()
    home: Path = arguments.folder
    subprocess.run([sys.executable, str(HERE / "models.py"), str(home)], check=True)
    tables: dict[str, dict[str, str]] = {}
    baselines: dict[str, tuple[list[str], str]] = {}
    for name in arguments.only or BACKBONES:
        for probe in ("last", "all"):
            options = ["--quantize", "int8"] if name in INT8 and probe == "last" else []
            export(home / name / probe, home / name / f"bundle_{probe}", options)
        baselines[name] = find_baseline(name, home, arguments.avex)
        tables[name] = compare_starts(home / name, baselines[name][0])
        print(json.dumps({name: tables[name]}, ensure_ascii=False), flush=True)
    for name, (baseline, _) in baselines.items():
        tables[name] |= compare(name, home / name, baseline, arguments.rounds)
        print(json.dumps({name: tables[name]}, ensure_ascii=False), flush=True)
    page = render(tables, {name: what for name, (_, what) in baselines.items()}, arguments.avex, arguments.rounds)
    print(page)
    if arguments.write is not None:
        arguments.write.write_text(page, "utf-8")


def find_baseline(name: str, home: Path, avex: Path | None) -> tuple[list[str], str]:
    """The command of the worker to compare with, and what it is."""
    if avex is not None:
        command = [str(avex), str(HERE / "worker_avex.py"), str(home / name), "last"]
        try:
            Worker(command, home / "clips.npy").stop()
        except ChildProcessError:
            pass  # avex builds EAT from code on the hub, which may be out of reach
        else:
            return command, "avex"
    return [
        sys.executable,
        str(HERE / "worker_serve.py"),
        "--eager",
        str(home / name),
        "last",
    ], "the probe in eager mode"


def export(probe: Path, bundle: Path, options: Sequence[str]) -> None:
    """Export a probe, anew each time: what is measured is what the code makes now."""
    command = [sys.executable, "-m", "avex_export", "--probe", str(probe), "--format", "onnx"]
    subprocess.run([*command, *options, "--output", str(bundle)], check=True, stdout=subprocess.DEVNULL)


def render(
    tables: Mapping[str, Mapping[str, str]], baselines: Mapping[str, str], avex: Path | None, rounds: int
) -> str:
    """The page, Markdown."""
    measured = list(dict.fromkeys(row for table in tables.values() for row in table))
    head = [f"{name}, against {baselines[name]}" for name in tables]
    lines = [
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
        *("| " + " | ".join([row, *(table.get(row, "") for table in tables.values())]) + " |" for row in measured),
    ]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in ("avex-serve", "onnxruntime", "torch"))
    return PAGE.format(
        table="\n".join(lines),
        cpu=cpu(),
        cores=os.cpu_count(),
        load=load,
        versions=versions,
        avex=avex_version(avex),
        rounds=rounds,
    )


PAGE = """# Performance

Made by `make bench`. 10 s clips, full-size backbones with random weights, one thread on each side, float32 but
where it says int8. Ratios are avex's time over ours, the median of the ratios of neighbouring runs, and in
brackets the smallest and the largest of them; so above 1 is faster. Of memory avex's figure stands in brackets, of
starts the medians of both. Before a cold start the system drops what it keeps in memory of the files of Python, of
both environments and of the models, so that they come from the disk.

{table}

- Rounds: {rounds}; of all layers over the last five times as many, of starts seven.
- Machine: {cpu}, {cores} cores; load averages at the end: {load}.
- Versions: {versions}; compared with {avex}.
- *8 clips*: avex answers them as one batch, the service clip by clip, which is faster on a CPU.
- *Of the rate of one product*: operations of a clip over time, as a share of the rate that onnxruntime reaches
  with a single matrix product of the same size in the same run.
- *onnxruntime alone*: a program that imports onnxruntime and numpy, opens the same graph and asks it once.
- avex builds EAT from code on the Hugging Face hub. Where that can't be had, EAT is compared with its own eager
  probe.
"""


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def avex_version(python: Path | None) -> str:
    """What avex is compared with."""
    if python is None:
        return "no avex"
    code = "from importlib.metadata import version as v; print('avex', v('avex') + ', torch', v('torch'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure speed and memory against avex.")
    parser.add_argument("--avex", type=Path, help="a Python that has avex (made by `make bench`)")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for models and bundles")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="backbones")
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
