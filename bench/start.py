"""What a server's start takes with its first answer checked and without, and the memory of several workers.

    python bench/start.py [--rounds 9] [--only beats] [--workers 4]

Servers with `AVEX_CHECK=on` and `off` start in turns, files in memory. A figure is the time from the command to the
moment at which it is ready, on the clock and of CPU; the latter suffers less from what else the machine does. Memory
is the proportional set size (PSS) of the workers once each has answered: a page that several processes share counts
for each of them in part.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from overhead import cpu_seconds, family
from run import HERE, INT8, Ratio, cpu, export

from avex_serve.demo.run import running_server

MODELS = (("efficientnet", "float32"), ("beats", "float32"), ("beats", "int8"))
POLL_SECONDS = 0.005


def start_seconds(bundle: Path, precision: str, check: str) -> tuple[float, float]:
    """From the command to readiness: on the clock, and of CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        variables = {"AVEX_PRECISION": precision, "AVEX_CHECK": check}
        began = time.perf_counter()
        with running_server(bundle, Path(scratch), poll_seconds=POLL_SECONDS, **variables) as server:
            return time.perf_counter() - began, sum(cpu_seconds(pid) for pid in family(server.pid))


def compare_starts(bundle: Path, precision: str, rounds: int) -> list[str]:
    """Time with the check over time without, taking turns, and the median of each: on the clock, and of CPU."""
    turns = [[start_seconds(bundle, precision, check) for check in ("on", "off")] for _ in range(rounds + 1)]
    texts = []
    for kind in (0, 1):
        times = [(on[kind], off[kind]) for on, off in turns[1:]]  # the first round warms up
        on, off = (statistics.median(each) for each in zip(*times, strict=True))
        texts.append(f"{Ratio([on / off for on, off in times])}, {on:.2f} s / {off:.2f} s")
    return texts


def memory(bundle: Path, precision: str, workers: int) -> float:
    """PSS of all workers together, in MB, once each has answered."""
    with tempfile.TemporaryDirectory() as scratch:
        variables = {"AVEX_PRECISION": precision, "AVEX_WORKERS": str(workers), "AVEX_THREADS": "1"}
        with running_server(bundle, Path(scratch), **variables) as server:
            while server.log.read_text().count("gRPC listens on") < workers:
                time.sleep(0.1)
            return sum(proportional_memory(pid) for pid in family(server.pid)[1:])


def proportional_memory(pid: int) -> float:
    """PSS of a process in MB."""
    return int(re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1]) / 1024


def main() -> None:
    """Make the models and bundles if they aren't there, measure and print."""
    arguments = parse_arguments()
    home: Path = arguments.folder
    subprocess.run([sys.executable, str(HERE / "models.py"), str(home)], check=True)
    print(f"{cpu()}, {arguments.rounds} rounds")
    for name, precision in MODELS:
        if arguments.only and name not in arguments.only:
            continue
        bundle = home / name / "bundle_last"
        if not bundle.is_dir():
            export(home / name / "last", bundle, ["--quantize", "int8"] if name in INT8 else [])
        clock, processor = compare_starts(bundle, precision, arguments.rounds)
        one, several = (memory(bundle, precision, count) for count in (1, arguments.workers))
        print(
            f"{name} {precision}: start checked / not {clock}; of CPU {processor}; "
            f"1 worker {one:.0f} MB, {arguments.workers} workers {several:.0f} MB: {several / one:.2f} ×",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure starts, and the memory of workers.")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for models and bundles")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="backbones")
    return parser.parse_args()


if __name__ == "__main__":
    main()
