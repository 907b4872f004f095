"""What an installed package must do, for a Python that has nothing else: `python -P tests/packaged.py`."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

import soundfile

import avex_serve
from avex_serve.demo.run import running_server
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_recording

RATE = 16000  # Hz


def main():
    assert importlib.util.find_spec("torch") is None
    command = Path(sysconfig.get_path("scripts")) / "avex-serve"
    with tempfile.TemporaryDirectory() as scratch:
        recording = Path(scratch) / "recording.wav"
        wave, events = make_recording(7, sample_rate=RATE)
        soundfile.write(recording, wave, RATE)
        run = [command, "predict", DEMO_BUNDLE, recording, "--json"]
        answer = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)
        found = {each["label"] for each in answer["detections"]}
        assert len({event.label for event in events} & found) >= len(events) / 2, found
        with running_server(DEMO_BUNDLE, Path(scratch)) as server:
            url = f"http://127.0.0.1:{server.http_port}"
            served = ask(urllib.request.Request(f"{url}/predict", recording.read_bytes()))
            assert json.loads(served)["detections"] == answer["detections"]
            assert "<html" in ask(urllib.request.Request(url, headers={"Accept": "text/html"}))
            assert avex_serve.__version__ in ask(f"{url}/v2")
    print(f"avex-serve {avex_serve.__version__} runs on Python {sys.version.split()[0]} without torch")


def ask(request):
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


if __name__ == "__main__":
    main()
