"""Half precision and PT2, beside what test_export.py says of all formats."""

import json

import numpy as np
import pytest
import torch

from avex_export.graph import Assembly, export_graph
from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.configs import ProbeConfig
from avex_serve.errors import ExportError
from avex_serve.evidence.first import open_checked
from avex_serve.models.probes import build_probe_from_config
from tests.export.conftest import CLIPS, head
from tests.models.backbones import effnet, noise, tiny_beats, tiny_eat
from tests.models.test_custom import Network

HEADS = {
    "linear": {},
    "mlp": {"hidden_dims": [8]},
    "lstm": {"aggregation": "none", "lstm_hidden_size": 8, "num_layers": 1},
    "attention": {"aggregation": "none", "num_heads": 2, "attention_dim": 8, "num_layers": 1},
    "transformer": {"aggregation": "none", "num_heads": 2, "attention_dim": 8, "num_layers": 1},
}


def assembly(model, kind="linear", layer="last_layer"):
    config = ProbeConfig(probe_type=kind, target_layers=[layer], **HEADS[kind])
    torch.manual_seed(0)
    probe = build_probe_from_config(config, 5, "cpu", base_model=model).eval()
    return Assembly((head(probe),), "tiny", None, "CC0", CLIPS)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("make", [tiny_beats, tiny_eat, lambda: effnet(n_mels=32)], ids=["beats", "eat", "effnet"])
def test_a_network_in_half_precision_is_near_and_its_front_end_is_not_halved(make, kind):
    whole = assembly(make(), kind)
    graph = export_graph(whole, half=True)
    types = {t.dtype for t in graph.state_dict().values() if t.is_floating_point()}
    assert types == {torch.float16, torch.float32}
    wave = noise(3)
    with torch.no_grad():
        features, padding = whole.probe.combine(wave)
        for found, expected in zip(
            graph(wave), (whole.probe.classify(features, padding), whole.probe.pool(features)), strict=True
        ):
            assert found.dtype == torch.float16
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2 * scale)
    assert all(t.dtype == torch.float32 for t in whole.probe.parameters())


def test_a_backbone_of_ones_own_is_not_halved():
    with pytest.raises(ExportError, match=r"--half: half precision is for BEATs, EAT and EfficientNet"):
        export_graph(assembly(Network().eval(), layer="mix"), half=True)


def test_a_half_bundle_is_verified_by_its_own_tolerance_and_served(export, tmp_path):
    bundle = tmp_path / "bundle"
    code, _, _ = export("--probe", "linear_last", "--half", "--format", "torchscript", "--output", bundle)
    assert code == 0
    manifest = read_bundle(bundle).manifest
    assert manifest.half
    checks = json.loads((bundle / "verification.json").read_text())["checks"]
    assert {check["format"] for check in checks} == {"torch-half", "torchscript"}  # the latter on device meta
    with open_checked(bundle) as engine:
        answer = engine.infer(np.zeros((2, 32000), np.float32))
        assert engine.backend.format == "torch-half"
        assert answer["logits"].dtype == np.float32


def test_half_needs_torchscript_and_audio(export, tmp_path):
    code, _, error = export("--probe", "linear_last", "--half", "--format", "onnx", "--output", tmp_path / "x")
    assert code == 2
    assert "--half is for TorchScript" in error
    options = ["--half", "--offline", "--input-dim", "128", "--output", tmp_path / "x"]
    code, _, error = export("--probe", "linear_last", *options)
    assert code == 2
    assert "--half is for backbones" in error
    assert not (tmp_path / "x").exists()


# test_several_probes.py writes PT2 of a linear head too; lstm_all has more layers than lstm_last.
@pytest.mark.parametrize(
    "probe", ["lstm_last", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("linear_last", "lstm_all"))]
)
def test_a_pt2_program_is_verified_and_says_nothing_of_where_it_was_made(export, tmp_path, probe):
    bundle = tmp_path / "bundle"
    code, _, _ = export("--probe", probe, "--format", "onnx", "--format", "pt2", "--output", bundle)
    assert code == 0
    checks = json.loads((bundle / "verification.json").read_text())["checks"]
    assert {"pt2", "onnx"} == {check["format"] for check in checks}
    content = (bundle / "model.pt2").read_bytes()
    assert b"avex_export" not in content
    program = torch.export.load(bundle / "model.pt2").module()
    with torch.no_grad(), open_bundle(bundle) as engine:
        wave = 0.1 * torch.randn(3, 32000)
        logits, _ = program(wave)
        np.testing.assert_allclose(engine.infer(wave.numpy())["logits"], logits.numpy(), atol=1e-4)
