"""``avex-serve demo``: from a trained probe to answers over HTTP and gRPC.

It runs the commands that a user would run: ``avex-export``, ``bentoml serve``, a request.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import soundfile

from avex_serve.audio.reader import decode
from avex_serve.audio.windows import plan_windows
from avex_serve.bundles.reading import read_manifest
from avex_serve.demo.server import running_server
from avex_serve.errors import AvexServeError, DependencyError
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.results import Detection, Prediction, detect
from avex_serve.inference.scores import Selection
from avex_serve.service.grpc.messages import SERVICE, message_class
from avex_serve.synthetic import Event, make_recording

PROBE = "linear_last"
SEED = 7
SAMPLE_RATE = 16000  # Hz


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
            over_http = _ask_http(recording, server.http_port)
            right = _show(over_http.detections, events)

            _title(f"5. Over gRPC: inference.GRPCInferenceService/ModelInfer on 127.0.0.1:{server.grpc_port}")
            over_grpc = _detections(bundle, recording, _ask_grpc(recording, server.grpc_port))
            _show(over_grpc, events)
        _check(bundle, recording, over_http, over_grpc)
    print(f"\n{right} of {len(events)} sounds detected; HTTP, gRPC and a prediction without a server agree.")


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _ask_http(recording: Path, port: int) -> Prediction:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", recording.read_bytes())
    with urllib.request.urlopen(request, timeout=60) as response:
        return msgspec.json.decode(response.read(), type=Prediction)


def _ask_grpc(recording: Path, port: int) -> np.ndarray:
    """Scores (windows, labels) of the recording, which is sent as a file."""
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
    """Detections from scores (windows, labels), with the labels and the window length of the bundle."""
    opened = read_manifest(bundle)
    spec = opened.manifest.audio
    assert spec is not None
    plan = plan_windows(soundfile.info(recording).frames, spec.window_samples, spec.sample_rate, overlap=0.0)
    (probe,) = opened.manifest.probes
    selection = Selection.of(probe.activation, threshold=None, top_k=None)
    return detect(plan.spans, scores, opened.labels[probe.name], selection)


def _show(detections: list[Detection], events: list[Event]) -> int:
    """Print the detections next to the sounds that were played, and return the number of correct ones."""
    print(f"{'seconds':>13}  {'score':>5}  {'detected':14} played")
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
    """Raise AvexServeError unless both answers equal those of the bundle opened in this process."""
    with open_bundle(bundle, device="cpu") as engine:
        expected = engine.predict(*decode(recording))
    if over_http != expected:
        raise AvexServeError("HTTP and the bundle opened in this process answer differently")
    if over_grpc != expected.detections:
        raise AvexServeError("gRPC and the bundle opened in this process answer differently")
