"""The numbers of avex itself: its reference data, checked by its own checker at its default tolerance."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import shared

REFERENCE = shared("reference")
DEVIATIONS = Path(__file__).with_name("deviations.txt")
GROUPS = [
    "beats_s_naturelm",
    "beats_s_sl",
    "beats_s_32k",
    "beats_s_tinypatch",
    "beats_w768_classifier",
    "effnet_b0",
    "effnet_b0_classifier",
    "probes_beats",
    "probes_effnet",
    "probes_offline",
    "probes_train",
    "probes_finetune",
    "errors",
]


def run_check(*arguments):
    command = [sys.executable, "-B", str(REFERENCE / "tools" / "check.py"), "--package", "avex_serve"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert result.stdout, result.stderr
    return result


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "report.json"
    result = run_check(
        "--skip-full", "--deviations", str(DEVIATIONS), "--json", str(path), "--verbose", "--only", *GROUPS
    )
    return result, json.loads(path.read_text())


@pytest.mark.parametrize("group", [*GROUPS[:-1], "errors.config", "errors.build"])
def test_every_check_of_the_group_passes(report, group):
    _, groups = report
    assert groups[group]["n"] > 0
    assert groups[group]["fails"] == []


def test_the_checker_itself_is_content(report):
    result, _ = report
    assert result.returncode == 0, result.stdout


def test_every_deviation_that_is_listed_is_one(report):
    result, _ = report
    found = re.findall(r"intended deviation: (\S+::.*?): ", result.stdout)
    listed = [line for line in DEVIATIONS.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in listed if not any(re.search(line, key) for key in found)] == []


@pytest.mark.slow
def test_the_official_model_at_full_size():
    result = run_check("--only", "beats_full_naturelm")
    assert result.returncode == 0, result.stdout
    assert re.search(r"TOTAL (\d+)/\1 checks passed", result.stdout)
