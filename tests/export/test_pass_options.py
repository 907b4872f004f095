"""The command line's view of the passes: --explain, --without, --profile, and large weights next to the graph."""

import json

import numpy as np
import onnx
import pytest

from avex_export import formats
from avex_export.cli import main
from avex_export.passes import CONSTANTS, EXTERNAL_DATA, PASSES
from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle


def test_explain_lists_the_passes_in_order_and_what_they_do(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = export("--explain")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names == [*(each.name for each in PASSES), "constants", "external-data"]
    code, out, _ = export("--explain", "--probe", "linear_last", "--without", "norms")
    assert code == 0
    told = {line.split()[0]: line.partition(" [")[2].rstrip("]") for line in out.splitlines()[1:]}
    assert told["projections"] == "applied"
    assert told["norms"] == "left out"
    assert told["batch-norm"] == "nothing to do"
    assert not list(tmp_path.iterdir())


def test_an_unknown_pass_is_refused_with_the_nearest(export):
    code, _, error = export("--probe", "linear_last", "--without", "poling")
    assert code == 2
    assert "no such pass; did you mean pooling?" in error


@pytest.fixture
def bundles(made_once, one_operator_table):
    """The demo probe with every pass and with none, where all weights count as large."""

    def make(target, *without):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "_LARGE", 10_000)
            options = [f"--without={name}" for name in without]
            assert main(["--probe", "linear_last", "--format", "onnx", "--output", str(target), *options]) == 0

    every = [*(each.name for each in PASSES), CONSTANTS, EXTERNAL_DATA]
    return made_once("every pass", make), made_once("no pass", lambda target: make(target, *every))


def nodes(bundle):
    """How many nodes of the graph depend on an input, and how many others compute something."""
    graph = onnx.load(bundle / "model.onnx").graph
    constant = {"", *(each.name for each in graph.initializer)}
    dependent = computed = 0
    for node in graph.node:
        if constant.issuperset(node.input):
            constant.update(node.output)
            computed += bool(node.input)
        else:
            dependent += 1
    return dependent, computed


def test_passes_can_be_left_out(bundles):
    every, none = map(nodes, bundles)
    assert every[0] < none[0]


def test_what_depends_on_no_input_is_computed_once(bundles):
    every, none = map(nodes, bundles)
    assert every[1] == 0
    assert none[1] > 10


def test_large_weights_are_in_a_file_next_to_the_graph(bundles):
    for bundle, separate in zip(bundles, (True, False), strict=True):
        assert ("model.onnx.data" in read_bundle(bundle).manifest.files) == separate
        if separate:
            assert (bundle / "model.onnx").stat().st_size < 500_000 < (bundle / "model.onnx.data").stat().st_size
            assert (bundle / "model.onnx.data").stat().st_mode == (bundle / "model.onnx").stat().st_mode
        with open_bundle(bundle) as engine:
            assert np.isfinite(engine.infer(np.zeros((1, 32000), np.float32))["logits"]).all()


APPLIED = ["dead-layers", "front-end", "position-bias", "projections", "norms", "pooling", "constants"]


# Each pass costs an export.
@pytest.mark.parametrize("profiled", [APPLIED[-2:], pytest.param(APPLIED, marks=pytest.mark.nightly)], ids=len)
def test_profile_tells_what_each_pass_buys(export, tmp_path, profiled):
    bundle = tmp_path / "bundle"
    options = [f"--without={name}" for name in APPLIED if name not in profiled]
    code, out, _ = export("--probe", "linear_last", "--format", "onnx", "--profile", "--output", bundle, *options)
    assert code == 0
    gains = json.loads((bundle / "verification.json").read_text())["passes"]
    assert {gain["name"] for gain in gains} == {*profiled}
    for gain in gains:
        assert gain["speedup"] > 0
        assert gain["difference"] < 1e-4
        assert gain["name"] in out


def test_a_head_alone_has_nothing_to_profile(export):
    code, _, error = export("--probe", "linear_last", "--offline", "--profile")
    assert code == 2
    assert "a head alone" in error
