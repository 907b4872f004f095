import math

import numpy as np
import pytest
import torch

from avex_serve.models.beats_model import relative_buckets
from avex_serve.models.checkpoints import fingerprint
from tests.models.backbones import RATE, noise, tiny_beats

LAST = "backbone.encoder.layers.1.fc2"
ALL = ["backbone.post_extract_proj", "backbone.encoder.layers.0.fc2", LAST]


def taps(model, wave, layers, mask=None):
    with torch.no_grad():
        return model.taps(wave, layers, mask)


def test_layers_are_those_of_avex():
    model = tiny_beats()
    assert model.get_model_layers() == ALL
    assert model.last_layer_name == LAST
    assert tiny_beats(embed_dim=32).get_model_layers() == ALL[1:]


@pytest.mark.parametrize("rows", [1, 3, 48])
def test_a_batch_is_its_rows(rows):
    model, wave = tiny_beats(), noise(rows)  # 1 s has 48 tokens: as many as rows, at the end
    layers = model.tappable_layers()
    together = taps(model, wave, layers)
    assert together[LAST].shape == (rows, 48, 32)
    for i in (0, rows - 1):
        alone = taps(model, wave[i : i + 1], layers)
        for layer in layers:
            torch.testing.assert_close(together[layer][i], alone[layer][0], rtol=1e-4, atol=1e-4)


def test_every_layer_that_is_offered_can_be_tapped():
    model = tiny_beats()
    assert set(taps(model, noise(1), model.tappable_layers())) == set(model.tappable_layers())


def test_the_output_is_the_layer_called_backbone():
    model, wave = tiny_beats(), noise(2)
    with torch.no_grad():
        torch.testing.assert_close(taps(model, wave, ["backbone"])["backbone"], model(wave), rtol=0, atol=0)


def test_a_pass_stops_when_it_has_what_was_asked_for():
    model, wave = tiny_beats(), noise(1)
    with torch.no_grad():
        model.backbone.encoder.layers[1].fc1.weight.fill_(torch.nan)
    assert taps(model, wave, ALL[:2])[ALL[1]].isfinite().all()
    assert taps(model, wave, [LAST])[LAST].isnan().any()


def test_relative_buckets_are_t5s():
    buckets, longest = 32, 64

    def bucket(distance):
        half, far = buckets // 2, abs(distance)
        exact = half // 2
        if far >= exact:
            growth = math.log(far / exact) / math.log(longest / exact)
            far = min(half - 1, exact + int(growth * (half - exact)))
        return far + (half if distance > 0 else 0)

    distances = list(range(-150, 151))
    assert relative_buckets(torch.tensor(distances), buckets, longest).tolist() == [bucket(d) for d in distances]


@pytest.mark.parametrize(
    "flags",
    [
        {"layer_norm_first": True, "deep_norm": False},
        {"deep_norm": False},
        {"activation_fn": "glu"},
        {"activation_fn": "relu"},
        {"activation_fn": "gelu_accurate"},
        {"activation_fn": "tanh"},
        {"activation_fn": "linear"},
        {"relative_position_embedding": False},
        {"gru_rel_pos": False},
        {"conv_bias": True},
        {"finetuned_model": True},
        {"conv_pos": 15},
        {"input_patch_size": 8},
        {"frame_shift": 20.0, "num_mel_bins": 64},
        {"fbank_mean": 0.0, "fbank_std": 1.0},
    ],
    ids=str,
)
def test_every_flag_changes_the_output(flags):
    with torch.no_grad():
        plain, flagged = tiny_beats()(noise(1)), tiny_beats(**flags)(noise(1))
    assert flagged.isfinite().all()
    assert flags == {"finetuned_model": True} or flagged.shape != plain.shape or not torch.allclose(flagged, plain)


def test_flags_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="deep_norm and layer_norm_first"):
        tiny_beats(layer_norm_first=True, deep_norm=True)


@pytest.mark.parametrize("option", [{"encoder_layer": 3}, {"activation_fn": "elu"}])
def test_unknown_configuration_is_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        tiny_beats(**option)


def test_gradients_shrink_from_block_to_block_and_values_do_not():
    wave, gradients, outputs = noise(1), {}, {}
    for ratio in (1.0, 0.5):
        model = tiny_beats(layer_wise_gradient_decay_ratio=ratio)
        outputs[ratio] = model(wave)
        outputs[ratio].sum().backward()
        gradients[ratio] = [block.fc2.weight.grad for block in model.backbone.encoder.layers]
        gradients[ratio].append(model.backbone.patch_embedding.weight.grad)
    torch.testing.assert_close(outputs[0.5], outputs[1.0], rtol=0, atol=0)
    first, last, patches = (small / whole for small, whole in zip(gradients[0.5], gradients[1.0], strict=True))
    torch.testing.assert_close(last, torch.ones_like(last))
    torch.testing.assert_close(first, torch.full_like(first, 0.5), rtol=1e-3, atol=1e-3)
    assert patches.median() == pytest.approx(0.25, rel=1e-3)


def test_a_tapped_block_is_never_dropped_in_training():
    model = tiny_beats(encoder_layerdrop=1.0).train()
    assert set(model.taps(noise(1), ALL)) == set(ALL)
    untapped = model.taps(noise(1), ["backbone"])["backbone"]
    torch.testing.assert_close(untapped, model.taps(noise(1), ["backbone"])["backbone"], rtol=1, atol=10)


def test_evaluation_leaves_random_generators_alone():
    model = tiny_beats()
    before = torch.get_rng_state(), np.random.get_state()[2]
    taps(model, noise(1), ALL)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[2]


def half_padded(rows=2, samples=RATE):
    mask = torch.zeros(rows, samples, dtype=torch.bool)
    mask[1, samples // 2 :] = True
    return mask


def test_a_mask_hides_padded_tokens_from_the_others():
    model, wave, mask = tiny_beats(), noise(2), half_padded()
    loud = wave.clone()
    loud[1, RATE * 3 // 4 :] += 0.5 * torch.randn(RATE // 4)
    tokens = model.backbone.token_mask(mask, RATE)
    assert tokens.shape == (2, 48)
    assert not tokens[0].any()
    assert tokens[1].sum() == 48 - 25  # half of a second keeps 25 tokens, as in avex
    quiet, other = (taps(model, w, [LAST], mask)[LAST] for w in (wave, loud))
    torch.testing.assert_close(quiet[~tokens], other[~tokens])
    assert not torch.allclose(taps(model, wave, [LAST])[LAST], taps(model, loud, [LAST])[LAST])
    assert taps(model, wave, ALL[:1], mask)[ALL[0]][tokens].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 48), (2, RATE - 1), (RATE,)])
def test_a_mask_of_another_length_is_refused(shape):
    with pytest.raises(ValueError, match="padding_mask has shape"):
        tiny_beats()(noise(2), torch.zeros(shape, dtype=torch.bool))


def test_logits_are_of_the_mean_over_valid_tokens():
    model, wave, mask = tiny_beats(num_classes=5), noise(2), half_padded()
    with torch.no_grad():
        tokens = model.backbone.token_mask(mask, RATE)
        features = model.backbone(wave, tokens)
        means = torch.stack([row[~padded].mean(dim=0) for row, padded in zip(features, tokens, strict=True)])
        torch.testing.assert_close(model(wave, mask), model.classifier(means))
        torch.testing.assert_close(model(wave), model.classifier(model.backbone(wave).mean(dim=1)))


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda wave: wave[0]])
def test_other_types_and_one_dimension_are_taken(convert):
    model, wave = tiny_beats(), noise(1).half().float()
    with torch.no_grad():
        torch.testing.assert_close(model(convert(wave)), model(wave))


@pytest.mark.parametrize(
    ("wave", "error", "message"),
    [
        (torch.zeros(1, 2799), RuntimeError, "one patch takes 2800"),
        (torch.zeros(1, 0), ValueError, "cannot be empty"),
        (torch.zeros(1, 1, RATE), ValueError, "expected \\(batch, samples\\)"),
        (None, ValueError, "cannot be None"),
    ],
)
def test_unusable_audio_is_refused(wave, error, message):
    with pytest.raises(error, match=message):
        tiny_beats()(wave)


def test_naturelm_clamps_the_waveform():
    model, wave = tiny_beats(fields={"use_naturelm": True}), 20 * noise(1)
    with torch.no_grad():
        torch.testing.assert_close(model(wave), tiny_beats()(wave.clamp(-1, 1)))
        assert not torch.allclose(model(wave), tiny_beats()(wave))


def test_avexs_way_to_embeddings():
    model, wave = tiny_beats().train(), noise(2)
    with pytest.raises(ValueError, match="register_hooks_for_layers"):
        model.extract_embeddings(wave)
    assert model.register_hooks_for_layers(["last_layer", "all", -1]) == [LAST, *ALL[:2]]
    everything = model.extract_embeddings(wave)
    assert [tuple(e.shape) for e in everything] == [(2, 48, 32)] * 3
    assert model.training
    assert not any(e.requires_grad for e in everything)
    pooled = model.extract_embeddings({"raw_wav": wave}, aggregation="mean")
    torch.testing.assert_close(pooled, torch.cat([e.mean(dim=1) for e in everything], dim=1))
    assert model.extract_embeddings(wave, aggregation="max", freeze_backbone=False).requires_grad
    model.register_hooks_for_layers([0])
    assert model.extract_embeddings(wave, aggregation="cls_token").shape == (2, 32)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["layer_12"], ValueError, "'layer_12' not found in model"),
        (["backbone.encoder.layer.0.fc2"], ValueError, "did you mean backbone.encoder.layers.0.fc2"),
        ([3], ValueError, "out of range for 3 layers"),
        ([-4], ValueError, "out of range for 3 layers"),
        ([True], TypeError, "a bool is not a layer"),
        ([], ValueError, "target_layers is empty"),
    ],
)
def test_layers_that_are_not_there(layers, error, message):
    with pytest.raises(error, match=message):
        tiny_beats().register_hooks_for_layers(layers)


def test_the_fingerprint_tells_apart_what_the_weights_do_not():
    variants = [
        {},
        {"encoder_attention_heads": 2, "gru_rel_pos": False},
        {"gru_rel_pos": False},
        {"fbank_mean": 15.0},
    ]
    variants.append({"fields": {"use_naturelm": True}})
    assert len({fingerprint(tiny_beats(**options)) for options in variants}) == len(variants)
    assert fingerprint(tiny_beats(dropout=0.5, encoder_layerdrop=0.5)) == fingerprint(tiny_beats())


def test_the_first_layer_is_tapped_before_dropout_in_training():
    model, layer = tiny_beats(dropout_input=0.5), "backbone.post_extract_proj"
    expected = model.taps(noise(2), [layer])[layer]
    torch.testing.assert_close(model.train().taps(noise(2), [layer])[layer], expected)
