"""docs/architecture.md says what is true: its tree, and the way of a recording as a request takes it."""

import io
import re
import time
from pathlib import Path

import soundfile

import avex_serve
from avex_serve.bundles.reading import read_bundle
from avex_serve.bundles.sealing import recalibrate
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_recording
from tests.bundles import calibration
from tests.service.conftest import running_server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = Path(avex_serve.__file__).parent
MOST = 10  # modules from the socket to the rows of the graph

# Python imports a module of this name at its start. This one notes the module of each call in the package.
TRACER = """
import os, sys, threading

package = os.environ["TRACED"] + os.sep
calls = open(os.environ["CALLS"] + str(os.getpid()), "a", buffering=1)

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(package):
        print(frame.f_code.co_filename.removeprefix(package), file=calls)

threading.setprofile(note)
sys.setprofile(note)
"""


def test_the_tree_names_every_file():
    folders = ("avex_serve/**/*.py", "export/**/*.py", "scripts/*.py", "examples/*.py", "docs/*.md")
    files = [path for folder in folders for path in ROOT.glob(folder)]
    assert [path.name for path in files if path.name != "__init__.py" and path.name not in PAGE] == []


def test_the_way_of_a_recording(tmp_path):
    section = PAGE.partition("## The way of a recording")[2].partition("A `ModelInfer` over gRPC")[0]
    way = re.findall(r"^ ?\d+  ([\w/]+\.py)", section, re.MULTILINE)
    named = {name for name in re.findall(r"\b([\w/]+\.py)\b", section) if (PACKAGE / name).is_file()}
    assert len(way) <= MOST
    crossed = named - {"inference/torch.py"}  # on CUDA
    assert _crossed(tmp_path) == crossed
    assert f"Of the {len(crossed)} modules" in section


def _crossed(folder):
    """The modules that a request crosses, in each of three: a background task may run during one of them."""
    (folder / "sitecustomize.py").write_text(TRACER)
    demo = read_bundle(DEMO_BUNDLE)
    ((head, labels),) = demo.labels.items()
    bundle = recalibrate(demo, folder / "bundle", "2", {head: calibration(labels, ((1, 0, 0),) * len(labels))})
    recording = io.BytesIO()
    soundfile.write(recording, make_recording(0, seconds=5)[0], 44100, format="WAV")
    traced = {"PYTHONPATH": str(folder), "TRACED": str(PACKAGE), "CALLS": str(folder / "calls.")}
    crossed = []
    with running_server(
        folder / "server", AVEX_BUNDLE=str(bundle.directory), AVEX_RELOAD_SECONDS="0", **traced
    ) as server:
        for _ in range(4):
            before = {path: path.stat().st_size for path in folder.glob("calls.*")}
            server.post("/predict", content=recording.getvalue()).raise_for_status()
            time.sleep(0.3)  # metrics and log come after the answer
            crossed.append({line for path, size in before.items() for line in path.read_text()[size:].splitlines()})
    return set.intersection(*crossed[1:])  # the first request meets what is made once
