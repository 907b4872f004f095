"""Ten times as many requests as a server can answer, over HTTP and gRPC together.

    python -m tests.soak.overload --seconds 60

prints what came of it; `test_overload.py` holds a shorter run to the same.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from avex_serve import open_bundle
from tests.bundles import make_slow_bundle
from tests.clients import REFUSED, RIGHT, Question, Worker, load
from tests.service.conftest import encode, running_server

FACTOR = 10
BUSY_CLIENTS = 4  # keep two cores busy without filling the queue
CLIENTS = 96  # more than slots and queue hold, so that some are always there to be refused
CAPACITY_SECONDS = 5
LOOK_SECONDS = 0.1
RECORDING = encode(1.0, 44100, 2, "WAV")  # ten windows, 176 kB


@dataclass
class Result:
    """What came of an overload."""

    seconds: float
    capacity: float  # requests a second, each of which was answered
    offered: float  # requests a second
    outcomes: dict[str, int]
    answered_in_ms: float  # median
    refused_in_ms: float  # median
    refused_in_ms_95: float
    idle_memory: int  # bytes of the worker after the warm-up
    peak_memory: int
    memory_after: int

    @property
    def unexpected(self):
        """Outcomes that no client should see."""
        return {text: count for text, count in self.outcomes.items() if text not in (RIGHT, REFUSED)}


def overload(folder, bundle, seconds):
    """Overload a server of the bundle for so long."""
    with open_bundle(bundle) as engine:
        question = Question(RECORDING, engine)
    with running_server(folder, AVEX_BUNDLE=str(bundle)) as server:
        with load(server, question, BUSY_CLIENTS) as warm:
            time.sleep(CAPACITY_SECONDS)
        assert set(warm.outcomes) == {RIGHT}, warm.outcomes
        capacity = warm.total / CAPACITY_SECONDS
        worker = Worker(server)
        idle = worker.memory
        with load(server, question, CLIENTS, FACTOR * capacity) as result:
            began, peak = time.monotonic(), 0
            while time.monotonic() - began < seconds:
                peak = max(peak, worker.memory)
                time.sleep(LOOK_SECONDS)
            sent, elapsed = result.total, time.monotonic() - began
            assert server.get("/livez").status_code == 200
        assert server.get("/readyz").status_code == 200
        question.check(server)
        assert Worker(server).process == worker.process
        return Result(
            seconds=round(elapsed, 1),
            capacity=capacity,
            offered=sent / elapsed,
            outcomes=dict(result.outcomes),
            answered_in_ms=result.percentile(RIGHT, 50),
            refused_in_ms=result.percentile(REFUSED, 50),
            refused_in_ms_95=result.percentile(REFUSED, 95),
            idle_memory=idle,
            peak_memory=peak,
            memory_after=worker.memory,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = overload(folder / "server", make_slow_bundle(folder / "bundle"), seconds)
    print(json.dumps(asdict(result), indent=2))
    assert not result.unexpected


if __name__ == "__main__":
    main()
