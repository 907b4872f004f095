"""``avex-serve demo``: the whole way once, from a trained probe to answers over HTTP and gRPC.

It does what a user would do, with the user's own commands: ``avex-export``, ``bentoml serve``, a request.
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
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import soundfile

from avex_serve.bundle import read_bundle
from avex_serve.demo.sounds import Event, make_recording
from avex_serve.errors import AvexServeError, DependencyError
from avex_serve.runtime.audio import decode
from avex_serve.runtime.engine import open_bundle
from avex_serve.runtime.results import Detection, Prediction, Selection, detect, score_scale
from avex_serve.runtime.windows import plan_windows
from avex_serve.service.grpc_messages import SERVICE, message_class

PROBE = "linear_last"
SEED = 7
SAMPLE_RATE = 16000  # Hz
_START_SECONDS = 90  # that the server gets to come up
_STOP_SECONDS = 30


def run_demo() -> None:
    """Run it and print what happens.

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
            raise AvexServeError("the export failed; see above")
        print("(The demo removes its bundle at the end; the same command without --output keeps one.)")

        _title("3. bentoml serve avex_serve.service:AvexService")
        with _server(bundle, folder) as (http_port, grpc_port):
            _title(f"4. Over HTTP: curl --data-binary @recording.wav http://127.0.0.1:{http_port}/predict")
            over_http = _ask_http(recording, http_port)
            right = _show(over_http.detections, events)

            _title(f"5. Over gRPC: inference.GRPCInferenceService/ModelInfer on 127.0.0.1:{grpc_port}")
            over_grpc = _detections(bundle, recording, _ask_grpc(recording, grpc_port))
            _show(over_grpc, events)
        _check(bundle, recording, over_http, over_grpc)
    print(f"\n{right} of {len(events)} sounds named right; HTTP, gRPC and a prediction without a server agree.")


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


@contextlib.contextmanager
def _server(bundle: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """`bentoml serve` on free ports of this machine, until the block ends."""
    http_port, grpc_port = _free_ports(2)
    environment = {
        **os.environ,
        "AVEX_BUNDLE": str(bundle),
        "AVEX_DEVICE": "cpu",  # the answers are compared to the last bit
        "AVEX_GRPC_HOST": "127.0.0.1",
        "AVEX_GRPC_PORT": str(grpc_port),
        "BENTOML_HOME": str(folder / "bentoml"),  # two servers with one home disturb each other's metrics
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "avex_serve.service:AvexService"]
    command += ["--host", "127.0.0.1", "--port", str(http_port)]
    log = folder / "server.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while not _is_ready(http_port):
            if process.poll() is not None or time.monotonic() > started + _START_SECONDS:
                raise AvexServeError(f"the server did not come up; its log:\n{log.read_text('utf-8', 'replace')}")
            time.sleep(0.1)
        for line in log.read_text("utf-8", "replace").splitlines():
            if "serving bundle" in line:
                print(line)
        print(f"ready after {time.monotonic() - started:.1f} s")
        yield http_port, grpc_port
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _ask_http(recording: Path, port: int) -> Prediction:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", recording.read_bytes())
    with urllib.request.urlopen(request, timeout=60) as response:
        return Prediction.model_validate_json(response.read())


def _ask_grpc(recording: Path, port: int) -> np.ndarray:
    """Scores (windows, labels) of the recording, sent as it is."""
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


def _detections(bundle: Path, recording: Path, scores: np.ndarray) -> list[Detection]:
    """Detections from scores (windows, labels): the labels and the length of a window stand in the bundle."""
    opened = read_bundle(bundle)
    spec = opened.manifest.audio
    assert spec is not None
    plan = plan_windows(soundfile.info(recording).frames, spec.window_samples, spec.sample_rate, overlap=0.0)
    (probe,) = opened.manifest.probes
    selection = Selection.of(score_scale(probe.activation), threshold=None, top_k=None)
    return detect(plan.spans, scores, opened.labels[probe.name], selection)


def _show(detections: list[Detection], events: list[Event]) -> int:
    """Print the detections beside the truth, and return how many sounds were named right."""
    print(f"{'seconds':>13}  {'score':>5}  {'heard':14} played")
    named = set()
    for detection in detections:
        played = [event for event in events if _overlap(detection, event)]
        named |= {event for event in played if event.label == detection.label}
        span = f"{detection.start:5.1f} – {detection.end:5.1f}"
        print(f"{span}  {detection.score:5.2f}  {detection.label:14} {', '.join(e.label for e in played) or '–'}")
    return len(named)


def _overlap(detection: Detection, event: Event) -> bool:
    return event.start < detection.end and event.end > detection.start


def _check(bundle: Path, recording: Path, over_http: Prediction, over_grpc: list[Detection]) -> None:
    """Raise AvexServeError unless both answers are those of the bundle opened in this process."""
    with open_bundle(bundle, device="cpu") as engine:
        expected = engine.predict(*decode(recording))
    if over_http != expected:
        raise AvexServeError("HTTP answered something else than the bundle opened in this process")
    if over_grpc != expected.detections:
        raise AvexServeError("gRPC answered something else than the bundle opened in this process")
