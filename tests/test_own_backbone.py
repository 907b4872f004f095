"""The guide to a backbone of one's own runs as it stands."""

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file

from avex_export.cli import main as export
from avex_serve.configs import ModelSpec
from avex_serve.models.utils import list_model_layers, registry

GUIDE = (Path(__file__).parents[1] / "docs" / "own-backbone.md").read_text()


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The names that the guide's snippets define; they ran in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_MODEL_REGISTRY", dict(registry._MODEL_REGISTRY))
        patch.setattr(registry, "_MODEL_CLASSES", dict(registry._MODEL_CLASSES))
        patch.chdir(tmp_path_factory.mktemp("guide"))
        names = {}
        for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
            exec(compile(code, "own-backbone.md", "exec"), names)
        yield names


def test_the_guide_runs(guide):
    assert list_model_layers(guide["base"])["layers"] == ["mix", "out"]
    assert {detection.label for detection in guide["prediction"].detections} <= {"bat", "bee"}
    assert guide["logits"].shape == (3, 2)
    # The bundle answers as the class and its head do, written out.
    wave = np.random.default_rng(0).uniform(-1, 1, (5, 32000)).astype(np.float32)
    session = onnxruntime.InferenceSession("my_bundle/model.onnx")
    logits, embedding = session.run(["logits", "embedding"], {"waveform": wave})
    with torch.no_grad():
        features = guide["base"](torch.from_numpy(wave)).mean(dim=1)
    np.testing.assert_allclose(embedding, features, atol=1e-5)
    saved = yaml.safe_load(Path("my_probe/probe.yml").read_text())
    assert saved["model"] == "my_model"
    head = load_file("my_probe/model.safetensors")
    np.testing.assert_allclose(logits, features @ head["classifier.weight"].T + head["classifier.bias"], atol=1e-5)


def test_a_registered_module_with_time_first_layers_is_exported_too(guide):
    registry.register_model_class(guide["Plain"])
    plain = guide["Plain"]()
    torch.save(plain.state_dict(), "plain.pt")
    registry.register_model("plain_model", ModelSpec(name="plain"), checkpoint_path="plain.pt")
    probe = guide["build_probe_from_config"](guide["config"], num_classes=2, device="cpu", base_model=plain)
    guide["save_probe"](probe, "plain_probe", labels=["bat", "bee"], model="plain_model", activation="softmax")
    # The exporter compares the formats with the eager module, for batches of several sizes.
    assert export(["--probe", "plain_probe", "--output", "plain_bundle"]) == 0


def test_a_class_that_is_not_registered_is_named(guide, capsys, monkeypatch):
    monkeypatch.delitem(registry._MODEL_CLASSES, "my_network")
    assert export(["--probe", "my_probe", "--output", "other"]) == 4
    assert "Model class 'my_network' is not registered" in capsys.readouterr().err
