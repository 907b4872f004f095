"""Several probes on one backbone, and the backbone without heads."""

import contextlib
import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from avex_export.assemble import assemble
from avex_export.cli import main
from avex_export.graph import Assembly, Head, OnePassGraph, export_graph
from avex_export.recipes import find_recipe
from avex_export.request import ExportRequest, read_probes
from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main as serve
from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import build_probe_from_config, save_probe
from avex_serve.models.utils.load import load_model
from tests.bundles import replace_file
from tests.export.conftest import CLIPS
from tests.models.backbones import RATE, effnet, noise, tiny_beats, tiny_eat, tiny_spec, write_model

NAMES = ("birds", "frogs", "calls")
CONFIGS = {
    "birds": ProbeConfig(probe_type="linear", target_layers=["last_layer"], aggregation="mean"),
    "frogs": ProbeConfig(probe_type="mlp", hidden_dims=[8], target_layers=["all"], aggregation="mean"),
    "calls": ProbeConfig(
        probe_type="lstm",
        target_layers=["last_layer"],
        aggregation="none",
        input_processing="sequence",
        lstm_hidden_size=8,
        num_layers=1,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    """Three trained probes on the tiny BEATs: their probes, and themselves."""
    root, backbone, probes = tmp_path_factory.mktemp("saved"), tiny_beats(seed=5), {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        probe = build_probe_from_config(config, i + 2, "cpu", base_model=backbone).eval()
        with torch.no_grad():
            for parameter in probe.head_state().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_probe(
            probe, root / name, labels=[f"{name} {k}" for k in range(i + 2)], model=model, activation="sigmoid"
        )
        probes[name] = probe
    return root, probes


def asked_for(root, names):
    return [part for name in names for part in ("--probe", root / name)]


@pytest.fixture(scope="module")
def bundle(made_once, saved, one_operator_table):
    """All three in one bundle, in each format."""
    formats = ["--format", "onnx", "--format", "torchscript", "--format", "pt2"]

    def make(folder):
        assert main([str(a) for a in (*asked_for(saved[0], NAMES), *formats, "--output", folder)]) == 0

    return made_once("three probes", make)


@pytest.mark.parametrize("format_", ["onnx", "torchscript"])
def test_each_head_answers_as_its_probe(bundle, saved, format_, monkeypatch):
    if format_ == "torchscript":
        monkeypatch.setattr("avex_serve.inference.backend.ONNX", "none")
    wave = noise(2)
    with open_bundle(bundle, "cpu") as engine:
        assert engine.backend.format == format_
        found = engine.infer(wave.numpy())
    with torch.no_grad():
        for name, probe in saved[1].items():
            features, padding = probe.combine(wave)
            embedding = next(p.embedding for p in read_bundle(bundle).manifest.probes if p.name == name)
            expected = {
                f"{name}.logits": probe.classify(features, padding),
                embedding: probe.pool(features, padding),
            }
            for output, value in expected.items():
                np.testing.assert_allclose(found[output], value, atol=1e-4 * max(1.0, float(value.abs().max())))


def test_the_manifest_says_what_each_head_is(bundle, saved):
    read = read_bundle(bundle)
    manifest = read.manifest
    assert manifest.name == "tiny-probes"
    assert [probe.name for probe in manifest.probes] == list(NAMES)
    assert [probe.classes for probe in manifest.probes] == [2, 3, 4]
    assert read.labels == {name: probe.labels or read.labels[name] for name, probe in saved[1].items()}
    assert read.labels["frogs"] == ("frogs 0", "frogs 1", "frogs 2")
    outputs = {spec.name: spec.shape for spec in manifest.outputs}
    # The sequence's mean and the mean of the same layer are two things that happen to be equal.
    assert outputs == {
        "birds.logits": (-1, 2),
        "frogs.logits": (-1, 3),
        "calls.logits": (-1, 4),
        "birds.embedding": (-1, 32),
        "frogs.embedding": (-1, 96),
        "calls.embedding": (-1, 32),
    }
    assert [info.output for info in manifest.embeddings] == list(outputs)[3:]


def test_the_backbone_is_in_the_graph_once(bundle, saved, tmp_path, export):
    def products(path):
        return sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load(path).graph.node)

    code, _, _ = export("--probe", saved[0] / "frogs", "--format", "onnx", "--output", tmp_path / "one")
    assert code == 0
    # Beside the linear head: an LSTM, its last linear map, and the means that are not taken before the last product.
    assert products(bundle / "model.onnx") <= products(tmp_path / "one" / "model.onnx") + 4


def test_its_evidence_and_card_name_each_head(bundle, capsys):
    assert serve(["verify", str(bundle)]) == 0
    out = capsys.readouterr().out
    checks = json.loads((bundle / "verification.json").read_text())["checks"]
    for name in NAMES:
        assert f"\n{name}:\n" in f"\n{out}"
        of_it = [check for check in checks if check["part"] == name]
        assert {check["format"] for check in of_it} == {"onnx", "torchscript", "pt2"}
        assert all(
            check["passed"] and set(check["errors"]) in ({"logits", "embedding"}, {"scores", "embedding"})
            for check in of_it
        )
    card = (bundle / "README.md").read_text("utf-8")
    for line in ("- `birds`, a linear probe", "- `frogs`, an MLP probe", "- `calls`, an LSTM probe"):
        assert line in card
    assert "OpenSoundscape (`pip install 'opensoundscape[onnx]'`), which runs only the first probe, `birds`:" in card


def test_a_head_that_answers_otherwise_is_found(bundle, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    graph = onnx.load(other / "model.onnx")
    for tensor in graph.graph.initializer:
        if "probes.1" in tensor.name and tensor.name.endswith("bias"):
            moved = onnx.numpy_helper.to_array(tensor) + np.float32(0.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, tensor.name))
    replace_file(other, "model.onnx", graph.SerializeToString())
    assert serve(["verify", str(other)]) == 5
    out = capsys.readouterr().out
    sections = {name: out.split(f"\n{name}:\n" if name != "birds" else "birds:\n")[1] for name in NAMES}
    assert "✗" in sections["frogs"].split("\n\n")[0]
    assert "✗" not in sections["birds"].split("\n\n")[0]


@pytest.mark.parametrize("make", [effnet, tiny_eat], ids=["efficientnet", "eat"])
def test_other_backbones(make):
    options = {"n_mels": 32} if make is effnet else {}
    backbone = make(**options)
    probes = []
    for name, layers in (("last", "last_layer"), ("all", "all")):
        probe = build_probe_from_config(
            ProbeConfig(target_layers=[layers], aggregation="mean"), 5, "cpu", base_model=backbone
        ).eval()
        probes.append((name, probe))
    wave = noise(2)
    with torch.no_grad():
        expected = {name: probe(wave) for name, probe in probes}
    heads = tuple(Head(name, probe, tuple("abcde"), "sigmoid", True, None, None) for name, probe in probes)
    graph = export_graph(Assembly(heads, "own", None, "CC0", CLIPS))
    assert isinstance(graph, OnePassGraph)
    found = dict(zip(graph.outputs, graph(wave), strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}.logits"], value, rtol=0, atol=1e-4 * float(value.abs().max()))


# -- the backbone alone --------------------------------------------------------------------------------------------


def test_embeddings_of_the_backbone_feed_heads_that_are_served_alone(tmp_path, export, saved):
    root, probes = saved
    names = ("birds", "calls")
    code, out, _ = export("--embeddings", *asked_for(root, names), "--format", "onnx", "--output", tmp_path / "base")
    assert code == 0, out
    wave = noise(3)
    manifest = read_bundle(tmp_path / "base").manifest
    assert (manifest.name, manifest.probes) == ("tiny-embeddings", ())
    with open_bundle(tmp_path / "base") as base:
        answered = base.infer(wave.numpy())
        assert serve(["verify", str(tmp_path / "base")]) == 0
    for name, shape in (("birds", "32"), ("calls", "8,32")):
        export("--probe", root / name, "--offline", "--input-dim", shape, "--output", tmp_path / name)
        with open_bundle(tmp_path / name) as head, torch.no_grad():
            (output,) = [info for info in manifest.embeddings if info.output == f"{name}.embedding"]
            assert output.fingerprint == head.manifest.probes[0].input_fingerprint is not None
            logits = head.infer(answered[output.output])["logits"]
            np.testing.assert_allclose(logits, probes[name](wave), atol=1e-4)


def test_embeddings_need_no_weights_or_labels_of_a_head(tmp_path, export, model):
    code, _, _ = export("--embeddings", "--model", model, "--format", "onnx", "--output", tmp_path / "base")
    assert code == 0
    manifest = read_bundle(tmp_path / "base").manifest
    assert [spec.name for spec in manifest.outputs] == ["embedding"]
    assert not list((tmp_path / "base").glob("*labels.json"))
    card = (tmp_path / "base" / "README.md").read_text("utf-8")
    assert "## Labels" not in card
    assert "aggregated by mean\n" in card
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "base" / "model.onnx").metadata_props}
    assert metadata["embedding_outputs_key"] == "embedding"
    assert "classes" not in metadata


def test_embeddings_merged_by_the_weights_of_a_state_dict(tmp_path, export, model):
    config = find_recipe("lstm_all").config
    probe = build_probe_from_config(config, 3, "cpu", base_model=tiny_beats(seed=5)).eval()
    with torch.no_grad():
        probe.layer_weights.copy_(torch.arange(len(probe.layer_weights)))
    torch.save(probe.state_dict(), tmp_path / "head.pt")
    asked = ("--embeddings", "--probe", "lstm_all", "--model", model, "--weights", tmp_path / "head.pt")
    code, _, err = export(*asked, "--format", "onnx", "--output", tmp_path / "base")
    assert (code, err) == (0, "")
    wave = noise(2)
    with open_bundle(tmp_path / "base") as base, torch.no_grad():
        np.testing.assert_allclose(base.infer(wave.numpy())["embedding"], probe.combine(wave)[0], atol=1e-4)
    torch.save({"layer_weights": torch.zeros(9)}, tmp_path / "head.pt")
    code, _, err = export(*asked, "--output", tmp_path / "other")
    assert (code, "layer_weights is (9,)" in err) == (4, True)


def test_embeddings_that_are_merged_by_trained_weights_need_them(tmp_path, export, model):
    code, _, err = export("--embeddings", "--probe", "lstm_all", "--model", model, "--output", tmp_path / "base")
    assert code == 4
    assert "merges its layers by weights that are trained with the head" in err


# -- what doesn't go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--offline", "--input-dim", "32"], "--offline exports one head"),
        (["--weights", "w.safetensors"], "--weights is for one probe"),
        (["--labels", "l.txt"], "--labels would name the classes of every probe, and saved ones have their own"),
        (["--embeddings", "--offline"], "--offline is for heads, which --embeddings leaves out"),
        (["--embeddings", "--labels", "l.txt"], "--labels is for heads"),
        (["--embeddings", "--activation", "softmax"], "--activation is for heads"),
        (["--name", "a/b"], "--name 'a/b': expected letters"),
        (["--bundle-version", "1 2"], "--bundle-version '1 2': expected letters"),
    ],
)
def test_options_that_make_no_sense(tmp_path, export, saved, options, message):
    code, _, err = export(*asked_for(saved[0], ("birds", "frogs")), *options, "--output", tmp_path / "b")
    assert code == 2
    assert message in err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify-audio", "a.wav"], "--verify-audio is for audio"),
        (["--without", "pooling"], "--without is for passes"),
        (["--explain"], "--explain is for passes"),
        (["--profile"], "--profile is for passes"),
    ],
)
def test_options_that_a_head_alone_has_no_use_for(tmp_path, export, saved, options, message):
    asked = asked_for(saved[0], ("birds",))
    code, _, err = export(*asked, "--offline", "--input-dim", 32, *options, "--output", tmp_path / "b")
    assert (code, message in err) == (2, True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_without_onnx_nothing_is_said_to_run_without_torch(tmp_path, export, saved, format):
    code, out, _ = export(*asked_for(saved[0], ("birds",)), "--format", format, "--output", tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text("utf-8")
    assert code == 0
    assert "OpenSoundscape" not in card
    assert "without torch" not in card
    served = format == "torchscript"
    assert ("serve it:" in out, "bentoml serve" in card, "avex-serve verify" in card) == (served,) * 3
    if not served:
        answered = {}
        with contextlib.chdir(tmp_path / "b"):
            exec(card.split("```python\n")[1].split("```")[0], answered)
        assert [tuple(output.shape) for output in answered["outputs"]] == [(2, 2), (2, 32)]
        assert "# logits, embedding\n" in card


def test_probes_of_the_same_name(tmp_path, export, saved):
    code, _, err = export(*asked_for(saved[0], ("birds", "birds")), "--output", tmp_path / "b")
    assert (code, "two are called birds" in err) == (2, True)


def test_a_probe_without_labels_beside_a_saved_one(tmp_path, export, saved, model):
    asked = (*asked_for(saved[0], ("birds",)), "--probe", "linear_last", "--allow-untrained")
    code, _, err = export(*asked, "--model", model, "--output", tmp_path / "b")
    for remedy in ("save_probe() and its labels", "by itself"):
        assert (code, remedy in err) == (4, True)


def test_probes_on_different_backbones(tmp_path, export, saved):
    other = write_model(tmp_path / "other.yml", tiny_beats(seed=6), tiny_spec(), licence="CC0-1.0")
    probe = build_probe_from_config(CONFIGS["birds"], 2, "cpu", base_model=load_model(other)).eval()
    save_probe(probe, tmp_path / "foreign", labels=["a", "b"], model=other, activation="sigmoid")
    code, _, err = export("--probe", saved[0] / "birds", "--probe", tmp_path / "foreign", "--output", tmp_path / "b")
    assert code == 4
    assert "birds belongs to the backbone tiny, foreign to other; a bundle has one backbone" in err


def test_probes_that_hear_clips_of_different_lengths(tmp_path, export, saved, model):
    backbone = tiny_beats(seed=5)
    probe = build_probe_from_config(CONFIGS["birds"], 2, "cpu", base_model=backbone, target_length=RATE // 2).eval()
    save_probe(probe, tmp_path / "short", labels=["a", "b"], model=model, activation="sigmoid")
    arguments = ["--probe", saved[0] / "birds", "--probe", tmp_path / "short", "--format", "onnx"]
    code, _, err = export(*arguments, "--output", tmp_path / "b")
    assert code == 4
    assert "different lengths (birds 1 s, short 0.5 s); give --clip-seconds" in err
    assert export(*arguments, "--output", tmp_path / "b", "--clip-seconds", "0.5")[0] == 0


def test_a_bundle_has_the_name_and_version_that_it_is_given(tmp_path, export, saved):
    code, _, _ = export(
        "--probe",
        saved[0] / "birds",
        "--offline",
        "--input-dim",
        32,
        "--format",
        "onnx",
        "--output",
        tmp_path / "b",
        "--name",
        "dawn",
        "--bundle-version",
        "2.1",
    )
    manifest = read_bundle(tmp_path / "b").manifest
    assert (code, manifest.name, manifest.version) == (0, "dawn", "2.1")
    assert manifest.probes[0].name == "birds"


def test_int8_of_several_heads(tmp_path, export, saved):
    code, out, err = export(
        *asked_for(saved[0], ("birds", "frogs")),
        "--format",
        "onnx",
        "--quantize",
        "int8",
        "--output",
        tmp_path / "b",
    )
    assert code == 0, err
    agreement = read_bundle(tmp_path / "b").manifest.quantisation.agreement
    assert "same decisions" in out
    assert agreement.decisions >= 0.98


def test_one_request_makes_one_assembly(saved):
    request = ExportRequest(probe=tuple(str(saved[0] / name) for name in NAMES))
    assembly = assemble(request, read_probes(request))
    assert len({id(probe.base_model) for probe in assembly.probes}) == 1
    assert assembly.trained
