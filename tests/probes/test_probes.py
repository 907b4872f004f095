import gc
import logging

import pytest
import torch

from avex_serve.configs import ProbeConfig
from avex_serve.models.probes import (
    AttentionProbe,
    LinearProbe,
    Probe,
    build_probe_from_config,
    get_probe_class,
    list_probe_classes,
    register_probe_class,
)
from avex_serve.models.probes.utils import registry
from tests.models.backbones import RATE, noise, tiny_beats

HEADS = {
    "linear": {},
    "mlp": {"hidden_dims": [12, 8]},
    "lstm": {"lstm_hidden_size": 6, "num_layers": 2, "bidirectional": True},
    "attention": {"num_heads": 4, "attention_dim": 8, "num_layers": 2},
    "transformer": {"num_heads": 4, "attention_dim": 16, "num_layers": 2},
}
SEQUENCE_HEADS = ["lstm", "attention", "transformer"]
EXCLUDE = {"exclude_padding": True}


def config(kind="linear", **fields):
    return ProbeConfig(**{"probe_type": kind, "target_layers": ["last_layer"], **HEADS[kind], **fields})


def build(kind="linear", base=None, input_dim=None, classes=5, seed=0, arguments=None, **fields):
    torch.manual_seed(seed)
    made = config(kind, **fields)
    return build_probe_from_config(
        made, classes, "cpu", base_model=base, input_dim=input_dim, **(arguments or {})
    ).eval()


def logits(probe, *arguments):
    with torch.no_grad():
        return probe(*arguments)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("layers", [["last_layer"], ["all"], [0, "backbone"]], ids=str)
@pytest.mark.parametrize("aggregation", ["mean", "max", "cls_token", "none"])
def test_every_probe_answers_a_batch_as_its_rows(kind, layers, aggregation):
    heads = {"num_heads": 1} if kind == "attention" and aggregation != "none" else {}
    probe = build(kind, tiny_beats(), target_layers=layers, aggregation=aggregation, **heads)
    wave = noise(3)
    together = logits(probe, wave)
    assert together.shape == (3, 5)
    torch.testing.assert_close(together, torch.cat([logits(probe, row[None]) for row in wave]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(probe, {"raw_wav": wave}), together)


def test_what_the_linear_head_sees():
    model, wave = tiny_beats(), noise(2)
    with torch.no_grad():
        layers = list(model.taps(wave, model.get_model_layers()).values())
    cases = {
        "mean of the last": (build(base=model), layers[-1].mean(dim=1)),
        "maximum of the last": (build(base=model, aggregation="max"), layers[-1].amax(dim=1)),
        "first token of the last": (build(base=model, aggregation="cls_token"), layers[-1][:, 0]),
        "means side by side": (
            build(base=model, target_layers=["all"]),
            torch.cat([layer.mean(dim=1) for layer in layers], dim=1),
        ),
        "flattened": (build(base=model, aggregation="none"), layers[-1].flatten(1)),
        "flatten": (build(base=model, aggregation="none", input_processing="flatten"), layers[-1].flatten(1)),
        "pooled": (build(base=model, aggregation="none", input_processing="pooled"), layers[-1].mean(dim=1)),
    }
    for name, (probe, features) in cases.items():
        torch.testing.assert_close(logits(probe, wave), probe.classifier(features), msg=name)


def test_several_unaggregated_layers_are_merged_with_learned_weights():
    model, wave = tiny_beats(), noise(2)
    probe = build(base=model, target_layers=["all"], aggregation="none", input_processing="pooled")
    assert probe.layer_weights.shape == (3,)
    with torch.no_grad():
        probe.layer_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
        means = [layer.mean(dim=1) for layer in model.taps(wave, model.get_model_layers()).values()]
        merged = sum(w * mean for w, mean in zip(probe.layer_weights.softmax(0), means, strict=True))
        torch.testing.assert_close(probe(wave), probe.classifier(merged))
    probe.train()(wave).sum().backward()
    assert probe.layer_weights.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", SEQUENCE_HEADS)
def test_sequence_processing_gives_the_head_every_step(kind):
    model, wave = tiny_beats(), noise(1)
    features, padding = build(kind, model, input_processing="sequence").combine(wave)
    assert features.shape == (1, 48, 32)
    assert padding is None
    pooled, _ = build(kind, model, aggregation="none", input_processing="pooled", num_heads=1).combine(wave)
    assert pooled.shape == (1, 32, 1)


@pytest.mark.parametrize(
    ("kind", "input_dim", "message"),
    [
        ("linear", (6, 4), r"input_processing is 'none'.*shape \(6, 4\).*reads vectors"),
        ("lstm", (4,), r"input_processing is 'none'.*shape \(4,\).*reads sequences"),
    ],
)
def test_no_processing_takes_what_fits_the_head_only(kind, input_dim, message):
    with pytest.raises(ValueError, match=message):
        build(kind, input_dim=input_dim, aggregation="none", input_processing="none")


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "swish"])
def test_every_activation_works(activation):
    probe, x = build("mlp", input_dim=4, activation=activation), torch.randn(3, 4)
    expected = x
    functions = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}
    function = functions.get(activation, lambda t: t * torch.sigmoid(t))
    linear = [layer for layer in probe.mlp if isinstance(layer, torch.nn.Linear)]
    for layer in linear[:-1]:
        expected = function(layer(expected))
    torch.testing.assert_close(logits(probe, x), linear[-1](expected))


def test_two_probes_on_one_backbone_leave_each_other_alone():
    model, wave = tiny_beats(), noise(2)
    first = build(base=model)
    before = logits(first, wave)
    second = build(base=model, target_layers=[0])
    torch.testing.assert_close(logits(first, wave), before, rtol=0, atol=0)
    expected = logits(second, wave)
    del first
    gc.collect()
    torch.testing.assert_close(logits(second, wave), expected, rtol=0, atol=0)


def test_a_frozen_backbone_stays_in_evaluation_and_without_gradients():
    model = tiny_beats(dropout=0.5)
    probe = build(base=model).train()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    wave = noise(2)
    torch.testing.assert_close(probe(wave), probe(wave), rtol=0, atol=0)
    probe(wave).sum().backward()
    assert probe.classifier.weight.grad is not None


def test_an_unfrozen_backbone_trains():
    model = tiny_beats(dropout=0.5)
    probe = build(base=model, freeze_backbone=False).train()
    assert model.training
    wave = noise(2)
    assert not torch.equal(probe(wave), probe(wave))
    probe(wave).sum().backward()
    assert model.backbone.patch_embedding.weight.grad.abs().sum() > 0


def test_building_leaves_the_random_generator_alone_but_for_the_head():
    torch.manual_seed(0)
    torch.nn.Linear(32, 5)
    expected = torch.rand(1)
    model = tiny_beats()
    torch.manual_seed(0)
    build_probe_from_config(config(), 5, "cpu", base_model=model)
    assert torch.rand(1) == expected


def test_the_clip_length_is_the_arguments_then_the_configurations_then_the_models():
    model = tiny_beats(seconds=1)
    shapes = {
        (): (48, 32),
        (("target_length", 2 * RATE),): (96, 32),
    }
    for fields, shape in shapes.items():
        assert build("lstm", model, aggregation="none", **dict(fields)).input_dim == [shape]
    given = {"target_length": RATE // 2}
    assert build("lstm", model, aggregation="none", target_length=RATE, arguments=given).input_dim == [(24, 32)]
    model.audio_config = None
    with pytest.raises(ValueError, match="give target_length in samples"):
        build(base=model)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_embeddings_of_another_shape_are_refused_with_both_shapes(kind):
    probe = build(kind, tiny_beats(), aggregation="none")
    with pytest.raises(RuntimeError, match=r"shape \[\(1, 96, 32\)\] make features of width 3072.*built for 1536"):
        probe(noise(1, seconds=2))


# -- masks ---------------------------------------------------------------------------------------------------------


def ragged():
    x = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(4))
    return x, torch.arange(12)[None] >= torch.tensor([12, 7, 3])[:, None]


@pytest.mark.parametrize("kind", ["attention", "transformer"])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_mask_reaches_the_sequence_heads(kind, as_mapping):
    probe = build(kind, input_dim=(12, 8))
    x, mask = ragged()
    masked = logits(probe, {"layer_0": x, "padding_mask": mask}) if as_mapping else logits(probe, x, mask)
    plain = logits(probe, x)
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("kind", SEQUENCE_HEADS)
def test_excluding_padding_gives_a_clip_the_same_answer_alone_and_padded(kind):
    probe = build(kind, input_dim=(12, 8), extra_config=EXCLUDE)
    x, mask = ragged()
    padded = logits(probe, x, mask)
    for row, length in enumerate([12, 7, 3]):
        alone = logits(probe, x[row : row + 1, :length])
        torch.testing.assert_close(padded[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*SEQUENCE_HEADS, "linear"])
def test_excluding_padding_online_brings_the_mask_of_samples_to_the_head(kind):
    processing = {"aggregation": "none"} if kind != "linear" else {"aggregation": "mean"}
    model, wave = tiny_beats(), noise(2)
    mask = torch.zeros(2, RATE, dtype=torch.bool)
    mask[1, RATE // 2 :] = True
    answers = {}
    for exclude in (False, True):
        probe = build(kind, model, extra_config={"exclude_padding": exclude}, **processing)
        answers[exclude] = logits(probe, {"raw_wav": wave, "padding_mask": mask})
    torch.testing.assert_close(answers[True][0], answers[False][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[True][1], answers[False][1], atol=1e-3)


@pytest.mark.parametrize("samples", [2800, 5000, RATE // 2])
@pytest.mark.parametrize("kind", [*SEQUENCE_HEADS, "linear"])
def test_a_clip_has_the_same_logits_padded_and_alone_if_padding_is_excluded(kind, samples):
    processing = {"aggregation": "none"} if kind != "linear" else {"aggregation": "mean"}
    model, wave = tiny_beats(), noise(2)
    mask = torch.zeros(2, RATE, dtype=torch.bool)
    mask[1, samples:], wave[1, samples:] = True, 0
    probe = build(kind, model, extra_config=EXCLUDE, **processing)
    together = logits(probe, wave, mask)
    torch.testing.assert_close(together[:1], logits(probe, wave[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:], logits(probe, wave[1:, :samples]), rtol=1e-4, atol=1e-5)


# -- building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_dim": 8, "base": True}, ValueError, "Cannot specify both"),
        ({}, ValueError, "Must specify either"),
        ({"input_dim": 8, "arguments": {"hiden_dims": [3]}}, TypeError, "'hiden_dims'.*did you mean 'hidden_dims'"),
        ({"input_dim": 8, "arguments": {"zzz": 1}}, TypeError, "'zzz'.*it accepts no options"),
        ({"base": True, "target_layers": ["layer_12"]}, ValueError, "'layer_12' not found"),
        ({"base": True, "target_layers": [9]}, ValueError, "out of range for 3 layers"),
        ({"base": True, "target_layers": []}, ValueError, "target_layers is empty"),
        ({"base": True, "target_length": 100}, RuntimeError, "one patch takes 2800"),
        ({"kind": "attention", "input_dim": 15}, AssertionError, "width 15, num_heads is 4"),
        (
            {"kind": "attention", "input_dim": 15, "num_heads": 3, "use_positional_encoding": True},
            RuntimeError,
            "even width, the embedding has 15",
        ),
    ],
    ids=str,
)
def test_probes_that_can_not_be_built(arguments, error, message):
    arguments = {**arguments}
    if arguments.pop("base", False):
        arguments["base"] = tiny_beats()
    with pytest.raises(error, match=message):
        build(**arguments)


def test_fields_without_effect_are_named_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        build("linear", input_dim=4, hidden_dims=[3], num_heads=2, extra_config={"mystery": 1}, online_training=True)
    told = "\n".join(caplog.messages)
    for name in ("hidden_dims=[3]", "num_heads=2", "extra_config['mystery']", "online_training=True"):
        assert name in told
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build("mlp", input_dim=4, extra_config=EXCLUDE, dropout_rate=0.2)
    assert caplog.messages == []


def test_a_keyword_fills_in_what_the_configuration_leaves_open(caplog):
    assert build("mlp", input_dim=4, arguments={"dropout_rate": 0.7}).dropout_rate == 0.7
    with caplog.at_level(logging.WARNING):
        probe = build("mlp", input_dim=4, arguments={"hidden_dims": [9]})
    assert probe.mlp[0].out_features == 12
    assert "keyword hidden_dims=[9] is ignored" in caplog.text


def test_positions_bound_the_sequence():
    for kind in SEQUENCE_HEADS:
        probe = build(kind, input_dim=8, use_positional_encoding=True, max_sequence_length=10, aggregation="none")
        assert logits(probe, torch.randn(2, 10, 8)).shape == (2, 5)
        with pytest.raises(
            RuntimeError, match="11 steps is longer than the 10 positions; raise max_sequence_length"
        ):
            probe(torch.randn(2, 11, 8))


def test_a_list_of_one_embedding_is_that_embedding():
    probe, x = build(input_dim=[(4,)]), torch.randn(2, 4)
    torch.testing.assert_close(logits(probe, [x]), logits(probe, x))
    with pytest.raises(ValueError, match="holds no embeddings"):
        probe([])
    with pytest.raises(RuntimeError, match="2 embeddings for a probe built for 3"):
        build(input_dim=[(4,)] * 3)([x, x])


class Doubled(LinearProbe):
    """A head of one's own."""

    def classify(self, features, padding=None):
        return 2 * super().classify(features, padding)


def test_probe_classes(monkeypatch):
    assert list_probe_classes() == list(HEADS)
    assert get_probe_class("Linear") is LinearProbe
    assert get_probe_class("cnn") is None
    monkeypatch.setattr(registry, "_PROBE_CLASSES", dict(registry._PROBE_CLASSES))
    register_probe_class("linear", Doubled)
    assert isinstance(build(input_dim=4), Doubled)
    with pytest.raises(TypeError, match="is not a probe class"):
        register_probe_class("linear", torch.nn.Linear)
    registry._PROBE_CLASSES.clear()
    with pytest.raises(ValueError, match="'linear' is not registered"):
        build(input_dim=4)


def test_probes_are_built_directly_too():
    probe = LinearProbe(base_model=None, layers=[], num_classes=3, feature_mode=True, input_dim=7)
    assert isinstance(probe, Probe)
    assert logits(probe, torch.randn(2, 7)).shape == (2, 3)
    with pytest.raises(TypeError, match="has no option"):
        LinearProbe(None, [], 3, feature_mode=True, input_dim=7, hidden_dims=[3])


def test_a_head_for_embeddings_may_take_its_shape_from_a_backbone():
    base = tiny_beats()
    probe = LinearProbe(base, [base.last_layer_name], 5, feature_mode=True)
    assert probe(torch.randn(2, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="input_dim must be provided when feature_mode=True"):
        LinearProbe(None, ["last_layer"], 5, feature_mode=True)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_single_position_is_added_to_every_step(kind):
    probe = build(kind, input_dim=8, max_sequence_length=1, use_positional_encoding=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = probe(x)
        shifted = x + probe.pos_encoding
        probe.pos_encoding = None
        torch.testing.assert_close(probe(shifted), expected)


def test_sine_positions_of_a_sequence_of_numbers():
    probe = build("attention", input_dim=1, num_heads=1, use_positional_encoding=True)
    torch.testing.assert_close(probe.pos_encoding[0, :4, 0], torch.arange(4.0).sin())


def test_a_probe_tells_what_it_is_made_of():
    probe = AttentionProbe(
        None, ["a", "b"], 3, feature_mode=True, input_dim=[(4, 8), (4, 8)], num_heads=2, dropout_rate=0.0
    )
    assert probe.dropout is None
    assert probe([torch.randn(2, 4, 8)] * 2).shape == (2, 3)
    info = probe.debug_info()
    assert (info["probe_type"], info["layers"], info["num_heads"]) == ("attention", ["a", "b"], 2)
    assert (info["has_layer_weights"], info["layer_weights"]) == (True, [0.0, 0.0])
    header, *rows = probe.get_learned_weights_table().splitlines()
    assert header.split() == ["layer", "weight", "share"]
    assert [row.split() for row in rows] == [["a", "0.0000", "50.00%"], ["b", "0.0000", "50.00%"]]
    plain = LinearProbe(None, ["a"], 3, feature_mode=True, input_dim=8)
    assert plain.debug_info()["has_layer_weights"] is False
    assert "No learned weights" in plain.get_learned_weights_table()


def test_a_probe_of_two_layers_is_not_answered_from_one():
    probe = LinearProbe(None, ["a", "b"], 3, feature_mode=True, input_dim=[(4,), (4,)], aggregation="none")
    with pytest.raises(RuntimeError, match="1 embeddings for a probe built for 2"):
        probe([torch.randn(2, 4)])
