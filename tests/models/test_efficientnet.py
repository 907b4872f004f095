import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import avex_serve
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.models.checkpoints import fingerprint
from avex_serve.models.efficientnet import Bottleneck, ConvNorm, SqueezeExcite
from avex_serve.models.layers import Taps
from avex_serve.models.probes import build_probe_from_config
from avex_serve.models.utils.factory import build_model_from_spec
from tests.models.backbones import RATE, effnet, effnet_spec, noise

FIRST, LAST = "model.features.0.0", "model.features.8.0"
# The blocks of stages 2 to 7: arXiv 1905.11946, table 1; B1 is 1.1 times as deep, rounded up.
BLOCKS = {"b0": (2, 2, 3, 3, 4, 1), "b1": (3, 3, 4, 4, 5, 2)}
STEPS = 4  # of the last layers, of 1 s


@pytest.fixture(scope="module")
def model():
    """One that no test changes."""
    return effnet()


def taps(model, wave, layers, mask=None):
    with torch.no_grad():
        return model.taps(wave, layers, mask)


@pytest.mark.parametrize("variant", BLOCKS)
def test_layers_are_those_of_avex(variant):
    model = build_model_from_spec(effnet_spec(variant=variant), "cpu")
    ends = [
        f"model.features.{i}.{j}.block.3.0"
        for i, blocks in enumerate(BLOCKS[variant], start=2)
        for j in range(blocks)
    ]
    assert model.get_model_layers() == [FIRST, *ends, LAST]
    assert model.last_layer_name == LAST


# As torchvision states them for its models with 1000 classes.
@pytest.mark.parametrize(("variant", "parameters"), [("b0", 5_288_548), ("b1", 7_794_184)])
def test_a_variant_has_as_many_parameters_as_torchvisions(variant, parameters):
    model = build_model_from_spec(effnet_spec(variant=variant), "cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(name.startswith("model.") for name in model.state_dict())


def in_place(modules):
    """Layers that torchvision changes after their module has run, and what they are then."""
    changed = {}
    for name, module in modules.items():
        if isinstance(module, ConvNorm) and len(module) == 3:
            changed[f"{name}.1"] = name
        if isinstance(module, SqueezeExcite):
            changed[f"{name}.fc1"] = f"{name}.activation"
        if isinstance(module, Bottleneck) and module.residual:
            last = f"{name}.block.{len(module.block) - 1}"
            changed |= dict.fromkeys([f"{name}.block", last, f"{last}.1", f"{name}.stochastic_depth"], name)
    return changed


def test_a_layer_that_torchvision_changes_in_place_is_what_it_is_in_the_end(model):
    changed = in_place(dict(model.named_modules()))
    found = taps(model, noise(1), model.tappable_layers())
    assert {"model.features.2.1.block", "model.features.0.1", "model.features.1.0.block.1.fc1"} <= changed.keys()
    for layer, same in changed.items():
        assert torch.equal(found[layer], found[same])
        # Alone as well, where the pass would end before the change.
        torch.testing.assert_close(taps(model, noise(1), [layer])[layer], found[layer], rtol=0, atol=0)


def test_a_layer_is_what_a_hook_on_that_module_would_hold(model):
    wave, held = noise(1), {}
    modules = dict(model.named_modules())
    layers = [name for name in model.tappable_layers() if name in modules and name not in in_place(modules)]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: held.update({name: out}))
        for name in layers
    ]
    found = taps(model, wave, model.tappable_layers())
    for hook in hooks:
        hook.remove()
    assert set(found) == set(model.tappable_layers())
    assert {"model.features.1.0.block.2.0", "model.features.3", "model.features.5.1", *model.get_model_layers()} <= {
        *layers
    }
    for name in layers:
        torch.testing.assert_close(found[name], held[name], rtol=0, atol=0)
    with torch.no_grad():
        output = model(wave)
    torch.testing.assert_close(found["backbone"], output, rtol=0, atol=0)
    torch.testing.assert_close(found["model.avgpool"][..., 0, 0], output.mean(dim=(2, 3)))


def test_feature_maps_halve_where_the_paper_says(model):
    found = taps(model, noise(1), [f"model.features.{i}" for i in range(9)])
    channels, strides = (32, 16, 24, 40, 80, 112, 192, 320, 1280), (2, 2, 4, 8, 16, 16, 32, 32, 32)
    for i, (width, stride) in enumerate(zip(channels, strides, strict=True)):
        assert found[f"model.features.{i}"].shape == (1, width, 64 // stride, -(-101 // stride))


def test_a_block_is_its_formula(model):
    name, state = "model.features.2.1", model.state_dict()
    found = taps(model, noise(2), ["model.features.2.0", name])

    def normed(x, part, **options):
        weight, key = state[f"{name}.block.{part}.0.weight"], f"{name}.block.{part}.1."
        x = F.conv2d(x, weight, **options)
        mean, variance, gain, bias = (
            state[key + of][:, None, None] for of in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * gain + bias

    before = found["model.features.2.0"]
    x = F.silu(normed(before, 0))
    x = F.silu(normed(x, 1, padding=1, groups=x.shape[1]))
    squeezed = x.mean(dim=(2, 3))
    for part, activation in (("fc1", F.silu), ("fc2", torch.sigmoid)):
        key = f"{name}.block.2.{part}."
        squeezed = activation(F.linear(squeezed, state[key + "weight"][:, :, 0, 0], state[key + "bias"]))
    x = before + normed(x * squeezed[:, :, None, None], 3)
    torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, STEPS])
def test_a_batch_is_its_rows(model, rows):
    layers, wave = model.get_model_layers(), noise(rows)
    together = taps(model, wave, layers)
    assert together[LAST].shape == (rows, 1280, 2, STEPS)
    for i in (0, rows - 1):
        alone = taps(model, wave[i : i + 1], layers)
        for layer in layers:
            torch.testing.assert_close(together[layer][i], alone[layer][0], rtol=1e-3, atol=1e-3)


def test_a_pass_stops_when_it_has_what_was_asked_for(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.features[3][1].block[1][0].weight.fill_(torch.nan)
        broken.model.features[3][0].block[3][1].weight.fill_(torch.nan)
    layer = "model.features.3.0.block.3.0"
    assert taps(broken, noise(1), [FIRST, layer])[layer].isfinite().all()
    assert taps(broken, noise(1), [LAST])[LAST].isnan().any()


# -- training ------------------------------------------------------------------------------------------------------


def test_stochastic_depth_leaves_out_whole_branches_and_scales_the_others(model):
    block = copy.deepcopy(model.model.features[5][1])
    assert isinstance(block, Bottleneck)
    x = taps(model, noise(1), ["model.features.5.0"])["model.features.5.0"].expand(64, -1, -1, -1)
    collector = Taps(["nothing"])
    torch.manual_seed(0)
    with torch.no_grad():
        branch = block(x, collector, "") - x
        block.training, block.dropped = True, 0.25  # its norms stay in evaluation
        trained = block(x, collector, "") - x
    kept = trained.flatten(1).abs().amax(dim=1) > 0
    assert 40 <= kept.sum() <= 56
    torch.testing.assert_close(trained[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-4)


def test_later_blocks_are_dropped_more_often(model):
    probabilities = [module.dropped for module in model.modules() if isinstance(module, Bottleneck)]
    assert probabilities == pytest.approx([0.2 * i / 16 for i in range(16)])


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_trains_with_the_backbone_only(freeze):
    model = effnet()
    config = ProbeConfig(target_layers=["last_layer"], freeze_backbone=freeze)
    probe = build_probe_from_config(config, 3, "cpu", base_model=model).train()
    before = model.state_dict()["model.features.0.1.running_mean"].clone()
    probe(noise(2)).sum().backward()
    moved = not torch.equal(model.state_dict()["model.features.0.1.running_mean"], before)
    assert moved is not freeze
    assert (model.model.features[0][0].weight.grad is None) is freeze


# -- masks ---------------------------------------------------------------------------------------------------------


def padded_from(samples, *, length=RATE):
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, samples:] = True
    return mask


def test_masks_are_accepted_and_change_nothing(model):
    wave, mask = noise(2), padded_from(5000)
    torch.testing.assert_close(taps(model, wave, [LAST], mask)[LAST], taps(model, wave, [LAST])[LAST])
    with torch.no_grad():
        torch.testing.assert_close(model(wave, mask), model(wave))


# 101 frames of 1 s, 160 samples apart; of a step of 32 frames, all centres must be in the padding.
@pytest.mark.parametrize(
    ("layer", "start", "padded"),
    [(LAST, 10241, 1), (LAST, 10240, 2), (LAST, 1, 3), (LAST, 0, 4), (FIRST, 8000, 26), ("model.avgpool", 1, 0)],
)
def test_the_mask_of_samples_is_brought_to_time_steps(model, layer, start, padded):
    embedding = taps(model, noise(2), [layer])[layer]
    steps = model.token_mask(padded_from(start), embedding.shape[3])
    assert steps.shape == (2, embedding.shape[3])
    assert not steps[0].any()
    assert steps[1].tolist() == [False] * (len(steps[1]) - padded) + [True] * padded


@pytest.mark.parametrize("shape", [(2, 4), (2, RATE // 2), (RATE,)])
def test_a_mask_of_another_length_is_refused_where_padding_is_excluded(model, shape):
    config = ProbeConfig(target_layers=[LAST], extra_config={"exclude_padding": True})
    probe = build_probe_from_config(config, 3, "cpu", base_model=model)
    with pytest.raises(ValueError, match="padding_mask has shape"):
        probe(noise(2), torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_padded_steps_can_be_excluded_though_layers_differ_in_length(model, how):
    layers, wave, mask = [FIRST, LAST], noise(2), padded_from(RATE // 2)
    config = ProbeConfig(target_layers=layers, aggregation=how, extra_config={"exclude_padding": True})
    probe = build_probe_from_config(config, 3, "cpu", base_model=model)
    with torch.no_grad():
        features, _ = probe.combine(wave, mask)
    found = taps(model, wave, layers)
    valid = {FIRST: 25, LAST: 2}  # steps of the second clip
    reduce = {"mean": lambda x: x.mean(dim=-1), "max": lambda x: x.amax(dim=-1)}[how]
    rows = [torch.cat([reduce(found[layer][0]).flatten() for layer in layers])]
    rows.append(torch.cat([reduce(found[layer][1, ..., : valid[layer]]).flatten() for layer in layers]))
    torch.testing.assert_close(features, torch.stack(rows))


def test_a_sequence_head_gets_the_mask_of_the_shortest_layer(model):
    config = ProbeConfig(
        probe_type="lstm",
        target_layers=["model.features.4.0.block.3.0", LAST],
        input_processing="sequence",
        lstm_hidden_size=4,
        num_layers=1,
        extra_config={"exclude_padding": True},
    )
    probe = build_probe_from_config(config, 3, "cpu", base_model=model).eval()
    with torch.no_grad():
        features, padding = probe.combine(noise(2), padded_from(RATE // 2))
    assert features.shape == (2, STEPS, 1280 * 2)
    assert padding.tolist() == [[False] * 4, [False, False, True, True]]


# -- audio ---------------------------------------------------------------------------------------------------------


def test_the_image_is_the_spectrogram_three_times(model):
    image = model.process_audio(noise(2))
    assert image.shape == (2, 3, 64, 101)
    assert (image.amin(), image.amax()) == (0, 1)
    torch.testing.assert_close(image[:, 0], model.audio_processor(noise(2)), rtol=0, atol=0)
    torch.testing.assert_close(image[:, 0], image[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda wave: wave[0]])
def test_other_types_and_one_dimension_are_taken(model, convert):
    wave = noise(1).half().float()
    with torch.no_grad():
        torch.testing.assert_close(model(convert(wave)), model(wave))


@pytest.mark.parametrize(
    ("wave", "error", "message"),
    [
        (torch.zeros(1, 400), RuntimeError, "the spectrogram needs 401"),
        (torch.zeros(1, 0), ValueError, "cannot be empty"),
        (torch.zeros(1, 1, RATE), ValueError, "expected \\(batch, samples\\)"),
        (None, ValueError, "cannot be None"),
    ],
)
def test_unusable_audio_is_refused(model, wave, error, message):
    with pytest.raises(error, match=message):
        model(wave)


def test_the_shortest_clip_is_heard(model):
    with torch.no_grad():
        assert model(noise(1)[:, :401]).shape == (1, 1280, 2, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"audio_config": None}, "needs an audio_config"),
        ({"audio_config": AudioConfig(representation="raw")}, "representation 'mel_spectrogram'"),
        ({"audio_config": AudioConfig(n_fft=800, win_length=802)}, "win_length 802; expected at most"),
        ({"efficientnet_variant": "b2"}, "'b0' or 'b1'"),
    ],
    ids=str,
)
def test_what_can_not_be_built_is_told(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_model_from_spec(ModelSpec(name="efficientnet", **fields), "cpu")


# -- aggregation, checkpoints, export ------------------------------------------------------------------------------


def test_avexs_way_to_embeddings(model):
    wave = noise(2)
    assert model.register_hooks_for_layers([-1, FIRST, "backbone"]) == [LAST, FIRST, "backbone"]
    last, first, output = model.extract_embeddings(wave)
    assert [tuple(e.shape) for e in (last, first, output)] == [(2, 1280, 2, 4), (2, 32, 32, 51), (2, 1280, 2, 4)]
    for how, reduced in (("mean", last.mean(dim=3)), ("max", last.amax(dim=3)), ("cls_token", last[:, 0])):
        model.register_hooks_for_layers([-1])
        torch.testing.assert_close(model.extract_embeddings(wave, aggregation=how), reduced.flatten(1))
    model.deregister_all_hooks()


FORMS = {
    "as saved": lambda s: s,
    "without prefix": lambda s: {n.removeprefix("model."): t for n, t in s.items()},
    "lightning": lambda s: {f"model.{n}": t for n, t in s.items()},
    "data parallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "scalars as one value": lambda s: {n: t.reshape(1) if t.ndim == 0 else t for n, t in s.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_checkpoints_with_a_classifier_load_with_and_without_it(tmp_path, form):
    model, wave, path = effnet(num_classes=4), noise(2), tmp_path / "checkpoint.safetensors"
    save_file(form({n: t.clone() for n, t in model.state_dict().items()}), path)
    whole = avex_serve.load_model(effnet_spec(), checkpoint_path=str(path))
    features = avex_serve.load_model(effnet_spec(), checkpoint_path=str(path), return_features_only=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(wave), model(wave), rtol=0, atol=0)
        assert whole(wave).shape == (2, 4)
        pooled = features(wave).mean(dim=(2, 3))
        torch.testing.assert_close(whole.model.classifier[1](pooled), whole(wave))
    assert features.model.classifier[1].out_features == 1000  # avex's state dicts have it, unused


def test_checkpoints_without_a_classifier_give_features(tmp_path, model):
    path = tmp_path / "checkpoint.safetensors"
    state = {n: t.clone() for n, t in model.state_dict().items() if "classifier" not in n}
    save_file(state, path)
    with torch.no_grad():
        loaded = avex_serve.load_model(effnet_spec(), checkpoint_path=str(path))
        torch.testing.assert_close(loaded(noise(1)), model(noise(1)), rtol=0, atol=0)
    del state["model.features.8.1.bias"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"1 missing: model\.features\.8\.1\.bias"):
        avex_serve.load_model(effnet_spec(), checkpoint_path=str(path))


def test_the_fingerprint_tells_apart_what_the_weights_do_not():
    variants = [{}, {"hop_length": 200}, {"n_mels": 32}, {"window": "hamming"}, {"normalize": False}]
    prints = set()
    for options in variants:
        torch.manual_seed(0)
        prints.add(fingerprint(build_model_from_spec(effnet_spec(**options), "cpu")))
    assert len(prints) == len(variants)
