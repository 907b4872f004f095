import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from avex_export.cli import main
from avex_serve import load_model
from avex_serve.bundles.reading import read_bundle
from avex_serve.models.probes import load_probe, save_probe
from avex_serve.models.probes.storage import load_head
from tests.hub import hub_cache, use_cache
from tests.models.backbones import effnet, noise, tiny_beats, tiny_spec, write_model
from tests.probes.test_probes import HEADS, build, logits

LABELS = ("bat", "bee", "bird", "frog", "wind")


@pytest.fixture
def backbone(tmp_path):
    """A backbone and the YAML file that it is loaded from."""
    model = tiny_beats(seed=5)
    return model, write_model(tmp_path / "backbone.yml", model, tiny_spec())


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_comes_back_with_its_backbone(tmp_path, backbone, kind):
    model, source = backbone
    probe = build(kind, model, aggregation="none", target_layers=["all"])
    save_probe(probe, tmp_path / "probe", labels=LABELS, model=source)
    assert sorted(path.name for path in (tmp_path / "probe").iterdir()) == [
        "labels.json",
        "model.safetensors",
        "probe.yml",
    ]
    names = set(load_file(tmp_path / "probe" / "model.safetensors"))
    assert names == set(probe.head_state())
    loaded = load_probe(tmp_path / "probe")
    assert loaded.labels == LABELS
    assert loaded.config == probe.config
    assert not loaded.training
    torch.testing.assert_close(logits(loaded, noise(2)), logits(probe, noise(2)), rtol=0, atol=0)
    given = load_probe(tmp_path / "probe", base_model=model)
    torch.testing.assert_close(logits(given, noise(2)), logits(probe, noise(2)), rtol=0, atol=0)


def test_a_head_asks_for_the_revision_that_it_was_trained_on(tmp_path, monkeypatch):
    """The backbone is replaced on the hub afterwards."""
    use_cache(monkeypatch, tmp_path)
    backbones = {revision: tiny_beats(seed=seed) for seed, revision in enumerate(("a" * 40, "b" * 40))}

    def publish(revision):
        weights = {n: t.clone() for n, t in backbones[revision].state_dict().items()}
        hub_cache(tmp_path, "owner/repo", "model.safetensors", lambda path: save_file(weights, path), revision)

    publish("a" * 40)
    uri = "hf://owner/repo/model.safetensors"
    content = {"model_spec": tiny_spec().model_dump(exclude_none=True), "checkpoint_path": uri}
    (tmp_path / "hub.yml").write_text(yaml.safe_dump(content))
    probe = build(base=load_model(tmp_path / "hub.yml"))
    save_probe(probe, tmp_path / "probe", labels=LABELS, model=tmp_path / "hub.yml")
    publish("b" * 40)
    loaded = load_probe(tmp_path / "probe")
    assert loaded.base_model.checkpoint_uri == f"{uri}@{'a' * 40}"
    torch.testing.assert_close(logits(loaded, noise(2)), logits(probe.eval(), noise(2)), rtol=0, atol=0)
    bundle = tmp_path / "bundle"
    assert main(["--probe", str(tmp_path / "probe"), "--output", str(bundle), "--format", "onnx"]) == 0
    assert read_bundle(bundle).manifest.checkpoint == f"{uri}@{'a' * 40}"
    assert load_model(tmp_path / "hub.yml").checkpoint_uri == f"{uri}@{'b' * 40}"


def test_a_fine_tuned_probe_holds_everything(tmp_path, backbone):
    model, source = backbone
    probe = build(base=model, freeze_backbone=False)
    with torch.no_grad():
        model.backbone.layer_norm.weight.mul_(2)  # as training would
    save_probe(probe, tmp_path / "probe", model=source)
    (tmp_path / "backbone.safetensors").unlink()
    loaded = load_probe(tmp_path / "probe")
    assert loaded.labels is None
    torch.testing.assert_close(logits(loaded, noise(2)), logits(probe.eval(), noise(2)), rtol=0, atol=0)


def test_a_probe_on_stored_embeddings(tmp_path):
    probe = build("lstm", input_dim=[(12, 8), (6, 8)], aggregation="none")
    save_probe(probe, tmp_path / "probe", labels={label: i for i, label in enumerate(LABELS)})
    loaded = load_probe(tmp_path / "probe")
    x = [torch.randn(2, 12, 8), torch.randn(2, 6, 8)]
    torch.testing.assert_close(logits(loaded, x), logits(probe, x), rtol=0, atol=0)
    assert loaded.labels == LABELS


def test_what_a_keyword_filled_in_is_saved(tmp_path):
    probe = build("lstm", input_dim=(12, 8), bidirectional=False, arguments={"use_positional_encoding": True})
    save_probe(probe, tmp_path / "probe")
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(logits(load_probe(tmp_path / "probe"), x), logits(probe, x), rtol=0, atol=0)


def test_another_backbone_is_refused(tmp_path, backbone):
    model, source = backbone
    save_probe(build(base=model), tmp_path / "probe", model=source)
    with pytest.raises(ValueError, match="was trained on a backbone with fingerprint"):
        load_probe(tmp_path / "probe", base_model=tiny_beats(seed=6))
    other = {n: t.clone() for n, t in tiny_beats(seed=6).state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was trained on a backbone with fingerprint"):
        load_probe(tmp_path / "probe", checkpoint_path=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("make", [tiny_beats, effnet], ids=lambda make: make.__name__)
def test_a_state_dict_that_holds_another_backbone_is_refused(make):
    """As avex leaves a frozen EfficientNet, whose batch statistics change while its probe is trained."""
    trained = build(base=make(seed=5))
    probe = build(base=make(seed=5))
    state = {name: tensor.half() for name, tensor in trained.state_dict().items()}
    load_head(probe, state, "half.pt")
    load_head(probe, trained.state_dict(), "head.pt")
    torch.testing.assert_close(logits(probe, noise(2)), logits(trained, noise(2)), rtol=0, atol=0)
    moved = [n for n, _ in trained.base_model.named_buffers(prefix="base_model") if n.endswith("running_mean")]
    moved = moved[-1] if moved else "base_model.backbone.layer_norm.bias"
    with torch.no_grad():
        trained.get_buffer(moved).add_(0.1) if "running" in moved else trained.get_parameter(moved).add_(0.1)
    before = logits(probe, noise(2))
    with pytest.raises(ValueError, match=rf"another backbone.* 1 of its tensors differ: {moved};.*freeze_backbone"):
        load_head(probe, trained.state_dict(), "head.pt")
    torch.testing.assert_close(logits(probe, noise(2)), before, rtol=0, atol=0)
    taken = build(base=make(seed=6), freeze_backbone=False).eval()
    load_head(taken, trained.state_dict(), "head.pt")
    torch.testing.assert_close(logits(taken, noise(2)), logits(trained, noise(2)), rtol=0, atol=0)


def test_a_classifier_of_the_backbone_is_no_part_of_the_probe(tmp_path, backbone):
    model, source = backbone
    with_classifier = tiny_beats(seed=5, num_classes=3)
    with_classifier.load_state_dict(model.state_dict(), strict=False)
    for frozen in (True, False):
        save_probe(build(base=with_classifier, freeze_backbone=frozen), tmp_path / "probe", model=source)
        assert not any("base_model.classifier" in n for n in load_file(tmp_path / "probe" / "model.safetensors"))
        loaded = load_probe(tmp_path / "probe")
        torch.testing.assert_close(logits(loaded, noise(1)), logits(build(base=model), noise(1)))


def test_what_can_not_be_saved(tmp_path, backbone):
    model, _ = backbone
    probe = build(base=model)
    with pytest.raises(ValueError, match="3 labels for a probe with 5 classes"):
        save_probe(probe, tmp_path / "probe", labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="label indices must be 0 to 4"):
        save_probe(probe, tmp_path / "probe", labels=dict.fromkeys("abcde", 0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"not replaced"):
        save_probe(probe, tmp_path / "mine")
    probe.config = None
    with pytest.raises(ValueError, match="build_probe_from_config"):
        save_probe(probe, tmp_path / "probe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.safetensors", "backbone.yml", "mine"]


def test_what_can_not_be_loaded(tmp_path, backbone):
    model, source = backbone
    folder = tmp_path / "probe"
    with pytest.raises(FileNotFoundError, match="holds no probe"):
        load_probe(folder)
    save_probe(build(base=model), folder)
    with pytest.raises(ValueError, match="doesn't name its backbone"):
        load_probe(folder)
    save_probe(build(base=model), folder, model=source)
    whole = (folder / "probe.yml").read_text()
    for damaged in ("3", "- a", "a: [", whole + "mystery: 1\n", whole.replace("format: 1", "format: 2")):
        (folder / "probe.yml").write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load_probe(folder)
    (folder / "probe.yml").write_text(whole)
    save_file({"classifier.weight": torch.zeros(5, 32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: classifier\.bias"):
        load_probe(folder)
