"""A backbone as users have theirs: a YAML file with a checkpoint next to it. And exports of probes on it."""

import contextlib
import io
import json
import shutil

import pytest
import torch

from avex_export.cli import main
from avex_export.graph import Head
from avex_export.recipes import find_recipe
from avex_serve.bundles.manifest import ONNX, TORCHSCRIPT, VERIFICATION, AudioSpec
from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import build_probe_from_config, save_probe
from tests.bundles import replace_file
from tests.models.backbones import RATE, tiny_beats, tiny_spec, write_model

UNTRAINED = "avex-export: the head has random weights: its answers mean nothing\n"
CLIPS = AudioSpec(sample_rate=RATE, window_samples=RATE)
LABELS = ("bat", "bee", "bird", "frog", "wind")


def head(probe):
    """The probe as a trained head with these labels."""
    return Head("x", probe, LABELS, "sigmoid", trained=True, input_fingerprint=None, pooled_fingerprint=None)


def verified(bundle):
    """Input and rows of every check in a bundle's record, all of which passed."""
    checks = json.loads((bundle / VERIFICATION).read_text())["checks"]
    assert all(check["passed"] for check in checks)
    return [(check["input"], check["rows"]) for check in checks]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of the YAML file; `tiny_beats(seed=5)` are its weights."""
    path = tmp_path_factory.mktemp("model") / "tiny.yml"
    return write_model(path, tiny_beats(seed=5), tiny_spec(), licence="CC0-1.0")


@pytest.fixture(scope="session")
def labels(tmp_path_factory):
    """Path of a label file."""
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\n".join(LABELS))
    return path


@pytest.fixture
def export(capsys, one_operator_table):
    """Run `avex-export` in this process: its exit code, standard output and standard error."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def trained_probe(name="linear_last", **changes):
    """A probe of a recipe's kind on `tiny_beats(seed=5)`, with the same weights at each call."""
    fields = find_recipe(name).config.model_dump(exclude_unset=True)
    torch.manual_seed(1)
    config = ProbeConfig(**{**fields, **changes})
    probe = build_probe_from_config(config, 5, "cpu", base_model=tiny_beats(seed=5)).eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return probe


@pytest.fixture(scope="session")
def exported(made_once, model, one_operator_table):
    """The bundle of `trained_probe(name)` with some options, and what its export printed. Tests only read it."""

    def make(folder, name, options):
        save_probe(trained_probe(name), folder / "probe", labels=LABELS, model=model, activation="sigmoid")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(["--probe", str(folder / "probe"), "--output", str(folder / "bundle"), *options])
        assert code == 0
        (folder / "printed.txt").write_text(printed.getvalue())

    def bundle(name, *options):
        folder = made_once((name, options), lambda folder: make(folder, name, options))
        return folder / "bundle", (folder / "printed.txt").read_text()

    return bundle


def with_one_format(bundle, form, target):
    """A copy of a bundle in ONNX and TorchScript that has one of them."""
    shutil.copytree(bundle, target)
    return replace_file(target, {"onnx": TORCHSCRIPT, "torchscript": ONNX}[form], None)
