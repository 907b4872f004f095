"""What a person sees first: the demo, and the service started with no further argument."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.models.checkpoints import fingerprint
from avex_serve.models.probes import load_probe
from avex_serve.models.utils.load import load_model
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_recording
from tests.interop.test_recordings import PROBES
from tests.service.conftest import running_server

CHECKOUT = Path(__file__).parents[2]


def test_the_demo_goes_the_whole_way(tmp_path):
    command = [Path(sys.executable).with_name("avex-serve"), "demo"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        "write ONNX",
        "write TorchScript",
        "recordings, end to end",
        "serving bundle linear_last",
        "Over gRPC",
    ):
        assert part in result.stdout
    assert "✗" not in result.stdout
    right, played = map(int, re.search(r"(\d+) of (\d+) sounds detected", result.stdout).groups())
    assert right >= 0.75 * played
    assert "Traceback" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_bundle_is_of_the_embedded_probe():
    manifest = read_bundle(DEMO_BUNDLE).manifest
    assert manifest.trained
    assert manifest.model == "avex_demo"
    probe = load_probe(PROBES / "linear_last")
    assert fingerprint(probe.base_model) == fingerprint(load_model("avex_demo", return_features_only=True))
    wave, events = make_recording(11)
    with open_bundle(DEMO_BUNDLE, "cpu") as engine:
        assert engine.labels() == probe.labels
        found = {(d.start, d.label) for d in engine.predict(wave, 16000).detections}
    named = [event for event in events if (event.start // 2 * 2, event.label) in found]
    assert len(named) >= 0.75 * len(events)


@pytest.mark.parametrize("checkout", [True, False], ids=["in a checkout", "installed"])
def test_the_service_comes_up_on_the_demo_bundle(tmp_path, checkout):
    options = {"cwd": CHECKOUT, "service": ()} if checkout else {}
    with running_server(tmp_path / "server", **options) as server:
        assert server.get("/v2/models/linear_last").json()["inputs"] == [
            {"name": "waveform", "datatype": "FP32", "shape": [-1, 32000]}
        ]
        assert f"serving bundle linear_last, version 1, from {DEMO_BUNDLE}" in server.log
        assert "AVEX_BUNDLE=dir" in server.log


@pytest.mark.parametrize("noise", [0, 20, 800])
def test_the_demo_names_nothing_in_digital_silence(noise):
    wave = np.zeros(100000, np.float32)
    wave[:noise] = 0.01 * np.random.default_rng(0).standard_normal(noise)
    with open_bundle(DEMO_BUNDLE, device="cpu") as engine:
        assert engine.predict(wave, 16000).detections == []
