"""EfficientNet the whole way: its feature maps have another rank, its layers differ in length and width."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from avex_export.architectures.efficientnet import PooledConvolution
from avex_export.passes import Target, rewrite
from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import build_probe_from_config, load_probe, save_probe
from tests.export.conftest import LABELS, UNTRAINED, verified
from tests.models.backbones import RATE, effnet, effnet_spec, noise, write_model

# 32 mel bins leave one frequency in the last layer: heads on all layers stay small.
SPEC = effnet_spec(n_mels=32)
STEPS = 4  # of the last layer, of 1 s


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Path of a YAML file; `effnet(seed=5, n_mels=32)` are its weights."""
    return write_model(tmp_path_factory.mktemp("effnet") / "effnet.yml", effnet(seed=5, n_mels=32), SPEC)


@pytest.fixture
def untrained(export, model, labels, tmp_path):
    """Export a random head to ``tmp_path/bundle``; returns what was printed."""

    def run(probe, *options):
        torch.manual_seed(1)
        arguments = ["--probe", probe, "--model", model, "--labels", labels, "--allow-untrained"]
        code, out, err = export(*arguments, "--output", tmp_path / "bundle", *options)
        assert (code, err) == (0, UNTRAINED)
        return out

    return run


# tests/interop/test_recordings.py exports and verifies transformer_all too.
@pytest.mark.parametrize("name", ["mlp_last", pytest.param("transformer_all", marks=pytest.mark.nightly)])
def test_variants_are_verified_on_every_input_in_both_formats(untrained, tmp_path, name):
    out = untrained(name)
    assert "✗" not in out
    checks = verified(tmp_path / "bundle")
    assert len(checks) == 23  # five kinds of clips, noise in three batches, four recordings, and the meta device
    assert "not compared" not in out  # with float64 either
    assert ("noise", STEPS) in checks
    assert {"digital silence", "shapes on device meta"} < {name for name, _ in checks}


def test_a_batch_in_onnx_is_its_rows_and_silence_is_finite(untrained, tmp_path):
    untrained("linear_last", "--format", "onnx")
    wave = torch.cat([noise(STEPS - 1), torch.zeros(1, 16000)]).numpy()
    with open_bundle(tmp_path / "bundle") as engine:
        together = engine.infer(wave)
        assert together["embedding"].shape == (STEPS, 1280)
        for i in range(STEPS):
            alone = engine.infer(wave[i : i + 1])
            for output in ("logits", "embedding"):
                np.testing.assert_allclose(together[output][i], alone[output][0], rtol=1e-4, atol=1e-4)
        assert np.isfinite(together["logits"]).all()


def test_only_tapped_layers_are_left(untrained, tmp_path):
    path = tmp_path / "early.yml"
    path.write_text("probe_type: linear\ntarget_layers: [0, model.features.2.1.block.3.0]\n")
    untrained(path)
    names = {i.name for i in onnx.load(tmp_path / "bundle" / "model.onnx").graph.initializer}
    module = torch.jit.load(tmp_path / "bundle" / "model.torchscript.pt")
    for found in (names, {name for name, _ in module.named_parameters()}):
        assert any("features.2.1.block.3." in name for name in found)
        assert not any(
            "features.3" in name or "model.classifier" in name or "2.1.block.3.1" in name for name in found
        )
    assert read_bundle(tmp_path / "bundle").manifest.output("embedding").shape == (-1, 32 * 16 + 24 * 8)


def test_the_traced_module_names_no_device(untrained, tmp_path):
    untrained("lstm_last", "--format", "torchscript")
    module = torch.jit.load(tmp_path / "bundle" / "model.torchscript.pt")
    assert 'value="cpu"' not in str(module.inlined_graph)


def test_a_fine_tuned_probe_is_saved_without_the_unused_classifier_and_exported(export, model, tmp_path):
    base = effnet(seed=5, n_mels=32)
    config = ProbeConfig(target_layers=["last_layer"], freeze_backbone=False)
    probe = build_probe_from_config(config, 5, "cpu", base_model=base).eval()
    with torch.no_grad():
        base.model.features[0][1].weight.mul_(1.1)
        expected = probe(noise(2))
    save_probe(probe, tmp_path / "tuned", labels=LABELS, model=model, activation="sigmoid")
    assert (tmp_path / "tuned" / "model.safetensors").stat().st_size < 17e6  # 4.0 million parameters, not 5.3
    with torch.no_grad():
        torch.testing.assert_close(load_probe(tmp_path / "tuned")(noise(2)), expected, rtol=0, atol=0)
    code, _, err = export("--probe", tmp_path / "tuned", "--output", tmp_path / "bundle", "--format", "onnx")
    assert (code, err) == (0, "")
    with open_bundle(tmp_path / "bundle") as engine:
        np.testing.assert_allclose(engine.infer(noise(2).numpy())["logits"], expected, rtol=1e-4, atol=1e-4)


def test_means_are_taken_before_tapped_convolutions_of_large_maps_and_norms_folded_where_nothing_is_tapped():
    config = ProbeConfig(target_layers=["all"], aggregation="mean")
    probe = build_probe_from_config(config, 5, "cpu", base_model=effnet(n_mels=32)).eval()
    tapped = sum(layer.endswith(".0") for layer in probe.layers) - 1  # what comes after the last one is left out

    def rewritten(samples, aggregation="mean"):
        special = copy.deepcopy(probe)
        special.aggregation = aggregation
        rewrite(Target((special,), samples))
        parts = list(special.modules())
        pooled = sum(isinstance(part, PooledConvolution) for part in parts)
        return pooled, sum(isinstance(part, nn.BatchNorm2d) for part in parts)

    few, many = rewritten(RATE), rewritten(30 * RATE)
    assert 1 < few[0] < many[0]
    assert (few[1], many[1]) == (tapped - few[0], tapped - many[0])
    assert rewritten(RATE, aggregation="max") == (0, tapped)
