"""The command line's view of the passes: --explain, --without, --profile, and large weights beside the graph."""

import json

import numpy as np
import onnx
import pytest

from avex_export import formats
from avex_export.passes import PASSES
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


def test_passes_can_be_left_out(export, tmp_path):
    nodes = {}
    for name, options in (("all", []), ("none", [f"--without={each.name}" for each in PASSES])):
        code, _, _ = export("--probe", "linear_last", "--format", "onnx", "--output", tmp_path / name, *options)
        assert code == 0
        nodes[name] = len(onnx.load(tmp_path / name / "model.onnx").graph.node)
    assert nodes["all"] < nodes["none"]


def test_profile_tells_what_each_pass_buys(export, tmp_path):
    bundle = tmp_path / "bundle"
    code, out, _ = export("--probe", "linear_last", "--format", "onnx", "--profile", "--output", bundle)
    assert code == 0
    gains = json.loads((bundle / "verification.json").read_text())["passes"]
    assert {gain["name"] for gain in gains} == {
        *("dead-layers", "front-end", "position-bias", "projections", "norms", "pooling", "constants")
    }
    for gain in gains:
        assert gain["speedup"] > 0
        assert gain["difference"] < 1e-4
        assert gain["name"] in out
    code, _, error = export("--probe", "linear_last", "--offline", "--profile")
    assert code == 2
    assert "a head alone" in error


@pytest.mark.parametrize("options", [[], ["--without=external-data"]])
def test_large_weights_stand_beside_the_graph(export, tmp_path, monkeypatch, options):
    monkeypatch.setattr(formats, "_LARGE", 10_000)
    bundle = tmp_path / "bundle"
    assert export("--probe", "linear_last", "--format", "onnx", "--output", bundle, *options)[0] == 0
    beside = "model.onnx.data" in read_bundle(bundle).manifest.files
    assert beside == (not options)
    if beside:
        assert (bundle / "model.onnx").stat().st_size < 500_000 < (bundle / "model.onnx.data").stat().st_size
        assert (bundle / "model.onnx.data").stat().st_mode == (bundle / "model.onnx").stat().st_mode
    with open_bundle(bundle) as engine:
        assert np.isfinite(engine.infer(np.zeros((1, 32000), np.float32))["logits"]).all()


def test_what_depends_on_no_input_is_computed_once(export, tmp_path):
    def computed(*options):
        """How many nodes of the graph have no input but constants."""
        bundle = tmp_path / "bundle"
        assert export("--probe", "linear_last", "--format", "onnx", "--output", bundle, *options)[0] == 0
        graph = onnx.load(bundle / "model.onnx").graph
        constant = {"", *(each.name for each in graph.initializer)}
        constant |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
        return sum(bool(node.input) and constant.issuperset(node.input) for node in graph.node)

    assert computed() == 0
    assert computed("--without", "constants") > 10
