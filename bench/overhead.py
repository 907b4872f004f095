"""What the service costs beside the engine: audio requests over HTTP and gRPC against calls in one process.

    python bench/overhead.py [--write docs/overhead.md] [--rounds 15] [--only beats]

The server as it starts by default, and the engine of the same bundle in a process of its own, called by as many
threads as the server has slots, take turns at answering the same WAV files of 10 s. A ratio is the engine's time
over the service's in one round; the figure is the median over the rounds, beside the smallest and the largest.
"""

import argparse
import io
import os
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
from run import HERE, INT8, Ratio, Worker, cpu, export

from avex_serve.demo.run import running_server
from avex_serve.scheduling.cores import usable_cores

TICKS = os.sysconf("SC_CLK_TCK")
TRANSPORTS = ("http", "grpc")
LIMITS = {"efficientnet": {"http": 0.85, "grpc": 0.90}, "beats": {"http": 0.97, "grpc": 0.97}}
# Of a round: a few seconds of work, and a multiple of any usual number of cores, so that they end together.
REQUESTS = {("efficientnet", "float32"): 192, ("beats", "float32"): 24, ("beats", "int8"): 48}
CONNECTIONS = 2  # for each slot of the server: one is answered while the next one comes in


@dataclass
class Turn:
    """What one side took for its requests, in seconds."""

    wall: float
    server: float  # of CPU: of the service's processes, or of the engine's
    client: float  # of CPU; 0 for the engine

    @property
    def left(self) -> float:
        """Core-seconds that the client left over."""
        return usable_cores() * self.wall - self.client


@dataclass
class Figures:
    """What the rounds of one transport showed, against the engine."""

    left: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)  # share of the cores

    def add(self, engine: Turn, service: Turn) -> None:
        """Count a round."""
        self.left.append(engine.left / service.left)
        self.wall.append(engine.wall / service.wall)
        self.server.append(engine.server / service.server)
        self.client.append(service.client / (usable_cores() * service.wall))

    def row(self, name: str, limit: float) -> str:
        """As a row of the table."""
        cells = [name, *(str(Ratio(values)) for values in (self.left, self.server, self.wall))]
        return "| " + " | ".join([*cells, f"{100 * np.median(self.client):.1f} %", f"{limit:.2f}"]) + " |"


class Side:
    """A worker, and the processes that do what it asks for."""

    def __init__(self, worker: Worker, server: int | None = None) -> None:
        self.worker = worker
        self._server = server  # None: the worker is the one that answers

    def take_turn(self, count: int) -> Turn:
        """Answer so many requests."""
        client, server = self._cpu()
        wall = self.worker.answer(count)
        client_after, server_after = self._cpu()
        return Turn(wall, server_after - server, client_after - client)

    def _cpu(self) -> tuple[float, float]:
        if self._server is None:
            return 0.0, cpu_seconds(self.worker.pid)
        return cpu_seconds(self.worker.pid), sum(cpu_seconds(pid) for pid in family(self._server))


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that a process has used, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def family(pid: int) -> list[int]:
    """A process and all that come from it: BentoML's supervisor and its worker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


def compare(bundle: Path, precision: str, recordings: Path, count: int, rounds: int) -> dict[str, Figures]:
    """Let engine, HTTP and gRPC take turns."""
    slots = usable_cores()  # as many as the service has by default
    script = [sys.executable, str(HERE / "worker_engine.py"), str(bundle), precision, str(slots)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_server(bundle, Path(scratch), AVEX_PRECISION=precision) as server,
    ):
        sides = {"engine": Side(Worker(script, recordings))}
        for transport, port in zip(TRANSPORTS, (server.http_port, server.grpc_port), strict=True):
            client = [sys.executable, str(HERE / "worker_client.py"), transport, str(port), str(CONNECTIONS * slots)]
            sides[transport] = Side(Worker(client, recordings), server.pid)
        figures = {transport: Figures() for transport in TRANSPORTS}
        for number in range(rounds + 1):
            turns = {name: sides[name].take_turn(count) for name in in_turn(list(sides), number)}
            if number:  # the first round warms up
                for transport in TRANSPORTS:
                    figures[transport].add(turns["engine"], turns[transport])
        for side in sides.values():
            side.worker.stop()
    return figures


def in_turn(names: list[str], number: int) -> list[str]:
    """The names, a different one first each round."""
    first = number % len(names)
    return names[first:] + names[:first]


def write_recordings(clips: np.ndarray, count: int, path: Path) -> None:
    """Save so many encoded recordings, (count, bytes) uint8: 16-bit WAV at 16 kHz."""
    encoded = []
    for clip in clips:
        file = io.BytesIO()
        soundfile.write(file, clip, 16000, format="WAV", subtype="PCM_16")
        encoded.append(np.frombuffer(file.getvalue(), np.uint8))
    np.save(path, np.stack([encoded[i % len(encoded)] for i in range(count)]))


def main() -> None:
    """Make the models and bundles if they aren't there, measure, print, and write the page."""
    arguments = parse_arguments()
    sys.path.insert(0, str(HERE))
    import models

    home: Path = arguments.folder
    home.mkdir(parents=True, exist_ok=True)
    models.write_models(home)
    rows = []
    for (name, precision), count in REQUESTS.items():
        if arguments.only and name not in arguments.only:
            continue
        bundle, recordings = home / name / "bundle_last", home / "recordings.npy"
        export(home / name / "last", bundle, ["--quantize", "int8"] if name in INT8 else [])
        write_recordings(models.clips(), count, recordings)
        figures = compare(bundle, precision, recordings, count, arguments.rounds)
        for transport, measured in figures.items():
            rows.append(measured.row(f"{name} {precision}, {transport}", LIMITS[name][transport]))
            print(rows[-1], flush=True)
    page = render(rows, arguments.rounds)
    print(page)
    if arguments.write is not None:
        arguments.write.write_text(page, "utf-8")


def render(rows: list[str], rounds: int) -> str:
    """The page, Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("avex-serve", "bentoml", "grpcio", "onnxruntime"))
    return PAGE.format(
        table="\n".join(rows),
        connections=CONNECTIONS * usable_cores(),
        callers=usable_cores(),
        rounds=rounds,
        cpu=cpu(),
        cores=usable_cores(),
        load=", ".join(f"{value:.1f}" for value in os.getloadavg()),
        versions=versions,
    )


PAGE = """# What the service costs beside the engine

Made by `make bench-overhead`. WAV files of 10 s (16 bit, 16 kHz) go to a server with its default settings over HTTP
(`POST /predict`) and gRPC (`ModelInfer`, BYTES), and to the engine of the same bundle in a process of its own:
`engine.predict(*decode(wav))` by {callers} threads. The three take turns in rounds of a few seconds. A ratio is the
throughput of the service over the engine's in the same round; the figure is the median of {rounds} rounds, in
brackets the smallest and the largest. Backbones are full-size with random weights.

| | throughput, the client's CPU set aside | CPU time | throughput as it is | the client's cores | at least |
|---|---|---|---|---|---|
{table}

- The client runs beside the server, on the same {cores} cores, in a process of its own with {connections}
  connections that stay open, and does little more than to send bytes and to wait; *the client's cores* is its share
  of them. *Throughput as it is* is what the
  clock says: there the client takes a part of the cores that the engine has for itself.
- *The client's CPU set aside* is the measure that counts: requests for each core-second that the client left over,
  cores × time − the client's CPU time. Work of the service counts against it, and so does every moment in which a
  core waits for it.
- *CPU time* is that of the engine's process over that of all of the server's, supervisor and worker
  (`/proc/PID/stat`). It says nothing of waiting, and suffers least from what else the machine does.
- Machine: {cpu}, {cores} cores; load averages at the end: {load}.
- Versions: {versions}.
"""


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure what the service costs beside the engine.")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for models and bundles")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), help="backbones")
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
