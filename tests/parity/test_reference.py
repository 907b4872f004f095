"""The numbers of avex itself: its reference data, checked by its own checker at its default tolerance."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avex_serve import load_model
from avex_serve.configs import ModelSpec
from tests.shared import shared

REFERENCE = shared("reference")
DEVIATIONS = Path(__file__).with_name("deviations.txt")
GROUPS = [
    "beats_s_naturelm",
    "beats_s_sl",
    "beats_s_32k",
    "beats_s_tinypatch",
    "beats_w768_classifier",
    "eat_s",
    "eat_s_yamlnorm",
    "effnet_b0",
    "effnet_b0_classifier",
    "probes_beats",
    "probes_eat",
    "probes_effnet",
    "probes_offline",
    "probes_train",
    "probes_finetune",
    "errors",
]


def run_check(*arguments):
    command = [sys.executable, "-B", str(REFERENCE / "tools" / "check.py"), "--package", "avex_serve"]
    # The data was made on a processor for which MKL takes its compatible code. On Intel its other code rounds the
    # FFT differently, which alone changes the log-mel of nearly empty bands by 1e-4.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MKL_CBWR": "COMPATIBLE"}
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


def test_fairseqs_names_carry_the_same_weights(tmp_path):
    tool, spec = REFERENCE / "tools" / "refkit_rule.py", REFERENCE / "specs" / "eat_s.json"
    for name, options in (("native", ()), ("fairseq", ("--fairseq-eat",))):
        command = [sys.executable, "-B", str(tool), str(spec), "-o", str(tmp_path / f"{name}.safetensors"), *options]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    entries = {entry["name"]: entry for entry in json.loads((REFERENCE / "models.json").read_text())}
    model_spec = ModelSpec(**entries["eat_s"]["model_spec"])
    native, fairseq = (
        load_model(model_spec, checkpoint_path=str(tmp_path / f"{name}.safetensors")).state_dict()
        for name in ("native", "fairseq")
    )
    assert native.keys() == fairseq.keys()
    assert all(torch.equal(native[name], fairseq[name]) for name in native)


@pytest.mark.nightly  # the same code as in the groups above, with the sizes of official models
@pytest.mark.parametrize("model", ["beats_full_naturelm", "eat_full_sl"])
def test_the_official_model_at_full_size(model):
    result = run_check("--only", model)
    assert result.returncode == 0, result.stdout
    assert re.search(r"TOTAL (\d+)/\1 checks passed", result.stdout)
