"""An architecture is one object: what the exporter does with a backbone is in it, and nowhere else."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import avex_export
from avex_export import architectures
from avex_export.architectures.base import DEAD_LAYERS, Architecture, Pass
from avex_export.architectures.spectra import FRONT_ENDS
from avex_export.graph import Assembly, Graph, export_graph
from avex_export.int8 import refuse_unfit
from avex_export.lengths import check_mask
from avex_export.passes import PASSES, in_order
from avex_export.products import Int8Linear, quantise
from avex_serve.configs import ProbeConfig
from avex_serve.errors import ExportError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import build_probe_from_config
from tests.export.conftest import CLIPS, head
from tests.models.backbones import RATE, noise

PACKAGE = Path(avex_export.__file__).parent
STEP = 100  # samples


class Ladder(ModelBase):
    """A fourth backbone: two linear maps of steps of a clip, and a classifier."""

    def __init__(self):
        super().__init__(audio_config={"sample_rate": RATE, "representation": "raw", "target_length_seconds": 1})
        self.steps = nn.ModuleList([nn.Linear(STEP, 48), nn.Linear(48, 48)])
        self.classifier = nn.Linear(48, 3)

    def forward(self, x, padding_mask=None):
        x = x.unflatten(1, (-1, STEP))
        for step in self.steps:
            x = step(x)
        return x if self.classifier is None else self.classifier(x)


def drop_classifier(target):
    target.model.classifier = None
    return True


def double_twice(target):
    """Fold a factor of 2 into the first map, and of 1/2 into the second."""
    first, second = target.model.steps
    with torch.no_grad():
        first.weight.mul_(2), first.bias.mul_(2), second.weight.div_(2)
    return True


DOUBLING = Pass("doubling", "double, and halve again")
LADDER = Architecture(
    name="Ladder",
    backbone=Ladder,
    passes={DEAD_LAYERS: drop_classifier, **FRONT_ENDS, DOUBLING: double_twice},
    network="steps.0",
    blocks="steps",
    refusals={"--padding-mask": "Ladder has no use for one"},
)


@pytest.fixture
def assembly():
    torch.manual_seed(0)
    probe = build_probe_from_config(ProbeConfig(target_layers=["steps.1"]), 5, "cpu", base_model=Ladder().eval())
    return Assembly((head(probe.eval()),), "ladder", None, "CC0", CLIPS)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*architectures.ARCHITECTURES, LADDER))


def test_a_fourth_backbone_exports_without_an_architecture_but_is_not_rewritten(assembly):
    graph = export_graph(assembly)
    assert graph.passes == ()
    assert graph.probes[0].base_model.classifier is not None
    with pytest.raises(ExportError, match="half precision is for BEATs, EAT and EfficientNet"):
        export_graph(assembly, half=True)
    with pytest.raises(ExportError, match="int8 is for BEATs and EAT, not Ladder; leave out --quantize"):
        refuse_unfit(assembly, ["onnx"])


@pytest.mark.usefixtures("registered")
def test_one_object_makes_a_fourth_backbone_known(assembly):
    wave = noise(2)
    with torch.no_grad():
        expected = assembly.probe(wave)
        graph = export_graph(assembly)
        assert graph.passes == ("dead-layers", "doubling")
        assert graph.probes[0].base_model.classifier is None
        torch.testing.assert_close(graph(wave)[0], expected)
        assert export_graph(assembly, without=["doubling"]).passes == ("dead-layers",)

        half = export_graph(assembly, half=True)
        assert {tensor.dtype for tensor in half.parameters()} == {torch.float16}
        torch.testing.assert_close(half(wave)[0].float(), expected, rtol=0, atol=1e-2)

        refuse_unfit(assembly, ["onnx"])
        assert isinstance(graph, Graph)
        assert quantise(graph, noise(8)) == 2
        assert sum(isinstance(part, Int8Linear) for part in graph.modules()) == 2
        torch.testing.assert_close(graph(wave)[0], expected, rtol=0, atol=2e-2)
    with pytest.raises(ExportError, match="--padding-mask: Ladder has no use for one; leave it out"):
        check_mask(assembly.probes, RATE)


def test_the_list_of_passes_keeps_the_order_of_each_architecture():
    listed = in_order((*architectures.ARCHITECTURES, LADDER))
    assert set(listed) == {*PASSES, DOUBLING}
    assert len({each.name for each in listed}) == len(listed)
    for architecture in (*architectures.ARCHITECTURES, LADDER):
        assert [each for each in listed if each in architecture.passes] == list(architecture.passes)


def test_no_other_module_of_the_exporter_knows_a_backbone():
    modules = {f"avex_serve.models.{name}" for name in ("beats_model", "eat_hf", "efficientnet")}
    classes = {each.backbone.__name__ for each in architectures.ARCHITECTURES}
    assert {"BEATsModel", "EATModel", "EfficientNetModel"} <= classes
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "architectures":
            continue
        source = path.read_text("utf-8")
        assert not any(name in source for name in classes), path
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        assert not modules & imported, path
