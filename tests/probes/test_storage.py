import os
from collections import Counter, deque

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from avex_export.cli import main
from avex_serve import load_model
from avex_serve.bundles.reading import read_bundle
from avex_serve.models.checkpoints import read_state_dict
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
    save_probe(probe, tmp_path / "probe", labels=LABELS, model=tmp_path / "hub.yml", activation="softmax")
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
    save_file({"classifier.weight": torch.ones(5, 32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: classifier\.bias"):
        load_probe(folder)


# -- what was trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "saved"),
    [("softmax", "softmax"), ("cross_entropy", "softmax"), ("BCEWithLogitsLoss", "sigmoid"), ("none", "none"),
     ("Softmax", "softmax"), ("SIGMOID", "sigmoid"), ("crossentropyloss", "softmax"), ("None", "none")],
)  # fmt: skip
def test_the_activation_is_saved(tmp_path, caplog, given, saved):
    save_probe(build(input_dim=8), tmp_path / "probe", activation=given)
    loaded = load_probe(tmp_path / "probe")
    assert (loaded.output_activation, caplog.text) == (saved, "")
    save_probe(loaded, tmp_path / "again")
    assert load_probe(tmp_path / "again").output_activation == saved


def test_an_activation_that_is_not_known(tmp_path, caplog):
    with pytest.raises(ValueError, match="activation is 'relu'; expected one of softmax, cross_entropy"):
        save_probe(build(input_dim=8), tmp_path / "probe", activation="relu")
    save_probe(build(input_dim=8), tmp_path / "probe")
    assert "activation='softmax' after training with cross entropy" in caplog.text
    assert load_probe(tmp_path / "probe").output_activation is None


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (set(LABELS), TypeError, "labels is a set, which has no order"),
        (frozenset(LABELS), TypeError, "labels is a frozenset"),
        (dict.fromkeys(LABELS, 3).keys(), TypeError, "labels is a dict_keys"),
        (dict(enumerate(LABELS)).values(), TypeError, "labels is a dict_values"),
        ((label for label in LABELS), TypeError, "labels is a generator"),
        (iter(LABELS), TypeError, "labels is a tuple_iterator"),
        (Counter(LABELS), TypeError, "whose numbers are counts"),
        ("abcde", TypeError, "labels is a str"),
        ([1, 2, 3, 4, 5], TypeError, "labels has 1, a int; expected text"),
        (["bat", "bee", "bee", "frog", "wind"], ValueError, "labels more than once: 'bee'"),
        (["bat", "bee", " ", "frog", "wind"], ValueError, "an empty label"),
    ],
)
def test_labels_that_name_classes_by_chance_are_refused(tmp_path, labels, error, message):
    with pytest.raises(error, match=message):
        save_probe(build(input_dim=8), tmp_path / "probe", labels=labels, activation="softmax")
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("labels", [list(LABELS), np.array(LABELS), deque(LABELS)], ids=["list", "array", "deque"])
def test_labels_in_order(tmp_path, labels):
    save_probe(build(input_dim=8), tmp_path / "probe", labels=labels, activation="softmax")
    assert load_probe(tmp_path / "probe").labels == LABELS


def test_labels_that_look_alike_are_told(tmp_path, caplog):
    labels = ["Bat", "bee", "bat", "tree frog", "treefrog"]
    save_probe(build(input_dim=8), tmp_path / "probe", labels=labels, activation="softmax")
    assert [record.getMessage() for record in caplog.records] == [
        "labels has 'Bat' and 'bat', which differ only by case or spaces",
        "labels has 'tree frog' and 'treefrog', which differ only by case or spaces",
    ]


def fill(value):
    def change(parameters):
        for parameter in parameters:
            parameter.fill_(value)

    return change


def zero_last(parameters):
    parameters[-2].fill_(0)


def one_infinite(parameters):
    parameters[0].flatten()[3] = torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill(0), "nothing but zeros in"),
        (zero_last, "nothing but zeros in"),
        (fill(torch.nan), "NaN or infinite values in"),
        (one_infinite, "NaN or infinite values in"),
    ],
)
@pytest.mark.parametrize("kind", HEADS)
def test_weights_that_no_training_leaves_are_refused(tmp_path, kind, change, message):
    probe, other = (build(kind, input_dim=(12, 8), aggregation="none") for _ in range(2))
    with torch.no_grad():
        change(list(probe.parameters()))
    with pytest.raises(ValueError, match=message):
        save_probe(probe, tmp_path / "probe", activation="softmax")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"head.pt has {message}"):
        load_head(other, probe.state_dict(), "head.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_head_of_other_classes_is_refused_by_their_number():
    probe = build(input_dim=8)
    state = {"classifier.weight": torch.ones(3, 8), "classifier.bias": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"head\.pt holds a head of 3 classes, and the probe was built for 5 labels"
    ):
        load_head(probe, state, "head.pt")


def wrapped(probe):
    return {
        "compiled": lambda: torch.compile(probe),
        "parallel": lambda: torch.nn.DataParallel(probe),
        "both": lambda: torch.compile(torch.nn.DataParallel(probe)),
    }


@pytest.mark.parametrize("way", ["compiled", "parallel", "both"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_wrapped_probe_is_saved_as_the_probe(tmp_path, backbone, way, frozen):
    model, source = backbone
    probe = build(base=model, freeze_backbone=frozen)
    save_probe(wrapped(probe)[way](), tmp_path / "probe", labels=LABELS, model=source, activation="softmax")
    loaded = load_probe(tmp_path / "probe")
    torch.testing.assert_close(logits(loaded, noise(2)), logits(probe.eval(), noise(2)), rtol=0, atol=0)


def test_a_probe_with_compiled_parts_is_saved_as_the_probe(tmp_path, backbone):
    model, source = backbone
    probe = build(base=model)
    save_probe(probe, tmp_path / "plain", model=source, activation="softmax")
    probe.base_model = torch.compile(probe.base_model)
    probe.classifier = torch.compile(probe.classifier)
    save_probe(probe, tmp_path / "probe", model=source, activation="softmax")
    for name in ("probe.yml", "model.safetensors"):
        assert (tmp_path / "probe" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a Linear is no probe; expected what build_probe_from_config"):
        save_probe(torch.nn.Linear(3, 3), tmp_path / "probe")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_cast_probe_is_saved_so_that_it_loads(tmp_path, backbone, dtype, frozen):
    model, source = backbone
    probe = build(base=model, freeze_backbone=frozen)
    expected = probe.classifier.weight.to(dtype).float()
    save_probe(probe.to(dtype), tmp_path / "probe", labels=LABELS, model=source, activation="softmax")
    loaded = load_probe(tmp_path / "probe")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.classifier.weight, expected)
    assert torch.isfinite(logits(loaded, noise(2))).all()
    if frozen:  # the backbone is still recognised
        with torch.no_grad():
            model = tiny_beats(seed=6)
        with pytest.raises(ValueError, match="was trained on a backbone with fingerprint"):
            load_probe(tmp_path / "probe", base_model=model)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_probe(build(input_dim=8), tmp_path / "probe", labels=LABELS, activation="softmax")
    finally:
        os.umask(before)
    folder = tmp_path / "probe"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


# -- checkpoints of training frameworks ----------------------------------------------------------------------------


def lightning(state):
    """As Lightning writes a module that holds a probe, its loss and its metrics."""
    beside = {
        "criterion.weight": torch.ones(5),
        "val_f1.tp": torch.zeros(5),
        "train_metrics.MulticlassAccuracy.tp": ONE,
    }
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**{f"probe.{name}": tensor for name, tensor in state.items()}, **beside},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1},
    }


ONE = torch.ones(1)
FRAMEWORKS = {
    "lightning": lightning,
    "net": lambda s: {f"net.{n}": t for n, t in s.items()},
    "compiled inside": lambda s: {n.replace("classifier", "classifier._orig_mod"): t for n, t in s.items()},
    "compiled within": lambda s: {f"module.model._orig_mod.{n}": t for n, t in s.items()},
    "with its loss": lambda s: {**s, "loss_fn.pos_weight": ONE, "class_weights": ONE},
    "a dict of its own": lambda s: {"epoch": 1, "best": s},
    "probe and backbone": lambda s: {
        **{f"probe.{n}": t for n, t in s.items()},
        **{n.replace("base_model", "backbone"): t for n, t in s.items() if n.startswith("base_model.")},
    },
}


@pytest.mark.parametrize("write", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_checkpoints_of_training_frameworks_load(tmp_path, backbone, write):
    model, _ = backbone
    trained, probe = (build(base=model) for _ in range(2))
    torch.save(write(trained.state_dict()), tmp_path / "last.ckpt")
    load_head(probe, read_state_dict(tmp_path / "last.ckpt"), "last.ckpt")
    torch.testing.assert_close(logits(probe.eval(), noise(2)), logits(trained.eval(), noise(2)), rtol=0, atol=0)


def test_other_checkpoints_are_refused_with_the_nearest_readings(tmp_path):
    trained, probe = (build(input_dim=8) for _ in range(2))
    state = {f"student.{n}": t for n, t in trained.state_dict().items()} | {
        "teacher.classifier.weight": torch.ones(5, 8)
    }
    with pytest.raises(
        ValueError, match=r"nearest readings of its 3 names: without 'student\.' 2 of 2 fit; without 't"
    ):
        load_head(probe, state, "last.ckpt")
    torch.save(
        {"model_ema": trained.state_dict(), "weights": trained.state_dict(), "epoch": 1}, tmp_path / "last.ckpt"
    )
    with pytest.raises(ValueError, match="several state dicts: model_ema, weights; save the one that you mean"):
        read_state_dict(tmp_path / "last.ckpt")
