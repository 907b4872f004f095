"""Each pass over each architecture: the same numbers but for rounding, and what is left out is gone."""

import copy

import pytest
import torch
from torch import nn

from avex_export.architectures import efficientnet, transformers
from avex_export.passes import PASSES, Target, rewrite
from avex_serve.configs import AudioConfig, ProbeConfig
from avex_serve.models.base_model import ModelBase
from avex_serve.models.layers import BACKBONE
from avex_serve.models.probes import build_probe_from_config
from tests.models.backbones import RATE, effnet, noise, tiny_beats, tiny_eat

NAMES = [each.name for each in PASSES]
BEATS_BLOCK, EAT_BLOCK = "backbone.encoder.layers.0", "backbone.model.blocks.0"
MODELS = {
    "beats": tiny_beats,
    "beats without a gate": lambda: tiny_beats(gru_rel_pos=False),
    "beats without positions": lambda: tiny_beats(relative_position_embedding=False),
    "beats with norms first": lambda: tiny_beats(layer_norm_first=True, deep_norm=False),
    "beats with gated units": lambda: tiny_beats(activation_fn="glu", deep_norm=False),
    "eat": tiny_eat,
    "efficientnet": lambda: effnet(n_mels=32),
}
# Passes that are about other architectures have nothing to leave out.
IRRELEVANT = {
    "beats": {"fourier", "image", "batch-norm"},
    "eat": {"fourier", "image", "batch-norm", "position-bias"},
    "efficientnet": {"front-end", "position-bias", "projections", "norms"},
}
CASES = [
    (name, without)
    for name in MODELS
    for without in [(), *NAMES, NAMES]
    if not (isinstance(without, str) and without in IRRELEVANT[name.split()[0]])
]


def probe_on(model, layers, aggregation="mean", **fields):
    config = ProbeConfig(target_layers=list(layers), aggregation=aggregation, **fields)
    torch.manual_seed(0)
    return build_probe_from_config(config, 5, "cpu", base_model=model).eval()


def rewritten(probe, samples=RATE, without=()):
    special = copy.deepcopy(probe)
    return special, rewrite(Target((special,), samples), without)


def assert_same(found, expected, **message):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale, **message)


@torch.no_grad()
def embeddings(probe, wave):
    return probe.combine(wave)[0]


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize(("name", "without"), CASES, ids=str)
def test_every_pass_changes_the_numbers_by_rounding_only(models, name, without):
    wave = noise(2)
    for layers, aggregation in (("last_layer",), "mean"), (("all",), "mean"), (("all",), "none"):
        if name == "efficientnet" and (aggregation == "none" or (without and layers == ("all",))):
            continue  # a head on all its maps is enormous, and once is enough for the others
        probe = probe_on(models[name], layers, aggregation)
        before = {key: tensor.clone() for key, tensor in probe.state_dict().items()}
        left_out = [without] if isinstance(without, str) else without
        special, applied = rewritten(probe, without=left_out)
        assert not set(left_out) & set(applied)
        assert_same(embeddings(special, wave), embeddings(probe, wave))
        assert all(torch.equal(tensor, before[key]) for key, tensor in probe.state_dict().items())


@pytest.mark.parametrize("aggregation", ["mean", "max", "cls_token"])
@pytest.mark.parametrize("name", ["beats", "eat", "efficientnet"])
def test_every_aggregation_is_kept(models, name, aggregation):
    for layers in ([0, "last_layer"], [BACKBONE]):
        probe = probe_on(models[name], layers, aggregation)
        special, applied = rewritten(probe)
        assert_same(embeddings(special, noise(2)), embeddings(probe, noise(2)))
        if aggregation == "max":
            assert "pooling" not in applied


# Layers of which some can't be rewritten: their values would be others, or they would be gone.
TAPPED = {
    "beats": [
        [BEATS_BLOCK],
        [f"{BEATS_BLOCK}.self_attn.q_proj", f"{BEATS_BLOCK}.fc2"],
        [f"{BEATS_BLOCK}.self_attn_layer_norm", "last_layer"],
        [f"{BEATS_BLOCK}.self_attn"],
        [f"{BEATS_BLOCK}.fc1", f"{BEATS_BLOCK}.fc2"],
        ["backbone.encoder.layer_norm"],
        ["backbone.patch_embedding"],
        ["backbone", "last_layer"],
    ],
    "eat": [
        [EAT_BLOCK],
        [f"{EAT_BLOCK}.attn.qkv", f"{EAT_BLOCK}.attn.proj"],
        [f"{EAT_BLOCK}.norm1", "last_layer"],
        [f"{EAT_BLOCK}.mlp.fc2", "last_layer"],
        ["backbone.model.pre_norm"],
        ["backbone.model.local_encoder.proj"],
        ["backbone", "last_layer"],
    ],
    "efficientnet": [
        ["model.features.0.1"],
        ["model.features.2.1.block.3"],
        ["model.features.2.1.block.3.0", "model.features.0.0"],
        ["model.features.0.0"],
        ["model.features.1.0.block.2.0"],
        ["model.features.2.0.block.2.fc1", "model.features.2.0.block.3.0"],
        ["model.features.2.0.block.2.fc2"],
        ["model.features.2.1.stochastic_depth", "model.features.2.1.block.0.0"],
        ["model.features.2.1.block.1.0"],
        ["model.features.3", "model.features.2.0"],
        ["model.avgpool"],
        ["backbone", "last_layer"],
    ],
}


@pytest.mark.parametrize(
    ("name", "layers"), [(name, each) for name, all_ in TAPPED.items() for each in all_], ids=str
)
def test_any_layer_can_be_tapped_in_a_rewritten_probe(models, name, layers):
    probe = probe_on(models[name], layers)
    assert_same(embeddings(rewritten(probe)[0], noise(2)), embeddings(probe, noise(2)))


# What is left of the network for some layers: the end of the names of parameters that must be there, and mustn't.
KEPT = {
    ("beats", (f"{BEATS_BLOCK}.fc2",)): (["layers.0.fc2.weight"], ["layers.1.", "predictor", "classifier"]),
    ("beats", ("backbone.post_extract_proj",)): (["post_extract_proj.weight"], ["layers.0."]),
    ("eat", (EAT_BLOCK,)): (["blocks.0.norm2.weight"], ["blocks.1."]),
    ("eat", (f"{EAT_BLOCK}.attn.proj",)): (
        ["blocks.0.attn.proj.weight"],
        ["blocks.0.norm1", "blocks.0.mlp", "blocks.1."],
    ),
    ("eat", ("backbone.model.pre_norm",)): (["pre_norm.weight"], ["blocks.0."]),
    ("eat", (BACKBONE,)): (["blocks.1.norm2.weight"], ["classifier"]),
    ("efficientnet", ("model.features.2.1.block.0.0",)): (
        ["2.1.block.0.0.weight"],
        ["2.1.block.0.1", "2.1.block.1"],
    ),
    ("efficientnet", ("model.features.2.0",)): (["2.0.block.3.1.weight"], ["features.2.1", "features.3"]),
    ("efficientnet", ("model.avgpool",)): (["features.8.1.weight"], ["classifier"]),
}


@pytest.mark.parametrize(("case", "left"), KEPT.items(), ids=str)
def test_what_the_layers_do_not_need_is_left_out(models, case, left):
    name, layers = case
    special, _ = rewritten(probe_on(models[name], layers), without=[n for n in NAMES if n != "dead-layers"])
    parameters = [key for key, _ in special.base_model.named_parameters()]
    for end in left[0]:
        assert any(key.endswith(end) for key in parameters)
    for part in left[1]:
        assert not any(part in key for key in parameters)


@pytest.mark.parametrize("samples", [RATE // 2, 2 * RATE])
@pytest.mark.parametrize("name", ["beats", "eat", "efficientnet"])
def test_a_copy_is_for_clips_of_one_length(models, name, samples):
    probe = probe_on(models[name], ["last_layer"], target_length=samples)
    special, _ = rewritten(probe, samples)
    wave = noise(3, seconds=samples / RATE)
    assert_same(embeddings(special, wave), embeddings(probe, wave))


@pytest.mark.parametrize("aggregation", ["mean", "none"])
def test_a_probe_that_leaves_out_what_a_clip_is_filled_up_with_still_does(models, aggregation):
    head = {} if aggregation == "mean" else {"probe_type": "lstm", "lstm_hidden_size": 8, "num_layers": 1}
    probe = probe_on(models["eat"], ["last_layer"], aggregation, extra_config={"exclude_padding": True}, **head)
    special, applied = rewritten(probe)
    assert "pooling" not in applied
    assert_same(embeddings(special, noise(2)), embeddings(probe, noise(2)))
    with torch.no_grad():
        assert_same(special(noise(2)), probe(noise(2)))


@pytest.mark.parametrize("fields", [{}, {"aggregation": "none", "input_processing": "pooled"}], ids=str)
@pytest.mark.parametrize("name", ["beats", "eat", "efficientnet"])
def test_the_mean_is_taken_before_the_last_operator(models, name, fields):
    probe = probe_on(models[name], ["last_layer"], **fields)
    special, applied = rewritten(probe)
    assert "pooling" in applied
    assert_same(embeddings(special, noise(2)), embeddings(probe, noise(2)))
    assert (
        sum(isinstance(part, transformers.MeanOverTime | efficientnet.MeanOverTime) for part in special.modules())
        == 1
    )


class Seeing(ModelBase):
    """A model that makes a spectrogram of half of its clip."""

    def __init__(self, **audio):
        super().__init__(
            audio_config=AudioConfig(**{"n_fft": 512, "n_mels": 32, "target_length_seconds": 1} | audio)
        )
        self.fc = nn.Linear(32, 5)

    def forward(self, x, padding_mask=None):
        return self.fc(self.process_audio(x[:, : RATE // 2]).transpose(1, 2))


def test_a_transform_of_odd_length_has_no_fold():
    _, applied = rewritten(probe_on(Seeing(n_fft=401).eval(), ["fc"]))
    assert applied == []


def test_a_spectrogram_of_a_model_of_ones_own_is_folded_too():
    torch.manual_seed(0)
    probe = probe_on(Seeing().eval(), ["fc"])
    special, applied = rewritten(probe)
    assert applied == ["fourier"]
    assert special.base_model.audio_spectrogram.fixed_samples == RATE // 2
    assert_same(embeddings(special, noise(2)), embeddings(probe, noise(2)))
