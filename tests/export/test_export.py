import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import avex_serve
from avex_export.cases import make_cases
from avex_export.cli import main
from avex_export.graph import Assembly, eager_graph
from avex_export.recipes import variants
from avex_serve import open_bundle
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main as serve
from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import build_probe_from_config, save_probe
from avex_serve.service.settings import Settings
from tests.export.conftest import CLIPS, LABELS, UNTRAINED, head, trained_probe, verified, with_one_format
from tests.models.backbones import RATE, noise, tiny_beats

VARIANTS = sorted(variants())
HEAD_ALONE = ("--offline", "--input-dim", "32", "--format", "onnx")
ALONE = ["--probe", "linear_last", "--offline", "--input-dim", "128", "--format", "onnx"]


@pytest.fixture
def trained(tmp_path, model):
    """Write a saved probe of a recipe's kind and return it with its folder."""

    def save(name="linear_last", **changes):
        probe = trained_probe(name, **changes)
        save_probe(probe, tmp_path / name, labels=LABELS, model=model, activation="sigmoid")
        return probe, tmp_path / name

    return save


def same_as_eager(engine, probe, wave):
    with torch.no_grad():
        features, padding = probe.combine(wave)
        expected = {"logits": probe.classify(features, padding), "embedding": probe.pool(features)}
    found = engine.infer(wave.numpy())
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert np.abs(found[name] - value.numpy()).max() <= 1e-4 * scale


def test_there_are_ten_variants():
    kinds = ("attention", "linear", "lstm", "mlp", "transformer")
    assert [f"{kind}_{layers}" for kind in kinds for layers in ("all", "last")] == VARIANTS


@pytest.mark.parametrize("name", ["linear_all", "lstm_last", "transformer_all"])
def test_variants_answer_as_the_eager_module_in_both_formats(tmp_path, exported, name):
    probe = trained_probe(name)
    bundle, out = exported(name)
    assert "✗" not in out
    assert out.count("✓") == 4  # the worst clips and recordings of both formats
    checks = verified(bundle)
    assert len(checks) == 23  # five kinds of clips, noise in three batches, four recordings, and the meta device
    assert "not compared" not in out  # with float64 either
    assert ("noise", 48) in checks
    names = {"digital silence", "noise of one bit", "full scale, clipped", "shapes on device meta"}
    assert names < {name for name, _ in checks}
    for form in ("onnx", "torchscript"):
        with open_bundle(with_one_format(bundle, form, tmp_path / form), "cpu") as engine:
            assert engine.backend.format == form
            for rows in (1, 2, 48):
                same_as_eager(engine, probe, noise(rows, seed=rows))


def test_a_bundle_holds_what_it_should(tmp_path, export, trained, model):
    probe, folder = trained()
    output = tmp_path / "out" / "bundle"
    recording = tmp_path / "real.wav"
    soundfile.write(recording, noise(1, seconds=2.5).numpy()[0], RATE)
    code, _, _ = export(
        "--probe", folder, "--output", output, "--verify-audio", recording, "--activation", "softmax"
    )
    assert code == 0
    checks = verified(output)
    assert {("short: real.wav", 1), ("exact: real.wav", 1), ("long: real.wav", 3)} < set(checks)
    assert not any("synthetic" in name for name, _ in checks)
    bundle = read_bundle(output)
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "labels.json",
        "manifest.json",
        "model.onnx",
        "model.torchscript.pt",
        "verification.json",
        "verification.npz",
    ]
    manifest = bundle.manifest
    assert bundle.labels == {manifest.probes[0].name: LABELS}
    assert (manifest.name, manifest.kind, manifest.model) == ("linear_last", "audio", "tiny")
    assert manifest.audio.sample_rate == RATE
    assert manifest.audio.window_samples == RATE
    assert [tuple(spec.shape) for spec in (*manifest.inputs, *manifest.outputs)] == [(-1, RATE), (-1, 5), (-1, 32)]
    assert manifest.probes[0].activation == "softmax"
    assert manifest.licence == "CC0-1.0"
    assert manifest.trained
    assert ProbeConfig(**manifest.probes[0].config) == probe.config
    verification = json.loads((output / "verification.json").read_text())
    assert verification["passed"] is True
    assert {check["format"] for check in verification["checks"]} == {"onnx", "torchscript"}
    assert verification["optimisation"] == "ORT_ENABLE_ALL"
    assert verification["machine"]["versions"]["torch"] == torch.__version__
    assert verification["machine"]["cpu"]
    card = (output / "README.md").read_text()
    for part in (
        "\nA linear probe on",
        ", ".join(LABELS),
        "CC0-1.0",
        "others passed with smaller errors",
        'activation_layer="softmax"',
    ):
        assert part in card
    assert "not trained" not in card
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]


def test_what_was_verified_is_verified_again(tmp_path, exported, capsys):
    probe, (bundle, _) = trained_probe("lstm_last"), exported("lstm_last")
    for form in ("onnx", "torchscript"):
        assert serve(["verify", str(with_one_format(bundle, form, tmp_path / form)), "--full"]) == 0
        out = capsys.readouterr().out
        assert (out.count("✓"), out.count(f" {form}  "), "✗" in out) == (11, 11, False)
    with np.load(bundle / "verification.npz") as evidence:
        clips = torch.from_numpy(evidence["0/input"] / np.float32(32768))
        with torch.no_grad():
            np.testing.assert_allclose(evidence["0/eager/logits"], probe(clips), rtol=0, atol=1e-5)
            exact = copy.deepcopy(probe).double()(clips.double())
        np.testing.assert_allclose(evidence["0/float64/logits"], exact, rtol=0, atol=1e-12)


def test_several_recordings_and_those_too_long_to_keep(tmp_path, export, trained, capsys):
    _, folder = trained()
    paths = [tmp_path / f"{rate}.wav" for rate in (RATE, 22050, 2_000_000)]
    for path in paths:
        rate = int(path.stem)
        soundfile.write(path, 0.1 * np.random.default_rng(rate).standard_normal(round(1.3 * rate)), rate)
    (tmp_path / "._16000.wav").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them on other disks
    (tmp_path / "empty.wav").write_bytes(b"")
    paths[1:1] = [tmp_path / "._16000.wav", tmp_path / "empty.wav"]
    code, out, _ = export(
        *("--probe", folder, "--output", tmp_path / "bundle", "--format", "onnx", "--verify-audio", *paths)
    )
    assert code == 0
    for path in paths[1:3]:
        assert f"left out {path} " in out
    checks = verified(tmp_path / "bundle")
    assert len(checks) == 12
    assert {("long: 16000.wav", 3), ("22050.wav", 2), ("2000000.wav", 2)} < set(checks)
    assert "not stored in the bundle: 1 recordings, for their size" in out
    assert serve(["verify", str(tmp_path / "bundle"), "--full"]) == 0
    assert capsys.readouterr().out.count("✓") == 11
    (tmp_path / "labels.json").write_text("{}" * 50)
    soundfile.write(tmp_path / "slow.wav", np.zeros(50), 50)
    for name, message in (
        ("nowhere.wav", "nowhere.wav: no such file"),
        ("labels.json", "can't be decoded"),
        ("slow.wav", "slow.wav: the sample rate is 50; expected 100 to"),
    ):
        code, out, err = export("--probe", folder, "--output", tmp_path / "b", "--verify-audio", tmp_path / name)
        assert (code, "write ONNX" in out) == (2, False)
        assert message in err


def test_a_backbone_that_computes_in_float32_alone_is_compared_in_that():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(160, 8)

        def get_model_layers(self):
            return ["mix"]

        def forward(self, wave):
            return self.mix(wave.float().unflatten(1, (-1, 160)))

    config = ProbeConfig(target_layers=["mix"], aggregation="mean")
    probe = build_probe_from_config(config, 5, "cpu", base_model=Own(), target_length=RATE).eval()
    assembly = Assembly((head(probe),), "own", None, "CC0", CLIPS)
    cases, skipped = make_cases(assembly, ())
    assert {case.exact for case in cases} == {None}
    assert len(skipped) == 1
    assert skipped[0].startswith("not compared with float64: ")


def test_the_onnx_file_says_what_other_tools_ask(exported):
    path = exported("linear_last", "--format", "onnx")[0] / "model.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(LABELS)
    assert (float(metadata["sample_rate"]), float(metadata["sample_duration"])) == (RATE, 1.0)
    assert {metadata["class_outputs_key"], metadata["embedding_outputs_key"]} == {
        output.name for output in session.get_outputs()
    }
    assert session.get_inputs()[0].shape[1:] == [RATE]
    assert not path.with_name("model.torchscript.pt").exists()


def test_clips_of_another_length(tmp_path, export, trained):
    probe, folder = trained()
    arguments = ("--clip-seconds", "2.01", "--format", "onnx", "--format", "onnx")
    assert export("--probe", folder, "--output", tmp_path / "bundle", *arguments)[0] == 0
    with open_bundle(tmp_path / "bundle") as engine:
        assert engine.manifest.audio.window_samples == 32160
        same_as_eager(engine, probe, noise(3, seconds=2.01))
    # A reader that rounds the duration down gets all samples.
    assert int(32160 / RATE * RATE) == 32159
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "bundle" / "model.onnx").metadata_props}
    assert int(float(metadata["sample_duration"]) * RATE) == 32160


def test_only_tapped_layers_are_left(tmp_path, export, trained):
    _, folder = trained(target_layers=[0])
    export("--probe", folder, "--output", tmp_path / "bundle")
    names = [i.name for i in onnx.load(tmp_path / "bundle" / "model.onnx").graph.initializer]
    assert not any("encoder.layers" in name or "predictor" in name for name in names)
    module = torch.jit.load(tmp_path / "bundle" / "model.torchscript.pt")
    assert not any("encoder.layers" in name for name, _ in module.named_parameters())


def test_the_traced_module_names_no_device(tmp_path, export, trained):
    for name in ("lstm_all", "transformer_last"):
        _, folder = trained(name)
        export("--probe", folder, "--output", tmp_path / "bundle", "--format", "torchscript")
        module = torch.jit.load(tmp_path / "bundle" / "model.torchscript.pt")
        assert 'value="cpu"' not in str(module.inlined_graph)


def test_a_bundle_says_nothing_of_the_machine_that_made_it(exported):
    bundle, _ = exported("linear_all")
    paths = (Path(avex_serve.__file__).parents[1], bundle.parents[2], Path.home())
    places = [str(place).encode() for place in paths]
    with zipfile.ZipFile(bundle / "model.torchscript.pt") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert [(name, place) for name, content in contents.items() for place in places if place in content] == []


def test_a_fine_tuned_probe_is_exported_with_its_own_backbone(tmp_path, export, model):
    base = tiny_beats(seed=5)
    probe = build_probe_from_config(
        ProbeConfig(target_layers=["last_layer"], freeze_backbone=False), 5, "cpu", base_model=base
    ).eval()
    with torch.no_grad():
        base.backbone.layer_norm.weight.mul_(1.7)
    save_probe(probe, tmp_path / "tuned", labels=LABELS, model=model, activation="sigmoid")
    code, _, err = export("--probe", tmp_path / "tuned", "--output", tmp_path / "bundle", "--format", "onnx")
    assert (code, err) == (0, "")
    with open_bundle(tmp_path / "bundle") as engine:
        same_as_eager(engine, probe, noise(2))


@pytest.mark.parametrize(
    ("name", "dimension", "shape"),
    [("linear_last", "32", (-1, 32)), ("mlp_last", "6,32", (-1, 6, 32)), ("lstm_last", "32", (-1, -1, 32))],
)
def test_heads_alone_take_embeddings(tmp_path, export, name, dimension, shape):
    fields = {"mlp_last": {"aggregation": "none", "input_processing": "flatten"}}.get(name, {})
    from avex_export.recipes import find_recipe

    config = ProbeConfig(**{**find_recipe(name).config.model_dump(exclude_unset=True), **fields})
    parts = tuple(int(part) for part in dimension.split(","))
    probe = build_probe_from_config(config, 5, "cpu", input_dim=parts[0] if len(parts) == 1 else parts).eval()
    save_probe(probe, tmp_path / "probe", labels=LABELS, activation="sigmoid")
    code, _, err = export(
        "--probe", tmp_path / "probe", "--offline", "--input-dim", dimension, "--output", tmp_path / "b"
    )
    assert (code, err) == (0, "")
    with open_bundle(tmp_path / "b") as engine:
        assert engine.manifest.kind == "embedding"
        assert engine.manifest.inputs[0].shape == shape
        assert engine.manifest.probes[0].input_fingerprint is None
        for rows, steps in ((1, 6), (3, 6)):
            batch = torch.randn(rows, *(steps if size == -1 else size for size in shape[1:]))
            with torch.no_grad():
                np.testing.assert_allclose(engine.infer(batch.numpy())["logits"], probe(batch), atol=1e-5)


def test_audio_and_head_alone_agree_on_what_makes_the_embedding(exported):
    audio_bundle, _ = exported("linear_last", "--format", "onnx")
    head_bundle, _ = exported("linear_last", *HEAD_ALONE)
    audio, alone = read_bundle(audio_bundle).manifest, read_bundle(head_bundle).manifest
    assert audio.probes[0].input_fingerprint == alone.probes[0].input_fingerprint is not None
    with open_bundle(audio_bundle) as whole, open_bundle(head_bundle) as rest:
        outputs = whole.infer(noise(2).numpy())
        np.testing.assert_allclose(rest.infer(outputs["embedding"])["logits"], outputs["logits"], atol=1e-5)


def test_the_licence_of_the_backbone_holds_for_all_that_is_made_of_it(tmp_path, export, exported):
    head = build_probe_from_config(ProbeConfig(target_layers=["last_layer"]), 5, "cpu", input_dim=32)
    save_probe(head, tmp_path / "any_head", labels=LABELS, activation="sigmoid")
    anyones = tmp_path / "anyones"
    export("--probe", tmp_path / "any_head", "--output", anyones, "--format", "onnx", "--offline")
    for bundle, licence in (
        (exported("linear_last", "--format", "onnx")[0], "CC0-1.0"),
        (exported("linear_last", *HEAD_ALONE)[0], "CC0-1.0"),
        (anyones, "unknown"),
    ):
        assert read_bundle(bundle).manifest.licence == licence
        assert f"Licence of the weights: {licence}" in (bundle / "README.md").read_text()
        metadata = {entry.key: entry.value for entry in onnx.load(bundle / "model.onnx").metadata_props}
        assert metadata["avex_serve.licence"] == licence
    assert read_bundle(anyones).manifest.model == "unknown"


def test_the_description_of_a_saved_probe_is_read_once(tmp_path, export, trained, monkeypatch):
    _, folder = trained()
    read, original = [], Path.read_text

    def counting(path, *arguments, **options):
        read.append(path.name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", counting)
    for i, more in enumerate(([], ["--offline", "--input-dim", "32"], ["--embeddings"])):
        read.clear()
        assert export("--probe", folder, "--output", tmp_path / str(i), "--format", "onnx", *more)[0] == 0
        assert read.count("probe.yml") == 1


@pytest.mark.parametrize("change", [b"format: 2", None], ids=["damaged", "gone"])
def test_weights_of_a_folder_that_is_no_saved_probe(tmp_path, export, trained, change):
    _, folder = trained()
    if change is None:
        (folder / "probe.yml").unlink()
    else:
        (folder / "probe.yml").write_bytes(change)
    code, _, err = export("--probe", "linear_last", "--weights", folder, "--output", tmp_path / "b")
    assert (code, "Traceback" in err, "probe.yml" in err) == (2, False, True)


def test_random_heads_are_marked(tmp_path, export, model, labels):
    arguments = ["--probe", "linear_last", "--model", model, "--labels", labels, "--output", tmp_path / "bundle"]
    code, _, err = export(*arguments)
    assert code == 4
    assert "no trained weights for linear_last" in err
    for remedy in ("save_probe()", "--weights", "--allow-untrained"):
        assert remedy in err
    assert list(tmp_path.iterdir()) == []
    code, _, _ = export(*arguments, "--allow-untrained", "--format", "onnx")
    assert code == 0
    assert not read_bundle(tmp_path / "bundle").manifest.trained
    assert "not trained" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_state_dict_saved_by_avex_is_taken(tmp_path, export, trained, model, labels):
    probe, _ = trained()
    torch.save(probe.state_dict(), tmp_path / "avex.pt")  # with base_model.… in it
    arguments = [
        *("--probe", "linear_last", "--model", model, "--weights", tmp_path / "avex.pt", "--labels", labels),
        *("--output", tmp_path / "bundle", "--format", "onnx"),
    ]
    code, _, err = export(*arguments)
    assert (code, "avex.pt doesn't say what turns the logits into scores" in err) == (4, True)
    assert "--activation softmax if the loss was cross entropy" in err
    code, _, err = export(*arguments, "--activation", "softmax")
    assert (code, err) == (0, "")
    with open_bundle(tmp_path / "bundle") as engine:
        assert engine.manifest.trained
        assert engine.probe(None).activation == "softmax"
        same_as_eager(engine, probe, noise(2))


@pytest.mark.parametrize("saved", ["softmax", "sigmoid", "none", None])
def test_the_activation_is_that_of_the_training(tmp_path, export, model, saved):
    folder, output = tmp_path / "probe", tmp_path / "bundle"
    save_probe(trained_probe(), folder, labels=LABELS, model=model, activation=saved)
    arguments = ("--probe", folder, "--output", output, "--format", "onnx")
    code, out, err = export(*arguments)
    if saved is None:
        assert (code, f"{folder / 'model.safetensors'} doesn't say" in err, output.exists()) == (4, True, False)
    else:
        assert (code, read_bundle(output).manifest.probes[0].activation) == (0, saved)
        assert "was trained for" not in out
    code, out, err = export(*arguments, "--activation", "softmax")
    assert (code, read_bundle(output).manifest.probes[0].activation) == (0, "softmax")
    warning = f"--activation softmax: probe was trained for {saved} scores"
    other = saved in ("sigmoid", "none")
    assert out.splitlines()[0].endswith(warning) is other
    assert err == (f"avex-export: {warning}\n" if other else "")  # after all lines of the progress


@pytest.mark.parametrize(("value", "message"), [(0.0, "nothing but zeros"), (torch.nan, "NaN or infinite values")])
def test_weights_that_no_training_leaves_are_refused_by_name(tmp_path, export, model, labels, value, message):
    weights = tmp_path / "placeholder.safetensors"
    save_file({"classifier.weight": torch.full((5, 32), value), "classifier.bias": torch.zeros(5)}, weights)
    code, out, err = export(
        *("--probe", "linear_last", "--model", model, "--weights", weights, "--labels", labels),
        *("--output", tmp_path / "bundle", "--activation", "softmax"),
    )
    assert (code, "write ONNX" in out) == (4, False)
    assert f"{weights} has {message}" in err


def test_a_yaml_file_is_a_probe(tmp_path, export, model, labels):
    (tmp_path / "mine.yml").write_text('probe_config:\n  target_layers: ["backbone", 0]\n  aggregation: max\n')
    code, _, err = export(
        *("--probe", tmp_path / "mine.yml", "--model", model, "--labels", labels, "--allow-untrained"),
        *("--output", tmp_path / "bundle"),
    )
    assert (code, err) == (0, UNTRAINED)
    assert read_bundle(tmp_path / "bundle").manifest.output("embedding").shape == (-1, 64)


def test_a_format_that_differs_leaves_nothing_behind(tmp_path, export, trained, monkeypatch):
    import avex_export.export as module

    _, folder = trained()
    original = module.export_graph

    def broken(assembly, without):
        graph = original(assembly)
        with torch.no_grad():
            graph.probes[0].classifier.bias.add_(1e-2)
        return graph

    monkeypatch.setattr(module, "export_graph", broken)
    output = tmp_path / "out" / "of" / "it" / "bundle"
    (tmp_path / "out").mkdir()
    code, out, err = export("--probe", folder, "--output", output)
    assert code == 4
    assert "✗" in out
    assert "nothing was written" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bundle_is_replaced_and_other_folders_are_not(tmp_path, export, trained):
    _, folder = trained()
    arguments = ["--probe", folder, "--output", tmp_path / "bundle", *HEAD_ALONE]
    export(*arguments)
    before = read_bundle(tmp_path / "bundle").digest
    assert export(*arguments, "--activation", "softmax")[0] == 0
    assert read_bundle(tmp_path / "bundle").digest != before
    (tmp_path / "bundle" / "manifest.json").unlink()
    code, _, err = export(*arguments)
    assert code == 2
    assert "not replaced" in err
    assert (tmp_path / "bundle" / "model.onnx").exists()


def test_list_names_probes_and_models(export):
    code, out, _ = export("--list")
    assert code == 0
    assert all(name in out for name in (*VARIANTS, "avex_demo", "esp_aves2_sl_beats_all"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--probe", "linear_lats"], 2, "did you mean linear_last?"),
        (["--probe", "nothing.yml"], 2, "no probe 'nothing.yml'"),
        ([], 2, "give --probe, or --list"),
        (["--list", "--probe", "linear_last"], 2, "--probe has no effect with --list; leave out one of them"),
        (["--explain", "--without", "nothing"], 2, "--without nothing: no such pass"),
        (["--explain", "--clip-seconds", "2"], 2, "--clip-seconds has no effect with --explain without --probe"),
        (["--probe", "linear_last", "--model", "nothing"], 2, "--model nothing: Unknown model"),
        (["--probe", "linear_last", "--model", "M", "--labels", "L"], 4, "no trained weights"),
        (["--probe", "linear_last", "--offline", "--clip-seconds", "2"], 2, "--clip-seconds is for audio"),
        (["--probe", "linear_last", "--labels", "L"], 4, "5 labels"),
        (
            ["--probe", "linear_last", "--model", "nothing", "--allow-untrained", "--labels", "L"],
            2,
            "--model nothing",
        ),
        (["--probe", "linear_last", "--allow-untrained", "--model", "M"], 4, "no labels: give --labels"),
        (["--probe", "linear_last", "--allow-untrained", "--labels", "missing.txt"], 2, "--labels missing.txt"),
        (["--probe", "L"], 2, "this file is no YAML. If it holds the weights of a head, name its recipe too"),
        (["--probe", "linear_last", "--weights", "missing.pt"], 2, "--weights missing.pt: no such file"),
        (["--probe", "linear_last", "--input-dim", "3"], 2, "--input-dim is for --offline"),
        (["--probe", "lstm_last", "--offline", "--allow-untrained", "--labels", "L"], 4, "needs --input-dim"),
        (
            [
                "--probe",
                "linear_last",
                "--model",
                "M",
                "--allow-untrained",
                "--labels",
                "L",
                "--clip-seconds",
                "0.1",
            ],
            4,
            "the shortest that BEATs takes has 2800; give --clip-seconds 0.175 or more",
        ),
        (
            ["--probe", "attention_last", "--allow-untrained", "--offline", "--input-dim", "9", "--labels", "L"],
            4,
            "width 9, num_heads is 8",
        ),
    ],
    ids=str,
)
def test_mistakes_are_told_without_a_traceback(tmp_path, export, model, labels, arguments, code, message):
    names = {"M": model, "L": labels}
    found, _, err = export(
        *(names.get(a, a) for a in arguments), *(["--output", tmp_path / "b"] if "--probe" in arguments else [])
    )
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_told(tmp_path):
    program = Path(sys.executable).with_name("avex-export")
    for option, message in (
        (["--clip-seconds", "-1"], "'-1' is not the length of a clip; expected seconds, at most 3600"),
        (["--clip-seconds", "1e300"], "'1e300' is not the length of a clip"),
        (["--offline", "--input-dim", "32", "--half"], "--half is for backbones, which --offline leaves out"),
        (["--input-dim", "a,b"], "expected D or T,D"),
        (["--format", "tflite"], "invalid choice"),
    ):
        result = subprocess.run(
            [program, "--probe", "linear_last", *option], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 2
        assert message in result.stderr


def test_a_head_for_another_number_of_labels_is_refused(tmp_path, export, trained, model):
    probe, _ = trained()
    torch.save(probe.head_state(), tmp_path / "head.pt")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    code, _, err = export(
        *("--probe", "linear_last", "--model", model, "--weights", tmp_path / "head.pt"),
        *("--labels", tmp_path / "three.txt", "--output", tmp_path / "bundle"),
    )
    assert code == 4
    assert "head.pt holds a head of 5 classes, and the probe was built for 3 labels" in err


def test_weights_that_merge_layers_are_part_of_what_makes_the_embedding(trained):
    from avex_export.assemble import assemble
    from avex_export.request import ExportRequest, read_probes

    def embedding_fingerprint():
        request = ExportRequest(probe=(str(folder),))
        return assemble(request, read_probes(request)).heads[0].input_fingerprint

    probe, folder = trained("linear_all")
    before = embedding_fingerprint()
    assert embedding_fingerprint() == before
    save_file({**probe.head_state(), "layer_weights": probe.layer_weights + 1}, folder / "model.safetensors")
    assert embedding_fingerprint() != before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_export_that_is_ended_leaves_nothing_behind(tmp_path, number):
    arguments = ["--probe", "linear_last", "--output", str(tmp_path / "bundle")]
    command = [sys.executable, "-u", "-m", "avex_export", *arguments]
    listening = partial(signal.signal, number, signal.SIG_DFL)  # shells let jobs in the background ignore some
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=listening, **pipes) as process:
        for line in process.stdout:
            if "write ONNX" in line:
                process.send_signal(number)
                break
        _, err = process.communicate()
    assert (process.returncode, list(tmp_path.iterdir())) == (130, [])
    assert err.endswith("avex-export: interrupted; nothing was written\n")
    assert "Traceback" not in err


def test_an_output_that_can_not_be_made_is_told(tmp_path, export, trained):
    _, folder = trained()
    (tmp_path / "file").write_text("")
    for below in ("bundle", "deeper/bundle"):
        code, _, err = export("--probe", folder, "--output", tmp_path / "file" / below)
        assert (code, f"{tmp_path / 'file'} is a file, not a folder" in err) == (2, True)
    code, _, err = export("--probe", folder, "--output", tmp_path / ("long" * 99))
    assert (code, err) == (2, f"avex-export: --output {tmp_path / ('long' * 99)}: File name too long\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.txt", b"bat\nbat\nbee\nfrog\nwind\n", "twice.txt has labels more than once: 'bat'"),
        ("empty.txt", b"\n", "empty.txt: it holds no labels"),
        ("latin.txt", "Zaunkönig".encode("latin-1"), "latin.txt is not UTF-8 text"),
        ("list.json", b"[1]", "list.json: 1 is no label"),
        ("folder", None, "folder can't be read: Is a directory"),
    ],
)
def test_bad_labels_are_told_before_the_export(tmp_path, export, trained, name, content, message):
    _, folder = trained()
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    code, out, err = export("--probe", folder, "--labels", path, "--output", tmp_path / "b")
    assert (code, "write ONNX" in out) == (2, False)
    assert f"--labels {tmp_path}" in err
    assert message in err


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_too_little_memory_is_told(tmp_path, export, monkeypatch, allocate):
    monkeypatch.setattr("avex_export.export.verify", lambda *_: allocate(2**55))
    code, _, err = export(*ALONE, "--output", tmp_path / "bundle")
    assert (code, "give a smaller --clip-seconds" in err) == (4, True)
    assert not list(tmp_path.iterdir())


def test_the_probe_is_left_as_it_was(trained):
    from avex_export.graph import export_graph

    probe, _ = trained("lstm_all")
    wave = noise(2)
    with torch.no_grad():
        before = probe(wave)
        assembly = Assembly((head(probe),), "tiny", None, "CC0", CLIPS)
        exported = export_graph(assembly)(wave)[0]
        torch.testing.assert_close(eager_graph(assembly)(wave)[0], before, rtol=0, atol=0)
    torch.testing.assert_close(exported, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["my bundle", "it's", "run_10:30"])
def test_the_command_to_serve_it_can_be_copied(tmp_path, export, name):
    code, out, _ = export(*ALONE, "--output", tmp_path / name)
    variable, *command = shlex.split(out.splitlines()[-1].removeprefix("serve it: "))
    assert (code, command) == (0, ["bentoml", "serve", "avex_serve.service:AvexService"])
    settings = Settings.from_environment(dict([variable.split("=", 1)]))
    assert settings.bundle == (str(tmp_path / name),)


# -- standard output -----------------------------------------------------------------------------------------------


def test_signs_that_the_terminal_cannot_show_are_escaped(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([*ALONE, "--output", str(tmp_path / "bundle")]) == 0
    assert r"\u2713" in (tmp_path / "out").read_text()
    assert read_bundle(tmp_path / "bundle").manifest.trained


def test_a_reader_that_goes_away_does_not_end_the_export(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([*ALONE, "--output", str(tmp_path / "bundle")]) == 0
    assert read_bundle(tmp_path / "bundle").manifest.trained
