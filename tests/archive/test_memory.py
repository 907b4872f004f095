"""The memory that a run takes does not depend on the length of a recording."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tests.bundles import make_loudness_bundle

RATE = 8000
ALLOWED = 100  # MB beyond those of a minute
# In a process of its own, since the usual counter of a child begins with its parent's.
RUN = """
import re, sys
from pathlib import Path
from avex_serve.cli import main
assert main(sys.argv[1:]) == 0
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.parametrize("hours", [2, pytest.param(24, marks=pytest.mark.nightly)])
def test_a_long_recording_takes_as_much_as_a_minute(tmp_path, hours):
    bundle = make_loudness_bundle(tmp_path / "bundle", samples=160_000)
    noise = np.random.default_rng(0).normal(0, 0.1, 60 * RATE)
    peaks = []
    for minutes in (1, 60 * hours):
        path = tmp_path / f"{minutes} min.wav"
        with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(noise)
        command = [sys.executable, "-c", RUN, "run", str(bundle), str(path), "--out", str(tmp_path / f"{minutes}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
        path.unlink()
    assert peaks[1] <= peaks[0] + ALLOWED
