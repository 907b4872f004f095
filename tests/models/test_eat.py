import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import avex_serve
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.models.checkpoints import fingerprint
from avex_serve.models.probes import build_probe_from_config
from tests.models.backbones import RATE, noise, tiny_eat, tiny_eat_spec

ALL = ["backbone.model.blocks.0.attn.proj", "backbone.model.blocks.1.attn.proj"]
LAST = ALL[-1]
TOKENS = 57


def taps(model, wave, layers, mask=None):
    with torch.no_grad():
        return model.taps(wave, layers, mask)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- the architecture ----------------------------------------------------------------------------------------------


def position(token, width, bands=8):
    """Positions of a patch as EAT's paper code lays them out: band first, then time step, sines then cosines."""
    quarter = width // 4
    omega = [10000 ** (-k / quarter) for k in range(quarter)]
    values = []
    for place in (token % bands, token // bands):
        values += [math.sin(place * w) for w in omega] + [math.cos(place * w) for w in omega]
    return np.array(values)


def definition(model, features, heads):
    """The whole transformer written out in float64 for one clip: every layer's output by name."""
    state = {n.removeprefix("backbone.model."): t.double().numpy() for n, t in model.state_dict().items()}
    weight = state["local_encoder.proj.weight"]
    width = len(weight)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    found, patches = {}, []
    tokens = [state["extra_tokens"][0, 0]]
    for token in range(len(features) // 16 * 8):
        row, column = 16 * (token // 8), 16 * (token % 8)
        patch = features[row : row + 16, column : column + 16].reshape(-1)
        patches.append(weight.reshape(width, -1) @ patch + state["local_encoder.proj.bias"])
        tokens.append(patches[-1] + state["fixed_positional_encoder.positions"][0, token])
    found["local_encoder"] = np.stack(patches)
    found["local_encoder.proj"] = found["local_encoder"].T.reshape(width, -1, 8)
    x = found["pre_norm"] = norm("pre_norm", np.stack(tokens))
    erf = np.vectorize(math.erf)
    for i in range(sum(name.endswith("qkv.weight") for name in state)):
        block = f"blocks.{i}"
        qkv = found[f"{block}.attn.qkv"] = linear(f"{block}.attn.qkv", x)
        query, key, value = (
            part.reshape(len(x), heads, -1).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=-1)
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        attended = linear(f"{block}.attn.proj", attended.transpose(1, 0, 2).reshape(len(x), -1))
        found[f"{block}.attn"] = found[f"{block}.attn.proj"] = attended
        x = found[f"{block}.norm1"] = norm(f"{block}.norm1", x + attended)
        hidden = found[f"{block}.mlp.fc1"] = linear(f"{block}.mlp.fc1", x)
        hidden = found[f"{block}.mlp.act"] = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        fed = linear(f"{block}.mlp.fc2", hidden)
        found[f"{block}.mlp"] = found[f"{block}.mlp.fc2"] = fed
        x = found[block] = found[f"{block}.norm2"] = norm(f"{block}.norm2", x + fed)
    return {**{f"backbone.model.{name}": value for name, value in found.items()}, "backbone.model": x, "backbone": x}


@pytest.mark.parametrize("scale", [1.0, 3e-3])  # so small, the epsilon of the norms counts
def test_every_layer_is_the_definition(scale):
    model, wave = tiny_eat(), noise(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    expected = definition(model, model.process_audio(wave)[0].double().numpy(), heads=4)
    found = taps(model, wave, model.tappable_layers())
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][0].numpy(), value, atol=2e-5 * np.abs(value).max(), err_msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(wave), found["backbone"], rtol=0, atol=0)


def test_positions_are_fixed_sines_and_cosines():
    model = avex_serve.load_model(tiny_eat_spec())  # as initialised
    table = model.backbone.model.fixed_positional_encoder.positions
    assert table.shape == (1, 768 * 8, 32)
    assert not table.requires_grad
    for token in (0, 1, 7, 8, 100, 6143):
        np.testing.assert_allclose(table[0, token].numpy(), position(token, 32), atol=1e-6)


def test_layers_and_parameters_are_those_of_avex():
    model = tiny_eat(num_classes=3)
    assert model.get_model_layers() == ALL
    assert model.last_layer_name == LAST
    block = {
        **{f"norm{i}.{kind}": (32,) for i in (1, 2) for kind in ("weight", "bias")},
        **{
            "attn.qkv.weight": (96, 32),
            "attn.qkv.bias": (96,),
            "attn.proj.weight": (32, 32),
            "attn.proj.bias": (32,),
        },
        **{"mlp.fc1.weight": (128, 32), "mlp.fc1.bias": (128,), "mlp.fc2.weight": (32, 128), "mlp.fc2.bias": (32,)},
    }
    expected = {
        "extra_tokens": (1, 1, 32),
        "local_encoder.proj.weight": (32, 1, 16, 16),
        "local_encoder.proj.bias": (32,),
        "fixed_positional_encoder.positions": (1, 6144, 32),
        **{f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()},
        "pre_norm.weight": (32,),
        "pre_norm.bias": (32,),
    }
    expected = {f"backbone.model.{name}": shape for name, shape in expected.items()}
    expected |= {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected


@pytest.mark.parametrize("rows", [1, 3, TOKENS])
def test_a_batch_is_its_rows(rows):
    model, wave = tiny_eat(), noise(rows)
    layers = model.tappable_layers()
    together = taps(model, wave, layers)
    assert together[LAST].shape == (rows, TOKENS, 32)
    for i in (0, rows - 1):
        alone = taps(model, wave[i : i + 1], layers)
        for layer in layers:
            same(together[layer][i], alone[layer][0])


def test_a_pass_stops_when_it_has_what_was_asked_for():
    model, wave = tiny_eat(), noise(1)
    first, last = model.backbone.model.blocks
    last.mlp = last.norm1 = None
    assert set(taps(model, wave, ALL)) == set(ALL)
    with pytest.raises(TypeError):  # what is not there can't run
        taps(model, wave, ["backbone"])
    last.attn = first.mlp = None
    assert set(taps(model, wave, ALL[:1])) == {ALL[0]}
    first.attn = None
    assert set(taps(model, wave, ["backbone.model.pre_norm"])) == {"backbone.model.pre_norm"}


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 64},
        {"depth": 3},
        {"num_heads": 8},
        {"mlp_ratio": 2.0},
        {"target_length": 96},
        {"fields": {"eat_norm_mean": -5.553}},
        {"fields": {"eat_norm_std": 4.606}},
    ],
    ids=str,
)
def test_every_option_changes_the_output(options):
    with torch.no_grad():
        plain, other = tiny_eat()(noise(1)), tiny_eat(**options)(noise(1))
    assert other.isfinite().all()
    assert other.shape != plain.shape or not torch.allclose(other, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": 3}, "depths"),
        ({"embed_dim": 30}, "embed_dim"),
        ({"num_heads": 5}, "embed_dim 32 is not divisible by num_heads 5"),
        ({"target_length": 100}, "target_length"),
        ({"fields": {"eat_cfg": {"depth": 3}}}, "give the geometry once"),
        ({"fields": {"eat_norm_std": 0.0}}, "eat_norm_std"),
    ],
    ids=str,
)
def test_geometry_that_can_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_eat(**options)


def test_other_representations_are_refused():
    spec = ModelSpec(name="eat_hf", audio_config=AudioConfig(representation="mel_spectrogram"))
    with pytest.raises(ValueError, match="EAT has its own front end"):
        avex_serve.build_model_from_spec(spec, "cpu")


def test_the_geometry_may_come_under_avexs_name():
    spec = ModelSpec(name="eat_hf", eat_cfg={"embed_dim": 32, "depth": 2, "num_heads": 4, "target_length": 112})
    torch.manual_seed(0)
    first = avex_serve.build_model_from_spec(spec, "cpu")
    torch.manual_seed(0)
    second = avex_serve.build_model_from_spec(tiny_eat_spec(), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(first(noise(1)), second(noise(1)), rtol=0, atol=0)


# -- the front end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [({}, -4.268, 4.569), ({"eat_norm_mean": -5.553, "eat_norm_std": 4.606}, -5.553, 4.606)],
)
def test_the_audio_is_normalised_as_the_spec_says_and_by_default_as_avex_does(fields, mean, std, caplog):
    features = tiny_eat(fields=fields).process_audio(torch.zeros(1, 400))
    assert ("leave them out for heads that were trained with avex" in caplog.text) == bool(fields)
    assert features.shape == (1, 112, 128)
    assert features[0, 0].unique().item() == pytest.approx((math.log(2**-23) - mean) / (2 * std), rel=1e-5)
    assert features[0, 1:].unique().item() == pytest.approx(-mean / (2 * std), rel=1e-5)


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda wave: wave[0]])
def test_other_types_and_one_dimension_are_taken(convert):
    model, wave = tiny_eat(), noise(1).half().float()
    with torch.no_grad():
        torch.testing.assert_close(model(convert(wave)), model(wave))


@pytest.mark.parametrize(
    ("wave", "error", "message"),
    [
        (torch.zeros(1, 399), AssertionError, "399 samples are too few: one frame takes 400"),
        (torch.zeros(1, 0), ValueError, "cannot be empty"),
        (torch.zeros(1, 1, RATE), ValueError, "expected \\(batch, samples\\)"),
        (None, ValueError, "cannot be None"),
    ],
)
def test_unusable_audio_is_refused(wave, error, message):
    with pytest.raises(error, match=message):
        tiny_eat()(wave)


@pytest.mark.parametrize("seconds", [0.025, 0.5, 3.0])
def test_a_clip_has_as_many_tokens_whatever_its_length(seconds):
    with torch.no_grad():
        assert tiny_eat()(noise(2, seconds=seconds)).shape == (2, TOKENS, 32)


# -- padding -------------------------------------------------------------------------------------------------------


def half_padded(rows=2, samples=RATE):
    mask = torch.zeros(rows, samples, dtype=torch.bool)
    mask[1, samples // 2 :] = True
    return mask


@pytest.mark.parametrize("samples", [400, 2559, 2719, 2720, 9000, RATE, 20000])
def test_a_token_is_padded_if_the_clip_alone_has_none_of_its_frames(samples):
    lengths = [samples, samples // 2, 0]
    mask = torch.stack([torch.arange(samples) >= length for length in lengths])
    padded = tiny_eat().token_mask(mask, TOKENS)
    assert padded.shape == (3, TOKENS)
    assert not padded[:, 0].any()
    for row, length in enumerate(lengths):
        frames = 0 if length < 400 else 1 + (length - 400) // 160
        expected = [16 * (token // 8) >= frames for token in range(TOKENS - 1)]
        assert padded[row, 1:].tolist() == expected


def test_a_mask_makes_no_difference_to_the_tokens():
    model, wave = tiny_eat(num_classes=3), noise(2)
    with torch.no_grad():
        torch.testing.assert_close(model(wave, half_padded()), model(wave), rtol=0, atol=0)
    masked, plain = (taps(model, wave, ALL, mask) for mask in (half_padded(), None))
    for layer in ALL:
        torch.testing.assert_close(masked[layer], plain[layer], rtol=0, atol=0)


HEADS = {"num_heads": 4, "attention_dim": 8, "num_layers": 1}


def probe_on(model, **fields):
    torch.manual_seed(0)
    return build_probe_from_config(
        ProbeConfig(**{"target_layers": ["last_layer"], **fields}), 5, "cpu", base_model=model
    ).eval()


@pytest.mark.parametrize("fields", [{}, {"probe_type": "attention", "aggregation": "none", **HEADS}], ids=str)
def test_a_clip_has_the_same_logits_padded_and_alone_if_padding_is_excluded(fields):
    model, wave, mask = tiny_eat(), noise(2) + 0.1, half_padded()
    wave[1, RATE // 2 :] = 0
    plain, excluding = probe_on(model, **fields), probe_on(model, extra_config={"exclude_padding": True}, **fields)
    with torch.no_grad():
        for probe in (plain, excluding):
            together, alone = probe(wave, mask), torch.cat([probe(wave[:1]), probe(wave[1:, : RATE // 2])])
            assert torch.allclose(together, alone, atol=1e-4) == (probe is excluding)
        # What the clip is filled up with is left out without a mask too.
        torch.testing.assert_close(excluding(wave), excluding(wave, torch.zeros_like(mask)))


def test_a_mask_of_another_length_is_refused_where_it_matters():
    probe = probe_on(tiny_eat(), extra_config={"exclude_padding": True})
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2, 57\); expected \(2, 16000\)"):
        probe(noise(2), torch.zeros(2, TOKENS, dtype=torch.bool))


# -- heads, probes, copies for export ------------------------------------------------------------------------------


def test_logits_are_of_the_class_token():
    model, wave = tiny_eat(num_classes=5), noise(2)
    with torch.no_grad():
        output = taps(model, wave, ["backbone"])["backbone"]
        torch.testing.assert_close(model(wave), model.classifier(output[:, 0]))


def test_probes_are_built_whatever_the_clip_length():
    model = tiny_eat()
    for fields in ({}, {"target_length": 1024}, {"target_length": 5 * RATE}):
        probe = probe_on(model, aggregation="none", **fields)
        assert probe.input_dim == [(TOKENS, 32)]
        with torch.no_grad():
            assert probe(noise(2, seconds=0.3)).shape == (2, 5)
    model.audio_config = None
    assert probe_on(model).input_width == 32
    assert model.clip_samples == 400 + 111 * 160


@pytest.mark.parametrize("layer", ["backbone", "backbone.model.pre_norm", "backbone.model.blocks.0.mlp"])
def test_probes_on_other_layers(layer):
    model, wave = tiny_eat(), noise(2)
    probe = probe_on(model, target_layers=[layer])
    with torch.no_grad():
        torch.testing.assert_close(probe(wave), probe.classifier(taps(model, wave, [layer])[layer].mean(dim=1)))


# -- checkpoints ---------------------------------------------------------------------------------------------------


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fairseq(tensors):
    """The names that the self-supervised checkpoints have, and the decoder in them."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("backbone.model.")
        if name.startswith("pre_norm."):
            name = name.replace("pre_norm", "context_encoder.norm")
        renamed[name if name.startswith("blocks.") else f"modality_encoders.IMAGE.{name}"] = tensor
    for i in range(2):
        renamed[f"modality_encoders.IMAGE.decoder.blocks.{i}.0.weight"] = torch.zeros(32, 2, 3, 3)
        renamed[f"modality_encoders.IMAGE.decoder.blocks.{i}.0.bias"] = torch.zeros(32)
    renamed["modality_encoders.IMAGE.decoder.proj.weight"] = torch.zeros(32, 32)
    return renamed


@pytest.mark.parametrize("form", ["safetensors", "wrapped"])
@pytest.mark.parametrize("features_only", [False, True])
def test_fairseqs_names_are_ours(tmp_path, form, features_only):
    model = tiny_eat(seed=4)
    tensors = fairseq(state(model))
    assert not any(name in model.state_dict() for name in tensors)
    if form == "safetensors":
        path = tmp_path / "eat.safetensors"
        save_file(tensors, path)
    else:
        path = tmp_path / "eat.pt"
        torch.save({"model": tensors, "cfg": None}, path)
    loaded = avex_serve.load_model(tiny_eat_spec(), checkpoint_path=str(path), return_features_only=features_only)
    assert loaded.classifier is None
    with torch.no_grad():
        torch.testing.assert_close(loaded(noise(2)), model(noise(2)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"modality_encoders.IMAGE.extra": torch.zeros(1)}, "1 unexpected: backbone.model.extra"),
        ({"decoder.proj.weight": torch.zeros(1)}, "1 unexpected: backbone.decoder.proj.weight"),
        ({"blocks.0.norm1.weight": torch.zeros(3)}, "backbone.model.blocks.0.norm1.weight is \\(3,\\), not"),
        ({"blocks.0.norm1.weight": None}, "1 missing: backbone.model.blocks.0.norm1.weight"),
    ],
    ids=str,
)
def test_fairseqs_names_are_loaded_strictly(tmp_path, damage, message):
    tensors = {**fairseq(state(tiny_eat())), **damage}
    save_file({name: t for name, t in tensors.items() if t is not None}, tmp_path / "eat.safetensors")
    with pytest.raises(ValueError, match=message):
        avex_serve.load_model(tiny_eat_spec(), checkpoint_path=str(tmp_path / "eat.safetensors"))


def test_the_classifier_is_the_checkpoints(tmp_path):
    model, path = tiny_eat(seed=4, num_classes=6), tmp_path / "eat.safetensors"
    save_file(state(model), path)
    loaded = avex_serve.load_model(tiny_eat_spec(), checkpoint_path=str(path))
    features = avex_serve.load_model(tiny_eat_spec(), checkpoint_path=str(path), return_features_only=True)
    with torch.no_grad():
        assert loaded(noise(2)).shape == (2, 6)
        torch.testing.assert_close(loaded(noise(2)), model(noise(2)), rtol=0, atol=0)
        assert features.classifier is None
        assert features(noise(2)).shape == (2, TOKENS, 32)


def test_the_fingerprint_tells_apart_what_the_weights_do_not():
    variants = [{}, {"num_heads": 8}, {"fields": {"eat_norm_mean": -5.553}}, {"fields": {"eat_norm_std": 4.606}}]
    assert len({fingerprint(tiny_eat(**options)) for options in variants}) == len(variants)
    explicit = tiny_eat(fields={"eat_norm_mean": -4.268, "eat_norm_std": 4.569})
    assert fingerprint(explicit) == fingerprint(tiny_eat())


def test_the_official_models_are_there():
    models = avex_serve.list_models()
    for name in ("eat_all", "eat_bio", "sl_eat_all_ssl_all", "sl_eat_bio_ssl_all"):
        repository = f"esp-aves2-{name.replace('_', '-')}"
        expected = f"hf://EarthSpeciesProject/{repository}/{repository}.safetensors"
        assert models[f"esp_aves2_{name}"]["checkpoint_path"] == expected
        spec = avex_serve.get_model_spec(f"esp_aves2_{name}")
        assert (spec.name, spec.eat_norm_mean, spec.init_config) == ("eat_hf", -4.268, None)
    layers = avex_serve.list_model_layers("esp_aves2_eat_bio")
    assert layers["layers"] == [f"backbone.model.blocks.{i}.attn.proj" for i in range(12)]
