import pickle
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file

import avex_serve
from avex_serve.configs import ModelSpec
from tests.models.backbones import noise, tiny_beats, tiny_spec


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    return tiny_beats(seed=3, num_classes=4, finetuned_model=True)


@pytest.fixture
def spec():
    return tiny_spec(finetuned_model=True)


def assert_same(loaded, model):
    with torch.no_grad():
        torch.testing.assert_close(loaded(noise(2)), model(noise(2)), rtol=0, atol=0)


FORMS = {
    "as saved": lambda s: s,
    "without backbone prefix": lambda s: {n.removeprefix("backbone."): t for n, t in s.items()},
    "without computed buffers": lambda s: {n: t for n, t in s.items() if "fbank" not in n},
    "legacy weight norm": lambda s: {
        n.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): t
        for n, t in s.items()
    },
    "data parallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "lightning": lambda s: {f"model.{n}": t for n, t in s.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_checkpoints_load_in_every_form(tmp_path, model, spec, form, suffix):
    path = tmp_path / f"checkpoint.{suffix}"
    if suffix == "pt":
        torch.save({"model_state_dict": form(state(model)), "epoch": 3}, path)
    else:
        save_file(form(state(model)), path)
    loaded = avex_serve.load_model(spec, checkpoint_path=str(path))
    assert not loaded.training
    assert loaded.classifier.out_features == 4
    assert_same(loaded, model)
    features = avex_serve.load_model(spec, checkpoint_path=f"file://{path}", return_features_only=True)
    assert features.classifier is None
    assert features(noise(1)).shape == (1, 48, 32)


def drop(name):
    return lambda s: {n: t for n, t in s.items() if n != name}


DAMAGES = {
    "missing": (drop("backbone.layer_norm.weight"), "1 missing: backbone.layer_norm.weight"),
    "unexpected": (lambda s: {**s, "backbone.extra": torch.zeros(1)}, "1 unexpected: backbone.extra"),
    "shape": (
        lambda s: {**s, "backbone.layer_norm.bias": torch.zeros(7)},
        r"1 of another shape: backbone.layer_norm.bias is \(7,\), not \(24,\)",
    ),
    "nothing in common": (lambda s: {"other": torch.zeros(1)}, "unexpected: backbone.other"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_lists_what_differs(tmp_path, model, spec, damage, message):
    path = tmp_path / "checkpoint.safetensors"
    save_file(damage(state(model)), path)
    with pytest.raises(ValueError, match=message):
        avex_serve.load_model(spec, checkpoint_path=str(path), return_features_only=True)


def test_damaged_files_are_refused(tmp_path, model, spec):
    whole = tmp_path / "whole.safetensors"
    save_file(state(model), whole)
    contents = {"empty": b"", "truncated": whole.read_bytes()[:1000], "text": b"not a checkpoint"}
    for name, content in contents.items():
        for suffix in ("safetensors", "pt"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                avex_serve.load_model(spec, checkpoint_path=str(path))


class Malicious:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_pickle_is_never_executed(tmp_path, spec, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Malicious()))
    torch.save({"model": Malicious()}, tmp_path / "zipped.pt")
    for name in ("checkpoint.pt", "zipped.pt"):
        with pytest.raises(ValueError, match=r"safetensors|can't be read"):
            avex_serve.load_model(spec, checkpoint_path=str(tmp_path / name))
    assert "unpickled" not in capsys.readouterr().out


def test_a_model_from_yaml_finds_its_checkpoint_beside_it(tmp_path, model, spec):
    save_file(state(model), tmp_path / "weights.safetensors")
    path = tmp_path / "mine.yml"
    fields = spec.model_dump(exclude_none=True)
    path.write_text(yaml.safe_dump({"model_spec": fields, "checkpoint_path": "weights.safetensors"}))
    assert_same(avex_serve.load_model(path), model)
    path.write_text(yaml.safe_dump(fields))
    assert avex_serve.load_model(str(path)).get_model_layers() == model.get_model_layers()


def hub_cache(home, repository, file, write, revision="a" * 40):
    """The hub's cache as huggingface_hub lays it out."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    write(snapshot / file)


def test_hub_checkpoints_come_from_the_cache(tmp_path, monkeypatch, model, spec):
    constants = pytest.importorskip("huggingface_hub.constants")
    hub_cache(tmp_path, "owner/repo", "weights.safetensors", lambda path: save_file(state(model), path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(avex_serve.load_model(spec, checkpoint_path="hf://owner/repo/weights.safetensors"), model)
    pinned = f"hf://owner/repo/weights.safetensors@{'a' * 40}"
    assert_same(avex_serve.load_model(spec, checkpoint_path=pinned), model)
    with pytest.raises(FileNotFoundError, match=r"hf download owner/repo other\.safetensors"):
        avex_serve.load_model(spec, checkpoint_path="hf://owner/repo/other.safetensors")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            "no_such_model",
            {},
            ValueError,
            "Unknown model identifier: 'no_such_model'. Available models: .*avex_demo",
        ),
        ("missing.yml", {}, FileNotFoundError, "missing.yml"),
        (3, {}, TypeError, "Unsupported model type"),
        (ModelSpec(name="beats"), {}, ValueError, "pretrained=False"),
        (ModelSpec(name="resnet", pretrained=False), {}, ValueError, "'resnet' is not known; expected one of"),
        (tiny_spec(), {"checkpoint_path": "missing.pt"}, FileNotFoundError, "missing.pt"),
        (tiny_spec(), {"checkpoint_path": "ftp://x/y"}, ValueError, "ftp:// is not known"),
        (tiny_spec(), {"checkpoint_path": "hf://owner/file"}, ValueError, "hf://owner/repository/file"),
    ],
    ids=str,
)
def test_models_that_can_not_be_loaded(model, options, error, message):
    with pytest.raises(error, match=message):
        avex_serve.load_model(model, **options)


def test_loading_leaves_the_registry_alone(spec):
    avex_serve.register_model("mine", spec)
    avex_serve.get_model_spec("mine").init_config["encoder_layers"] = 9
    avex_serve.load_model("mine")
    assert avex_serve.get_model_spec("mine") == spec
    assert "mine" in avex_serve.list_models()
    assert avex_serve.get_checkpoint_path("mine") is None
    with pytest.raises(KeyError, match="nothing"):
        avex_serve.get_checkpoint_path("nothing")


def test_official_models_are_listed_with_their_checkpoints():
    models = avex_serve.list_models()
    assert models["esp_aves2_naturelm_audio_v1_beats"]["checkpoint_path"].startswith("hf://EarthSpeciesProject/")
    layers = avex_serve.list_model_layers("esp_aves2_sed_birdcode_beats_encoder")
    assert layers["last_layer"] == "backbone.encoder.layers.11.fc2"
    assert layers["layers"] == layers["all"]
    assert len(layers["layers"]) == 13
    with pytest.raises(ValueError, match="not found in registry"):
        avex_serve.list_model_layers("nothing")
    with pytest.raises(ValueError, match="must be an instance of ModelBase"):
        avex_serve.list_model_layers(torch.nn.Linear(1, 1))
