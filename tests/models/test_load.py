import hashlib
import itertools
import json
import pickle
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file

import avex_serve
from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import count_classes, load_backbone, read_state_dict
from tests.hub import REVISION, hub_cache, use_cache
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
    "data parallel in lightning": lambda s: {f"module.model.{n}": t for n, t in s.items()},
    "lightning in data parallel, compiled": lambda s: {f"model.module._orig_mod.{n}": t for n, t in s.items()},
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
    "size zero": (
        lambda s: {**s, "backbone.layer_norm.bias": torch.zeros(0)},
        "1 tensors of size zero: backbone.layer_norm.bias",
    ),
    "only zeros": (lambda s: {n: torch.zeros_like(t) for n, t in s.items()}, r"nothing but zeros in \d+ tensors"),
    "nothing in common": (lambda s: {"other": torch.ones(1)}, "unexpected: other"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_lists_what_differs(tmp_path, model, spec, damage, message):
    path = tmp_path / "checkpoint.safetensors"
    save_file(damage(state(model)), path)
    with pytest.raises(ValueError, match=message):
        avex_serve.load_model(spec, checkpoint_path=str(path), return_features_only=True)


def test_a_model_is_never_half_loaded(tmp_path, model):
    other = tiny_beats(seed=9, finetuned_model=True)
    save_file(drop("backbone.layer_norm.weight")(state(other)), tmp_path / "checkpoint.safetensors")
    before = state(model)
    with pytest.raises(ValueError, match="1 missing"):
        load_backbone(
            model, read_state_dict(tmp_path / "checkpoint.safetensors"), "checkpoint", keep_classifier=False
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_damaged_files_are_refused(tmp_path, model, spec):
    whole = tmp_path / "whole.safetensors"
    save_file(state(model), whole)
    contents = {
        "empty": b"",
        "truncated": whole.read_bytes()[:1000],
        "text": b"not a checkpoint",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 240\n",
    }
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


def test_hub_checkpoints_come_from_the_cache(tmp_path, monkeypatch, model, spec):
    hub_cache(tmp_path, "owner/repo", "weights.safetensors", lambda path: save_file(state(model), path))
    use_cache(monkeypatch, tmp_path)
    assert_same(avex_serve.load_model(spec, checkpoint_path="hf://owner/repo/weights.safetensors"), model)
    revision = f"hf://owner/repo/weights.safetensors@{REVISION}"
    assert (
        avex_serve.load_model(spec, checkpoint_path="hf://owner/repo/weights.safetensors").checkpoint_uri == revision
    )
    for pinned in (f"repo/weights.safetensors@{REVISION}", f"repo@{REVISION}/weights.safetensors"):
        assert_same(avex_serve.load_model(spec, checkpoint_path=f"hf://owner/{pinned}"), model)
    with pytest.raises(FileNotFoundError, match=r"hf download owner/repo weights.safetensors --revision v2"):
        avex_serve.load_model(spec, checkpoint_path="hf://owner/repo@v2/weights.safetensors")
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
        (ModelSpec(name="resnet", pretrained=False), {}, KeyError, r"'resnet' is not registered.*\['beats'"),
        (tiny_spec(), {"checkpoint_path": "missing.pt"}, FileNotFoundError, "missing.pt"),
        (tiny_spec(), {"checkpoint_path": "ftp://x/y"}, ValueError, "ftp:// is not known"),
        (tiny_spec(), {"checkpoint_path": "hf://owner/file"}, ValueError, "hf://owner/repository/file"),
    ],
    ids=str,
)
def test_models_that_can_not_be_loaded(model, options, error, message):
    with pytest.raises(error, match=message):
        avex_serve.load_model(model, **options)


LABELS = {"whale": 2, "bee": 0, "bat": 1, "wren": 3}
MAPPING = {"label_to_index": LABELS, "index_to_label": {0: "bee", 1: "bat", 2: "whale", 3: "wren"}}


@pytest.fixture
def published(tmp_path, model, spec):
    """A model in a YAML file, with its checkpoint and its label map beside it."""
    save_file(state(model), tmp_path / "weights.safetensors")
    (tmp_path / "label_map.json").write_text(json.dumps(LABELS))
    content = {
        "model_spec": spec.model_dump(exclude_none=True),
        "checkpoint_path": "weights.safetensors",
        "class_mapping_path": "label_map.json",
        "sha256": hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest(),
    }
    path = tmp_path / "published.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_classifier_knows_its_labels(published):
    loaded = avex_serve.load_model(published)
    assert loaded.label_mapping == MAPPING
    assert loaded(noise(1)).shape == (1, 4)
    assert avex_serve.load_model(published, return_features_only=True).label_mapping is None
    labels = published.with_name("label_map.json")
    assert avex_serve.load_label_mapping(labels) == avex_serve.load_label_mapping(str(labels)) == MAPPING
    assert avex_serve.load_label_mapping(f"file://{labels.rename(labels.with_suffix('.txt'))}") == MAPPING


def test_labels_come_from_the_hubs_cache(tmp_path, monkeypatch, published, clean_registry, spec):
    hub_cache(tmp_path, "owner/repo", "label_map.json", lambda path: path.write_text(json.dumps(LABELS)))
    use_cache(monkeypatch, tmp_path)
    weights = str(published.with_name("weights.safetensors"))
    avex_serve.register_model("mine", spec, weights, "hf://owner/repo/label_map.json")
    assert avex_serve.load_model("mine").label_mapping == MAPPING
    assert avex_serve.load_label_mapping("mine") == MAPPING
    assert avex_serve.list_models()["mine"]["num_classes"] == 4
    assert avex_serve.describe_model("mine")["_metadata"]["num_classes"] == 4


def test_labels_that_can_not_be_had_are_none_with_a_warning(published, clean_registry, spec, caplog):
    published.with_name("label_map.json").unlink()
    loaded = avex_serve.load_model(published)
    assert loaded.label_mapping is None
    assert loaded(noise(1)).shape == (1, 4)
    assert "Label map not found" in caplog.text
    avex_serve.register_model("mine", spec)
    for name, told in {
        "mine": "names no label map",
        "nothing": "neither a registered model",
        "x.json": "x.json",
    }.items():
        caplog.clear()
        assert avex_serve.load_label_mapping(name) is None
        assert told in caplog.text


def test_labels_of_another_number_are_an_error_unless_the_weights_are_not_the_models_own(published, caplog):
    published.with_name("label_map.json").write_text('{"bat": 0, "bee": 1}')
    with pytest.raises(ValueError, match=r"label_map.json has 2 labels, but checkpoint \S+ has 4 classes"):
        avex_serve.load_model(published)
    other = str(published.with_name("weights.safetensors"))
    assert avex_serve.load_model(published, checkpoint_path=other).label_mapping is None
    assert "has 2 labels" in caplog.text


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 0, "b": 2}', '{"a": 0, "a": 1}', '{"a": "0"}'])
def test_a_damaged_label_map_is_an_error_of_its_model_and_none_when_asked_for_alone(published, caplog, content):
    labels = published.with_name("label_map.json")
    labels.write_text(content)
    with pytest.raises(ValueError, match=r"label_map\.json"):
        avex_serve.load_model(published)
    assert avex_serve.load_label_mapping(labels) is None
    assert "label_map.json" in caplog.text


def test_a_checkpoint_that_is_not_the_published_one_is_refused(published, model):
    weights = published.with_name("weights.safetensors")
    save_file({**state(model), "classifier.bias": torch.ones(4)}, weights)
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, but [0-9a-f]{64} is published"):
        avex_serve.load_model(published)
    for path in (weights, str(weights)):
        assert avex_serve.load_model(published, checkpoint_path=path).classifier.out_features == 4


def test_a_file_of_the_hub_may_have_been_replaced_unless_its_revision_is_named(
    tmp_path, monkeypatch, caplog, published
):
    weights = published.with_name("weights.safetensors").read_bytes()
    hub_cache(tmp_path, "owner/repo", "weights.safetensors", lambda path: path.write_bytes(weights))
    use_cache(monkeypatch, tmp_path)
    content = yaml.safe_load(published.read_text())
    for revision, right in itertools.product(("", f"@{REVISION}"), (True, False)):
        content["checkpoint_path"] = f"hf://owner/repo/weights.safetensors{revision}"
        content["sha256"] = hashlib.sha256(weights if right else b"").hexdigest()
        published.write_text(yaml.safe_dump(content))
        caplog.clear()
        if revision and not right:
            with pytest.raises(ValueError, match="is published for it"):
                avex_serve.load_model(published)
            continue
        assert avex_serve.load_model(published).classifier.out_features == 4
        assert ("replaced on the hub since" in caplog.text) == (not right)


def test_a_prefix_that_the_module_has_itself_stays(tmp_path, clean_registry):
    avex_serve.register_model_class(Inner)
    spec = ModelSpec(name="inner", pretrained=False)
    saved = Inner(num_classes=5)
    for number, prefix in enumerate(("", "module.")):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{prefix}{name}": tensor for name, tensor in saved.state_dict().items()}, path)
        loaded = avex_serve.load_model(spec, checkpoint_path=str(path))
        assert torch.equal(loaded(noise(1)), saved(noise(1)))
        # Its class can't leave its classifier out, so that is loaded where it fits.
        features = avex_serve.load_model(spec, checkpoint_path=str(path), return_features_only=True)
        assert torch.equal(features(noise(1)), saved(noise(1)))


class Inner(ModelBase):
    """Its parameters' own names begin with ``model.``, as EfficientNet's do."""

    def __init__(self, num_classes, device="cpu"):
        super().__init__(device)
        self.model = torch.nn.Module()
        self.model.features = torch.nn.Linear(100, 8)
        self.model.classifier = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(8, num_classes))
        self.eval()

    def forward(self, x, padding_mask=None):
        return self.model.classifier(self.model.features(x[:, :100]))


def test_what_a_file_is_is_told_by_its_beginning(tmp_path, model, spec):
    save_file(state(model), tmp_path / "weights.bin")
    assert_same(avex_serve.load_model(spec, checkpoint_path=str(tmp_path / "weights.bin")), model)
    for name, content, message in (
        ("page.pt", b"<!DOCTYPE html><html>", "neither safetensors nor a torch file; it begins with b'<!DOCTYPE'"),
        ("zero.safetensors", None, "holds nothing but zeros"),
    ):
        path = tmp_path / name
        if content is None:
            counts = {n: torch.zeros_like(t) for n, t in state(model).items()} | {"steps": torch.tensor(1)}
            save_file(counts, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            avex_serve.load_model(spec, checkpoint_path=str(path))
    torch.save({**state(model), "lr": 0.1}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"next to tensors it has lr; expected tensors only"):
        avex_serve.load_model(spec, checkpoint_path=str(tmp_path / "mixed.pt"))
    with pytest.raises(ValueError, match=r"names a host; expected file:///absolute/path"):
        avex_serve.load_model(spec, checkpoint_path="file://weights.bin")


class Guessing(ModelBase):
    """A class that can't leave its head out, which no checkpoint's names give away."""

    name = "guessing"

    def __init__(self, num_classes, device="cpu"):
        super().__init__(device=device)
        self.top = torch.nn.Linear(4, num_classes)

    def forward(self, x, padding_mask=None):
        return self.top(x[:, :4])


@pytest.mark.parametrize("place", [lambda n: {"num_classes": n}, lambda n: {"model_config": {"num_classes": n}}])
def test_the_number_of_classes_may_stand_beside_the_tensors(tmp_path, clean_registry, place):
    avex_serve.register_model_class(Guessing)
    torch.save({"model_state_dict": Guessing(7).state_dict(), **place(7)}, tmp_path / "checkpoint.pt")
    loaded = avex_serve.load_model(ModelSpec(name="guessing"), checkpoint_path=str(tmp_path / "checkpoint.pt"))
    assert loaded(noise(2)).shape == (2, 7)


def test_a_classifier_may_have_many_parts():
    names = {f"classifier.{i}.weight": torch.zeros(i + 2, 3) for i in (0, 2, 10)}
    assert count_classes(names) == 12


def test_the_spec_of_a_registered_model_is_that_model(tmp_path, clean_registry, model, spec):
    save_file(state(model), tmp_path / "checkpoint.safetensors")
    avex_serve.register_model("mine", spec, str(tmp_path / "checkpoint.safetensors"))
    assert_same(avex_serve.load_model(avex_serve.get_model_spec("mine")), model)
    avex_serve.register_model("twin", spec)  # which of the two is meant is not known
    assert avex_serve.load_model(spec).checkpoint_uri is None
