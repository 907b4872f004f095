"""Probes on EAT through `avex-export`: the rest of the exporter is tested on BEATs."""

import numpy as np
import onnx
import pytest
import torch

from avex_serve import open_bundle
from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import build_probe_from_config, save_probe
from tests.export.conftest import LABELS, UNTRAINED, verified
from tests.models.backbones import RATE, noise, tiny_eat, tiny_eat_spec, write_model

TOKENS = 57


@pytest.fixture(scope="session")
def eat(tmp_path_factory):
    """Path of a YAML file; `tiny_eat(seed=5)` are its weights."""
    return write_model(tmp_path_factory.mktemp("eat") / "eat.yml", tiny_eat(seed=5), tiny_eat_spec())


@pytest.fixture
def trained(tmp_path, eat):
    """Write a saved probe and return it with its folder."""

    def save(**fields):
        torch.manual_seed(1)
        config = ProbeConfig(**{"target_layers": ["last_layer"], **fields})
        probe = build_probe_from_config(config, 5, "cpu", base_model=tiny_eat(seed=5)).eval()
        save_probe(probe, tmp_path / "probe", labels=LABELS, model=eat, activation="sigmoid")
        return probe, tmp_path / "probe"

    return save


@pytest.mark.parametrize("name", ["mlp_last", "transformer_all"])
def test_variants_are_verified_on_every_input_in_both_formats(tmp_path, export, eat, labels, name):
    code, out, err = export(
        *("--probe", name, "--model", eat, "--labels", labels, "--allow-untrained", "--output", tmp_path / "bundle")
    )
    assert (code, err) == (0, UNTRAINED)
    assert "✗" not in out
    checks = verified(tmp_path / "bundle")
    assert len(checks) == 23  # five kinds of clips, noise in three batches, four recordings, and the meta device
    assert "not compared" not in out  # with float64 either
    assert ("noise", TOKENS) in checks
    assert {"digital silence", "shapes on device meta"} < {name for name, _ in checks}


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("seconds", [0.5, 2.0])  # padded, and cut
def test_clips_shorter_and_longer_than_it_hears(tmp_path, export, trained, form, seconds):
    probe, folder = trained()
    output = tmp_path / "bundle"
    code, _, err = export("--probe", folder, "--output", output, "--format", form, "--clip-seconds", seconds)
    assert (code, err) == (0, "")
    with open_bundle(output, "cpu") as engine:
        assert engine.manifest.audio.window_samples == seconds * RATE
        for rows in (1, 3):
            wave = noise(rows, seconds=seconds)
            with torch.no_grad():
                expected = probe(wave).numpy()
            np.testing.assert_allclose(engine.infer(wave.numpy())["logits"], expected, rtol=1e-4, atol=1e-4)


def test_what_is_slow_and_what_comes_after_the_last_tap_is_left_out(tmp_path, export, trained):
    _, folder = trained()
    export("--probe", folder, "--output", tmp_path / "bundle")
    module = torch.jit.load(tmp_path / "bundle" / "model.torchscript.pt")
    traced = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    exported = {i.name: tuple(i.dims) for i in graph.initializer}
    for names in (traced, exported):
        assert any("blocks.0.mlp.fc1" in name for name in names)
        assert any("blocks.1.attn.proj" in name for name in names)
        for dead in ("blocks.1.mlp", "blocks.1.norm", "backbone.classifier"):
            assert not any(dead in name for name in names)
    assert "MatMul" in {node.op_type for node in graph.node}
    assert not {"DFT", "STFT"} & {node.op_type for node in graph.node}  # onnxruntime has no fast ones
    (positions,) = (shape for name, shape in traced.items() if "positions" in name)
    assert positions == (1, TOKENS - 1, 32)


@pytest.mark.parametrize(
    "fields", [{}, {"probe_type": "attention", "aggregation": "none", "num_heads": 4, "attention_dim": 8}], ids=str
)
def test_a_probe_that_excludes_what_a_clip_is_filled_up_with(tmp_path, export, trained, fields):
    probe, folder = trained(extra_config={"exclude_padding": True}, **fields)
    output = tmp_path / "bundle"
    code, out, _ = export("--probe", folder, "--output", output, "--clip-seconds", 0.5)
    assert code == 0, out
    wave = noise(3, seconds=0.5)
    with torch.no_grad(), open_bundle(output, "cpu") as engine:
        features, padding = probe.combine(wave)
        found = engine.infer(wave.numpy())
        expected = {"logits": probe.classify(features, padding), "embedding": probe.pool(features, padding)}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-4 * max(1, value.abs().max()))
