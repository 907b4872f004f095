"""``avex-serve demo``: from a trained probe to answers over HTTP and gRPC.

It runs the commands that a user would run: ``avex-export``, ``bentoml serve``, a request.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import soundfile

from avex_serve.audio.reader import decode
from avex_serve.errors import AvexServeError, DependencyError
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.results import Detection, Prediction, detect
from avex_serve.inference.scores import Selection
from avex_serve.service.grpc.messages import SERVICE, message_class
from avex_serve.synthetic import Event, make_recording

PROBE = "linear_last"
SEED = 7
SAMPLE_RATE = 16000  # Hz

_START_SECONDS = 90  # time limit of the start of the server
_STOP_SECONDS = 30


def run_demo() -> None:
    """Run the demo and print each step.

    Raises:
        DependencyError: the exporter is not installed.
        AvexServeError: a step failed, or the answers differ.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("avex_export") is None:
        raise DependencyError("the demo exports a probe, which needs torch; pip install 'avex-serve[export]'")
    with tempfile.TemporaryDirectory(prefix="avex-demo-") as scratch:
        folder = Path(scratch)
        recording, bundle = folder / "recording.wav", folder / PROBE

        wave, events = make_recording(SEED, sample_rate=SAMPLE_RATE)
        soundfile.write(recording, wave, SAMPLE_RATE)
        _title(f"1. A recording of {wave.size / SAMPLE_RATE:g} s: {', '.join(event.label for event in events)}")

        _title(f"2. avex-export --probe {PROBE}")
        command = [sys.executable, "-m", "avex_export", "--probe", PROBE, "--output", str(bundle)]
        if subprocess.run(command, check=False).returncode:
            raise AvexServeError("the export failed; see the message above")
        print("(The demo removes its bundle at the end; the same command without --output keeps one.)")

        _title("3. bentoml serve avex_serve.service:AvexService")
        started = time.monotonic()
        with running_server(bundle, folder) as server:
            for line in server.log.read_text("utf-8", "replace").splitlines():
                if "serving bundle" in line:
                    print(line)
            print(f"ready after {time.monotonic() - started:.1f} s")
            _title(f"4. Over HTTP: curl --data-binary @recording.wav http://127.0.0.1:{server.http_port}/predict")
            over_http = _predict_over_http(recording, server.http_port)
            right = _show(over_http.detections, events)

            _title(f"5. Over gRPC: inference.GRPCInferenceService/ModelInfer on 127.0.0.1:{server.grpc_port}")
            scores = _predict_over_grpc(recording, server.grpc_port)
            with open_bundle(bundle, device="cpu") as engine:
                expected = engine.predict(*decode(recording))
                spans = engine.score(*decode(recording)).spans  # (windows, 2)
                over_grpc = detect(spans, scores, engine.labels(), Selection(threshold=0.5, top_k=None))
            _show(over_grpc, events)
    if over_http != expected:
        raise AvexServeError("HTTP returns another answer than the same bundle in this process")
    if over_grpc != expected.detections:
        raise AvexServeError("gRPC returns another answer than the same bundle in this process")
    print(f"\n{right} of {len(events)} sounds detected; HTTP, gRPC and a prediction without a server agree.")


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _predict_over_http(recording: Path, port: int) -> Prediction:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", recording.read_bytes())
    with urllib.request.urlopen(request, timeout=60) as response:
        return msgspec.json.decode(response.read(), type=Prediction)


def _predict_over_grpc(recording: Path, port: int) -> np.ndarray:
    """Send the recording as a file; return its scores (windows, labels)."""
    request: Any = message_class("ModelInferRequest")(model_name=PROBE)
    tensor = request.inputs.add(name="waveform", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(recording.read_bytes())
    request.outputs.add(name="scores")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        infer = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_class("ModelInferResponse").FromString,
        )
        answer: Any = infer(request, timeout=60)
    (output,) = answer.outputs
    return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(output.shape)


def _show(detections: list[Detection], events: list[Event]) -> int:
    """Print the detections next to the sounds in the recording, and return how many sounds were detected."""
    print(f"{'seconds':>13}  {'score':>5}  {'detected':14} played")
    named = set()
    for detection in detections:
        played = [event for event in events if event.start < detection.end and event.end > detection.start]
        named |= {event for event in played if event.label == detection.label}
        span = f"{detection.start:5.1f} – {detection.end:5.1f}"
        print(f"{span}  {detection.score:5.2f}  {detection.label:14} {', '.join(e.label for e in played) or '–'}")
    return len(named)


# -- the server ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server that accepts requests on 127.0.0.1."""

    http_port: int
    grpc_port: int
    pid: int  # of BentoML's supervisor; its child processes answer the requests
    log: Path


@contextlib.contextmanager
def running_server(bundle: Path, folder: Path, poll_seconds: float = 0.1, **variables: str) -> Iterator[Server]:
    """Serve a bundle on the CPU until the block ends.

    Args:
        bundle: the bundle.
        folder: for the log and BentoML's files.
        poll_seconds: between two looks whether it is ready.
        variables: further environment variables.

    Raises:
        AvexServeError: the server doesn't start.
    """
    with socket.socket() as http, socket.socket() as grpc_:  # two free ports
        http.bind(("127.0.0.1", 0))
        grpc_.bind(("127.0.0.1", 0))
        http_port, grpc_port = http.getsockname()[1], grpc_.getsockname()[1]
    environment = {
        **os.environ,
        "AVEX_BUNDLE": str(bundle.resolve()),
        "AVEX_DEVICE": "cpu",  # the demo compares answers to the last bit
        "AVEX_GRPC_HOST": "127.0.0.1",
        "AVEX_GRPC_PORT": str(grpc_port),
        "BENTOML_HOME": str(folder / "bentoml"),  # two servers with one home disturb each other's metrics
        "BENTOML_DO_NOT_TRACK": "True",
        **variables,
    }
    command = [sys.executable, "-m", "bentoml", "serve", "avex_serve.service:AvexService"]
    command += ["--host", "127.0.0.1", "--port", str(http_port)]
    log = folder / "server.log"
    deadline = time.monotonic() + _START_SECONDS
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not _is_ready(http_port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AvexServeError(f"the server did not start; its log:\n{log.read_text('utf-8', 'replace')}")
            time.sleep(poll_seconds)
        yield Server(http_port, grpc_port, process.pid, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
