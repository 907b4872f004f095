"""Graphs for clips of any length, and with a padding mask: what the probe answers at each, or a reason why not."""

import copy
import re

import numpy as np
import pytest
import torch

from avex_export.architectures.base import Target
from avex_export.cases import example_inputs
from avex_export.formats import write_torchscript
from avex_export.graph import Assembly, Graph, Head, OnePassGraph, export_graph
from avex_export.passes import PASSES, rewrite
from avex_serve import open_bundle
from avex_serve.bundles.manifest import AudioSpec
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main as serve
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.errors import TensorError
from avex_serve.inference.torch import TorchBackend
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import build_probe_from_config, save_probe
from avex_serve.models.utils import registry
from tests.export.conftest import LABELS, verified, with_one_format
from tests.models.backbones import RATE, effnet, effnet_spec, noise, tiny_beats, tiny_eat, tiny_eat_spec, write_model

AUDIO = AudioConfig(sample_rate=RATE, representation="raw", target_length_seconds=1)
PATCH = 2800  # samples of one patch of BEATs
SPECTRUM = 401  # samples that EfficientNet's spectrogram takes, one more than it reflects
HEADS = {"num_heads": 2, "attention_dim": 8, "num_layers": 1}
SMALL = {"lstm_hidden_size": 8, "num_layers": 1}
EXCLUDE = {"extra_config": {"exclude_padding": True}}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, model):
    """Paths of the YAML files, and the models with their weights."""
    folder = tmp_path_factory.mktemp("backbones")
    net, eat = effnet(seed=5, n_mels=32), tiny_eat(seed=5)
    return {
        "beats": (model, tiny_beats(seed=5)),
        "efficientnet": (write_model(folder / "net.yml", net, effnet_spec(n_mels=32)), net),
        "eat": (write_model(folder / "eat.yml", eat, tiny_eat_spec()), eat),
    }


@pytest.fixture
def trained(tmp_path, backbones):
    """Write a saved probe on a backbone and return it with its folder."""

    def save(name, probe_type="linear", target_layers=("last_layer",), **fields):
        path, base = backbones[name]
        config = ProbeConfig(probe_type=probe_type, target_layers=list(target_layers), **fields)
        torch.manual_seed(1)
        probe = build_probe_from_config(config, 5, "cpu", base_model=copy.deepcopy(base)).eval()
        with torch.no_grad():
            for parameter in probe.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        save_probe(probe, tmp_path / "probe", labels=LABELS, model=path, activation="sigmoid")
        return probe, tmp_path / "probe"

    return save


@torch.no_grad()
def same_as_eager(engine, probe, wave, mask=None):
    features, padding = probe.combine(wave, mask)
    found = engine.infer(wave.numpy(), None if mask is None else mask.numpy())
    expected = {"logits": probe.classify(features, padding), "embedding": probe.pool(features, padding)}
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-4 * scale)


def suffix_mask(samples, *lengths):
    return torch.arange(samples)[None] >= torch.tensor(lengths)[:, None]


ANY_LENGTH = [
    pytest.param("beats", PATCH, {}, marks=pytest.mark.nightly),  # a simpler head on the same backbone as the next
    ("beats", PATCH, {"probe_type": "transformer", "target_layers": ["all"], "aggregation": "none"} | HEADS),
    (
        "efficientnet",
        SPECTRUM,
        {"probe_type": "lstm", "target_layers": [3, "last_layer"], "aggregation": "none"} | SMALL,
    ),
]


@pytest.mark.parametrize(("name", "shortest", "fields"), ANY_LENGTH, ids=str)
def test_clips_of_any_length_are_answered_as_the_probe_does(
    tmp_path, export, trained, capsys, name, shortest, fields
):
    probe, folder = trained(name, **fields)
    output = tmp_path / "bundle"
    code, out, err = export("--probe", folder, "--output", output, "--dynamic-length")
    assert (code, err) == (0, "")
    assert "✗" not in out
    names = {"the shortest clips", "shorter clips", "longer clips", "shapes on device meta"}
    assert names < {name for name, _ in verified(output)}
    manifest = read_bundle(output).manifest
    assert (manifest.audio.window_samples, manifest.audio.shortest_samples) == (RATE, shortest)
    assert [spec.shape for spec in manifest.inputs] == [(-1, -1)]
    card = (output / "README.md").read_text()
    assert f"clips of any length from {shortest} samples" in card
    assert "OpenSoundscape" in card
    assert "fills up the last clip of a recording with zeros" in card
    for form in ("onnx", "torchscript"):
        one = with_one_format(output, form, tmp_path / form)
        with open_bundle(one, "cpu") as engine:
            assert engine.backend.format == form
            for samples in (shortest, shortest + 161, RATE, 2 * RATE + 77):
                for rows in (1, 3):
                    same_as_eager(engine, probe, noise(rows, seed=samples, seconds=samples / RATE))
            with pytest.raises(TensorError, match=f"expected at least {shortest}"):
                engine.infer(np.zeros((1, shortest - 1), np.float32))
            wave = noise(1, seconds=1.4)  # a window, and what is left at its own length
            with torch.no_grad():
                expected = torch.cat([probe(wave[:, :RATE]), probe(wave[:, RATE:])]).sigmoid()
            np.testing.assert_allclose(engine.score(wave[0].numpy(), RATE).scores, expected, rtol=0, atol=1e-4)
        assert serve(["verify", str(one), "--full"]) == 0
        assert capsys.readouterr().out.count("✓") == 17  # 6 batches of other lengths beside the 11 of windows


MASKED = [
    ("beats", {}, []),
    ("beats", EXCLUDE, ["--dynamic-length"]),
    ("beats", {"probe_type": "attention", "target_layers": ["all"], "aggregation": "none"} | HEADS | EXCLUDE, []),
    ("eat", EXCLUDE, []),
]


@pytest.mark.parametrize(("name", "fields", "options"), MASKED, ids=str)
def test_padded_clips_are_answered_as_the_probe_does_with_their_mask(
    tmp_path, export, trained, capsys, name, fields, options
):
    probe, folder = trained(name, **fields)
    output = tmp_path / "bundle"
    code, out, err = export("--probe", folder, "--output", output, "--padding-mask", *options)
    assert (code, err) == (0, "")
    assert "✗" not in out
    assert "padded clips" in {name for name, _ in verified(output)}
    manifest = read_bundle(output).manifest
    assert [(spec.name, spec.dtype) for spec in manifest.inputs] == [
        ("waveform", "float32"),
        ("padding_mask", "bool"),
    ]
    card = (output / "README.md").read_text()
    assert "`padding_mask`" in card
    assert "OpenSoundscape" not in card
    wave, mask = noise(3), suffix_mask(RATE, RATE, 9000, 3000)
    wave[mask] = 0.0
    with torch.no_grad():
        assert (probe(wave, mask) - probe(wave))[1:].abs().max() > 1e-3
    for form in ("onnx", "torchscript"):
        one = with_one_format(output, form, tmp_path / form)
        with open_bundle(one, "cpu") as engine:
            assert engine.backend.format == form
            same_as_eager(engine, probe, wave, mask)
            same_as_eager(engine, probe, noise(2))
            if not options:  # a recording that doesn't fill its window
                with torch.no_grad():
                    expected = probe(wave[1:2], mask[1:2]).sigmoid()
                found = engine.score(wave[1, :9000].numpy(), RATE).scores
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert serve(["verify", str(one), "--full"]) == 0
        assert "padded clips" in capsys.readouterr().out


def test_passes_are_applied_to_clips_of_any_length(export, model, labels):
    arguments = ["--probe", "linear_last", "--model", model, "--labels", labels, "--allow-untrained"]
    told = []
    for options in ([], ["--dynamic-length"]):
        code, out, _ = export("--explain", *arguments, *options)
        assert code == 0
        told.append(out)
    assert told[0] == told[1]
    assert told[1].count("[applied]") == 6


@pytest.mark.parametrize("name", ["beats", "efficientnet"])
def test_every_pass_can_be_left_out_of_clips_of_any_length(backbones, name):
    config = ProbeConfig(target_layers=["all" if name == "beats" else "last_layer"], aggregation="mean")
    probe = build_probe_from_config(config, 5, "cpu", base_model=backbones[name][1]).eval()
    waves = [noise(2, seconds=seconds) for seconds in (0.2, 0.7, 2.3)]
    for without in [(), *([each.name] for each in PASSES), [each.name for each in PASSES]]:
        special = copy.deepcopy(probe)
        rewrite(Target((special,), RATE, any_length=True), without)
        with torch.no_grad():
            for wave in waves:
                torch.testing.assert_close(special(wave), probe(wave), rtol=0, atol=1e-4)


REFUSED = [
    ("eat", {}, ["--dynamic-length"], "EAT cuts or fills every clip to one length itself"),
    ("eat", {}, ["--padding-mask"], 'no difference to a probe on EAT; .*{"exclude_padding": true}'),
    ("efficientnet", {}, ["--padding-mask"], "EfficientNet can't use one"),
    (
        "beats",
        {"aggregation": "none", "input_processing": "flatten"},
        ["--dynamic-length"],
        r"clips of 16000 samples, but not of 2800: embeddings of shape .* aggregate; give --clip-seconds",
    ),
    (
        "beats",
        {"probe_type": "lstm", "aggregation": "none", "use_positional_encoding": True, **SMALL},
        ["--dynamic-length"],
        "positions for 1000 steps",
    ),
    (
        "beats",
        {"probe_type": "lstm", "aggregation": "none", **SMALL, **EXCLUDE},
        ["--padding-mask"],
        "an LSTM that excludes padding",
    ),
    ("beats", {}, ["--padding-mask", "--quantize", "int8"], "not calibrated for padded clips"),
    (
        "beats",
        {},
        ["--clip-seconds", "0.1"],
        r"1600 samples \(0.1 s\) is too short: .* BEATs takes has 2800; .* 0.175",
    ),
    ("efficientnet", {}, ["--clip-seconds", "0.02"], "EfficientNet takes has 401; give --clip-seconds 0.0250625"),
    ("eat", {}, ["--clip-seconds", "0.02"], "EAT takes has 400; give --clip-seconds 0.025 or more"),
]


@pytest.mark.parametrize(("name", "fields", "options", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_told_with_the_reason(tmp_path, export, trained, name, fields, options, message):
    _, folder = trained(name, **fields)
    code, _, err = export("--probe", folder, "--output", tmp_path / "bundle", *options)
    assert code == 4
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("option", ["--dynamic-length", "--padding-mask"])
def test_a_head_alone_has_no_clips(export, option):
    code, _, err = export("--probe", "linear_last", "--offline", option)
    assert code == 2
    assert f"{option} is for audio" in err


def test_a_pt2_program_is_bound_to_lengths(export):
    code, _, err = export("--probe", "linear_last", "--dynamic-length", "--format", "pt2")
    assert code == 2
    assert "--dynamic-length is for ONNX and TorchScript" in err


class Hops(ModelBase):
    """A network of one's own, for clips of any length from a frame of 25 ms on."""

    name = "hops"

    def __init__(self, device="cpu", audio_config=None):
        super().__init__(device=device, audio_config=audio_config)
        self.frames = torch.nn.Conv1d(1, 8, 400, stride=160)
        self.mix = torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.mix(self.frames(x[:, None]).transpose(1, 2))


class Late(Hops):
    """One that looks for something far into the clip."""

    name = "late"

    def forward(self, x):
        return super().forward(x) + x[:, 9000, None, None]


class Steps(ModelBase):
    """One for clips of whole steps of 1000 samples, which honours a mask."""

    name = "steps"

    def __init__(self, device="cpu", audio_config=None):
        super().__init__(device=device, audio_config=audio_config)
        self.embed, self.mix = torch.nn.Linear(1000, 8), torch.nn.Linear(8, 6)

    def forward(self, x, padding_mask=None):
        steps = self.embed(x.unflatten(1, (-1, 1000)))
        if padding_mask is not None:
            steps = steps.masked_fill(padding_mask.unflatten(1, (-1, 1000)).all(dim=-1, keepdim=True), 0)
        return self.mix(steps)


@pytest.fixture
def own(export, labels, tmp_path, monkeypatch):
    """Export a random head on a class, a network of one's own."""

    def run(cls, *options):
        monkeypatch.setattr(registry, "_MODEL_CLASSES", registry._MODEL_CLASSES | {cls.name: cls})
        torch.manual_seed(0)
        write_model(tmp_path / "own.yml", cls(audio_config=AUDIO), ModelSpec(name=cls.name, audio_config=AUDIO))
        arguments = ["--probe", "linear_last", "--model", tmp_path / "own.yml", "--labels", labels]
        return export(*arguments, "--allow-untrained", "--output", tmp_path / "bundle", *options)

    return run


def test_a_network_of_ones_own_for_clips_of_any_length(tmp_path, own):
    code, out, _ = own(Hops, "--dynamic-length")
    assert code == 0
    assert "✗" not in out
    assert read_bundle(tmp_path / "bundle").manifest.audio.shortest_samples == 400
    with open_bundle(tmp_path / "bundle") as engine:
        short = engine.score(noise(1)[0, :5000].numpy(), RATE).scores
        assert np.abs(short - engine.score(noise(1)[0].numpy(), RATE).scores).max() > 1e-4


def test_a_network_of_ones_own_that_honours_a_mask(tmp_path, own):
    code, out, _ = own(Steps, "--padding-mask")
    assert code == 0
    assert "✗" not in out
    assert "padded clips" in {name for name, _ in verified(tmp_path / "bundle")}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Steps, ["--dynamic-length"], "clips of 16000 samples, but not of 1001: .*; give --clip-seconds"),
        (Hops, ["--padding-mask"], "Hops doesn't take one"),
        (Late, ["--clip-seconds", "0.5"], "index 9000 is out of bounds"),
        (Hops, ["--clip-seconds", "0.02"], "Kernel size can't be greater than actual input size"),
    ],
    ids=str,
)
def test_what_a_network_of_ones_own_cannot_is_told_with_its_error(tmp_path, own, cls, options, message):
    code, _, err = own(cls, *options)
    assert code == 4
    assert re.search(message, err), err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("options", [[], pytest.param(["--dynamic-length"], marks=pytest.mark.nightly)], ids=str)
def test_several_probes_use_the_mask_each_in_its_way(tmp_path, export, trained, options):
    probes, folders = [], []
    for name, fields in (("plain", {}), ("excluding", EXCLUDE)):
        probe, folder = trained("beats", **fields)
        probes.append(probe)
        folders += ["--probe", folder.rename(tmp_path / name)]
    code, out, _ = export(
        *folders, *("--output", tmp_path / "bundle", "--padding-mask", "--format", "onnx", *options)
    )
    assert code == 0
    assert "✗" not in out
    samples = 12000 if options else RATE
    wave, mask = noise(3, seconds=samples / RATE), suffix_mask(samples, samples, 7000, 3000)
    with torch.no_grad(), open_bundle(tmp_path / "bundle") as engine:
        found = engine.infer(wave.numpy(), mask.numpy())
        for name, probe in zip(("plain", "excluding"), probes, strict=True):
            np.testing.assert_allclose(found[f"{name}.logits"], probe(wave, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kinds", "graph_class"), [([{}, EXCLUDE], Graph), ([EXCLUDE, EXCLUDE], OnePassGraph)], ids=["differ", "alike"]
)
def test_several_probes_on_padded_clips_of_any_length(tmp_path, backbones, kinds, graph_class):
    heads = []
    for name, fields, layer in zip(("a", "b"), kinds, (0, "last_layer"), strict=True):
        config = ProbeConfig(target_layers=[layer], aggregation="mean", **fields)
        torch.manual_seed(len(heads))
        probe = build_probe_from_config(config, 5, "cpu", base_model=backbones["beats"][1]).eval()
        heads.append(Head(name, probe, LABELS, "sigmoid", True, None, None))
    audio = AudioSpec(sample_rate=RATE, window_samples=RATE, shortest_samples=PATCH)
    assembly = Assembly(tuple(heads), "tiny", None, "CC0", audio, takes_padding_mask=True)
    graph = export_graph(assembly)
    assert type(graph) is graph_class
    write_torchscript(graph, example_inputs(assembly, 2), tmp_path / "graph.pt")
    backend = TorchBackend(tmp_path / "graph.pt", list(graph.outputs), "cpu")
    for samples in (PATCH + 161, 12000, 2 * RATE + 77):
        wave, mask = noise(3, seconds=samples / RATE), suffix_mask(samples, samples, samples - 90, PATCH)
        found = backend.run(wave.numpy(), mask.numpy())
        with torch.no_grad():
            for each in heads:
                expected = each.probe(wave, mask)
                np.testing.assert_allclose(found[f"{each.name}.logits"], expected, rtol=0, atol=1e-4)


def test_sequences_are_no_embeddings_of_clips_of_any_length(tmp_path, export, trained):
    _, folder = trained("beats", "lstm", aggregation="none", **SMALL)
    arguments = ["--embeddings", "--probe", folder, "--output", tmp_path / "bundle", "--dynamic-length"]
    code, _, err = export(*arguments)
    assert code == 4
    assert "would be sequences of any length" in err
