"""Backbones that are not ours: subclasses with no more than forward, and plain torch modules."""

import gc
from importlib import import_module

import pytest
import torch
from torch import nn

import avex_serve
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.models.base_model import ModelBase, adapt
from avex_serve.models.frontends import Spectrogram
from avex_serve.models.layers import tap_by_hooks
from avex_serve.models.probes import LinearProbe, LSTMProbe, build_probe_from_config, load_probe, save_probe
from tests.models.backbones import noise

AUDIO = {"sample_rate": 16000, "representation": "raw", "target_length_seconds": 1}
STEP = 1000  # samples of a time step of the networks below


class Network(ModelBase):
    """As avex's documentation writes custom models: a constructor and a forward pass."""

    def __init__(self, device="cpu", audio_config=AUDIO, num_classes=4):
        super().__init__(device=device, audio_config=audio_config)
        self.embed = nn.Linear(STEP, 8)
        self.recur = nn.GRU(8, 6)  # time first
        self.mix = nn.Linear(6, 5)
        self.unused = nn.Linear(1, 1)
        self.classifier = nn.Linear(5, num_classes)
        self.to(device)

    def forward(self, x, padding_mask=None):
        steps = self.embed(self.process_audio(x).unflatten(1, (-1, STEP)))  # (B, T, 8)
        if padding_mask is not None:
            steps = steps * ~padding_mask.unflatten(1, (-1, STEP)).all(dim=-1, keepdim=True)
        mixed = self.mix(self.recur(steps.transpose(0, 1))[0])  # (T, B, 5)
        return self.classifier(mixed.mean(dim=0))


class Plain(nn.Module):
    """A torch module that only names its layers."""

    def __init__(self):
        super().__init__()
        self.network = Network()
        self.audio_config = AUDIO

    def get_model_layers(self):
        return ["network.embed", "network.mix"]

    def forward(self, wave, padding_mask=None):
        return self.network(wave, padding_mask)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Plain().eval()


def expected(network, wave):
    """Outputs of the layers, written out."""
    embed = network.embed(wave.unflatten(1, (-1, STEP)))
    recur = network.recur(embed.transpose(0, 1))[0].transpose(0, 1)
    return {"embed": embed, "recur": recur, "mix": network.mix(recur)}


def config(*layers, **options):
    return ProbeConfig(target_layers=list(layers), **{"aggregation": "mean", **options})


def build(base, *layers, **options):
    return build_probe_from_config(config(*layers, **options), num_classes=3, device="cpu", base_model=base)


def test_layers_of_a_subclass(network):
    layers = avex_serve.list_model_layers(network)
    assert layers["layers"] == ["embed", "mix", "unused", "classifier"]
    assert layers["last_layer"] == "unused"
    assert network.get_model_layer_map()[1] == "mix"
    assert network.audio_config == AudioConfig(**AUDIO)
    assert network.clip_samples == 16000


# A batch as long as a clip has time steps is where sizes can't tell one from the other.
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_embeddings_are_batch_first_whatever_the_layer_is(network, rows):
    wave = noise(rows)
    network.register_hooks_for_layers(["embed", "recur", "mix"])
    found = network.extract_embeddings(wave)
    for embedding, wanted in zip(found, expected(network, wave).values(), strict=True):
        torch.testing.assert_close(embedding, wanted)
    network.register_hooks_for_layers(["backbone"])
    torch.testing.assert_close(network.extract_embeddings(wave), network(wave))
    assert network.extract_embeddings(wave[0]).shape == (1, 4)


def test_masks_reach_the_model(network):
    mask = torch.zeros(2, 16000, dtype=torch.bool)
    mask[1, 8000:] = True
    probe = build(network, "mix").eval()
    masked, plain = probe(noise(2), mask), probe(noise(2))
    torch.testing.assert_close(masked[0], plain[0])
    assert not torch.allclose(masked[1], plain[1])


@pytest.mark.parametrize("kind", ["network", "plain"])
def test_two_probes_on_one_model_never_touch_each_other(kind, request):
    model = request.getfixturevalue(kind)
    prefix = "" if kind == "network" else "network."
    first = build(model, f"{prefix}mix").eval()
    before = first(noise(2))
    second = build(model, f"{prefix}embed", f"{prefix}mix").eval()
    assert second(noise(2)).shape == (2, 3)
    assert torch.equal(first(noise(2)), before)
    del second
    gc.collect()
    assert torch.equal(first(noise(2)), before)
    assert not any(part._forward_hooks for part in model.modules())


def test_hooks_are_gone_after_a_pass_that_fails(network):
    with pytest.raises(RuntimeError):
        tap_by_hooks(network, noise(1)[:, :1500], ["embed"])
    assert not any(part._forward_hooks for part in network.modules())


def test_a_frozen_model_gets_no_gradient_and_an_unfrozen_one_does(network):
    probe = build(network, "mix").train()
    assert not network.training
    probe(noise(2)).sum().backward()
    assert network.mix.weight.grad is None
    probe = build(network, "mix", freeze_backbone=False).train()
    probe(noise(2)).sum().backward()
    assert network.mix.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("probe_type", ["linear", "lstm"])
def test_a_plain_module_is_probed_like_the_model_inside_it(plain, probe_type):
    options = {"lstm_hidden_size": 4, "num_layers": 1, "aggregation": "none"} if probe_type == "lstm" else {}
    probe = build(plain, "network.embed", "network.mix", probe_type=probe_type, **options).eval()
    same = build(plain.network, "embed", "mix", probe_type=probe_type, **options).eval()
    same.load_state_dict({**same.state_dict(), **probe.head_state()})
    assert torch.equal(probe(noise(2)), same(noise(2)))
    assert avex_serve.list_model_layers(plain)["layers"] == ["network.embed", "network.mix"]
    assert adapt(plain).audio_config.sample_rate == 16000


def test_a_saved_probe_finds_its_plain_module_again(plain, tmp_path):
    probe = build(plain, "last_layer").eval()
    save_probe(probe, tmp_path / "probe")
    assert torch.equal(load_probe(tmp_path / "probe", base_model=plain)(noise(2)), probe(noise(2)))
    with pytest.raises(ValueError, match="was trained on a backbone with fingerprint"):
        load_probe(tmp_path / "probe", base_model=Plain())


def test_checkpoints_load_into_a_registered_plain_class(clean_registry, plain, tmp_path):
    avex_serve.register_model_class(Plain)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pt")
    avex_serve.register_model("mine", ModelSpec(name="plain"), str(tmp_path / "plain.pt"))
    loaded = avex_serve.load_model("mine")
    assert torch.equal(loaded(noise(2)), plain(noise(2)))


class Extracting(Network):
    """A model with its own way to embeddings, with the arguments that avex's base class has."""

    def extract_embeddings(self, x, *, padding_mask=None, aggregation="none"):
        found = super().extract_embeddings(x, padding_mask=padding_mask, aggregation=aggregation)
        return [2 * e for e in found] if isinstance(found, list) else 2 * found


class Discovering(Network):
    """A model that chooses its layers as subclasses in avex do."""

    def _discover_embedding_layers(self):
        self._layer_names = ["recur", "mix"]


def test_a_class_with_its_own_extraction_is_asked_through_it():
    torch.manual_seed(0)
    model = Extracting().eval()
    model.register_hooks_for_layers(["embed"])
    twice = build(model, "embed", "mix").eval()
    once = build(Network(), "embed", "mix").eval()
    once.load_state_dict(twice.state_dict())
    once.classifier.weight.data *= 2
    torch.testing.assert_close(twice(noise(2)), once(noise(2)))
    assert model.extract_embeddings(noise(1)).shape == (1, 16, 8), "the layer chosen by hand is still chosen"


def test_a_class_chooses_its_layers():
    assert avex_serve.list_model_layers(Discovering())["layers"] == ["recur", "mix"]
    assert build(Discovering(), -1).layers == ["mix"]


class Silent(ModelBase):
    def forward(self, x, padding_mask=None):
        return {"y": x}


@pytest.mark.parametrize(
    ("base", "layer", "message"),
    [
        (Network, "unused", "doesn't reach unused"),
        (Network, "nothing", "Layer 'nothing' not found in model"),
        (Silent, "backbone", "output of layer backbone is NoneType"),
        (lambda: nn.Linear(1, 1), "backbone", r"must be an instance of ModelBase.*get_model_layers"),
    ],
)
def test_what_can_not_be_tapped(base, layer, message):
    with pytest.raises(ValueError, match=message):
        build_probe_from_config(config(layer), num_classes=3, device="cpu", base_model=base(), target_length=16000)


def test_a_model_without_an_audio_config_needs_a_length():
    model = Network(audio_config=None)
    with pytest.raises(ValueError, match="give target_length in samples"):
        build(model, "mix")
    assert build_probe_from_config(config("mix"), 3, "cpu", base_model=model, target_length=4000)(
        noise(2)
    ).shape == (2, 3)


class Seeing(ModelBase):
    """A model whose audio_config asks for a spectrogram."""

    def __init__(self, device="cpu", audio_config=None):
        super().__init__(device=device, audio_config=audio_config)
        self.fc = nn.Linear(32, 5)

    def forward(self, x, padding_mask=None):
        return self.fc(self.process_audio(x).transpose(1, 2))


def test_a_model_may_ask_for_a_spectrogram():
    audio = {"sample_rate": 16000, "n_mels": 32, "n_fft": 512, "target_length_seconds": 1}
    model = Seeing(audio_config=audio)
    torch.testing.assert_close(model.process_audio(noise(2)), Spectrogram(AudioConfig(**audio))(noise(2)))
    assert model.audio_processor.sr == 16000
    assert model.audio_processor.hop_length == 128
    assert not [name for name in model.state_dict() if not name.startswith("fc.")]
    assert build(model, "fc")(noise(2)).shape == (2, 3)


class Framed(ModelBase):
    """A model that takes frames (B, T, D) and has its own way to embeddings and of aggregating them."""

    def __init__(self):
        super().__init__(device="cpu")
        self.fc = nn.Linear(10, 6)

    def forward(self, x, padding_mask=None):
        return self.fc(x if x.ndim == 3 else x[:, None])

    def extract_embeddings(self, x, *, padding_mask=None, aggregation="none", freeze_backbone=True):
        self.asked = aggregation, freeze_backbone
        found = self.forward(x)
        return found[:, :3].sum(dim=1) if aggregation == "max" else [found] if aggregation == "mean" else found


def test_what_its_own_extraction_gives_is_taken_as_it_comes():
    model, frames = Framed().eval(), torch.randn(2, 7, 10)
    assert model.process_audio(frames) is frames
    # One tensor for two layers, pooled in its own way.
    probe = LinearProbe(model, ["fc", "fc"], 3, aggregation="max", target_length=10)
    assert probe.input_dim == [(6,)]
    torch.testing.assert_close(probe(frames), probe.classifier(model(frames)[:, :3].sum(dim=1)))
    assert model.asked == ("max", True)
    # A list in spite of an aggregation: the probe makes of it what it can.
    probe = LSTMProbe(model, ["fc"], 3, lstm_hidden_size=4, num_layers=1, aggregation="mean", target_length=10)
    assert probe(frames).shape == (2, 3)
    assert model.asked == ("mean", True)


class Cutting:
    """A processor as one may bring."""

    sr, target_length = 16000, 16 * STEP

    def __call__(self, wave):
        return wave[..., : self.target_length]


class Bare(Network):
    """Written for avex with nothing to spare: a mask without a default, and the length of a clip in a processor."""

    def __init__(self):
        super().__init__(audio_config=None)
        self.audio_processor = Cutting()

    def forward(self, x, padding_mask):
        return super().forward(x, padding_mask)


def test_a_mask_without_a_default_and_an_audio_processor_are_understood():
    base = Bare()
    assert base.clip_samples == 16 * STEP
    head = {"probe_type": "lstm", "lstm_hidden_size": 4, "num_layers": 1, "dropout_rate": 0.0}
    probe = build(base, "mix", aggregation="none", **head)
    wave = noise(2)
    with torch.no_grad():
        expected = probe(wave, torch.zeros(2, wave.shape[1], dtype=torch.bool))
        torch.testing.assert_close(probe(wave), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("avex_serve.models.beats_model", "Model"),
        ("avex_serve.models.efficientnet", "Model"),
        ("avex_serve.models.probes.linear_probe", "LinearProbe"),
        ("avex_serve.models.probes.mlp_probe", "MLPProbe"),
        ("avex_serve.models.probes.lstm_probe", "LSTMProbe"),
        ("avex_serve.models.probes.attention_probe", "AttentionProbe"),
        ("avex_serve.models.probes.transformer_probe", "TransformerProbe"),
    ],
)
def test_classes_have_avexs_import_paths(module, name):
    assert issubclass(getattr(import_module(module), name), nn.Module)


def test_an_architecture_is_built_by_its_class_with_random_weights_only():
    audio = AudioConfig(sample_rate=16000, n_fft=800, hop_length=160, n_mels=32, target_length_seconds=1)
    model = import_module("avex_serve.models.efficientnet").Model(
        num_classes=10, pretrained=False, device="cpu", audio_config=audio, return_features_only=True
    )
    assert model.eval()(noise(1), padding_mask=None).shape == (1, 1280, 1, 4)
    for cls in (type(model), import_module("avex_serve.models.beats_model").Model):
        with pytest.raises(ValueError, match="load_model"):
            cls(num_classes=10, pretrained=True, audio_config=audio)


def test_a_class_gets_the_fields_of_avexs_spec_that_it_takes(clean_registry, caplog):
    @avex_serve.register_model_class
    class Speaking(Network):
        name = "speaking"

        def __init__(self, text_model_name, device="cpu", audio_config=AUDIO):
            super().__init__(device=device, audio_config=audio_config)
            self.text_model_name = text_model_name

    spec = ModelSpec(name="speaking", text_model_name="roberta", audio_config=AudioConfig(**AUDIO))
    assert avex_serve.build_model_from_spec(spec, "cpu").text_model_name == "roberta"
    avex_serve.build_model_from_spec(spec.model_copy(update={"temperature": 0.1}), "cpu")
    assert "model class 'speaking' does not accept temperature=0.1" in caplog.text


class Hooked(Network):
    """As code for avex overrides the extraction: by the hooks of the base class."""

    def extract_embeddings(self, x, *, padding_mask=None, aggregation="none", freeze_backbone=True):
        self._clear_hook_outputs()
        self.ensure_hooks_registered()
        if not self._hooks:
            raise ValueError("no hooks")
        self.forward(x, padding_mask)
        found = list(self._hook_outputs.values())
        return [e.mean(dim=1) if aggregation == "mean" and e.ndim == 3 else e for e in found]


def test_a_class_may_handle_hooks_itself():
    base, wave = Hooked().eval(), noise(2)
    with pytest.raises(ValueError, match="no hooks"):
        base.extract_embeddings(wave)
    base.register_hooks_for_layers(["classifier", "embed"])
    embed, logits = base.extract_embeddings(wave)  # in the order of the pass
    torch.testing.assert_close(logits, base(wave))
    for given, expected in zip(base.probe_embeddings(wave, ["classifier", "embed"]), (embed, logits), strict=True):
        torch.testing.assert_close(given, expected)
    probes = [build(base, layer) for layer in ("embed", "classifier")]
    assert [probe.input_width for probe in probes] == [8, 4]
    assert all(probe(wave).shape == (2, 3) for probe in probes)
    base.deregister_all_hooks()
    assert not base._hooks
    assert not any(part._forward_hooks for part in base.modules())


def test_gradients_flow_through_extracted_embeddings_unless_frozen(network):
    network.register_hooks_for_layers(["mix"])
    assert network.extract_embeddings(noise(1), aggregation="mean").requires_grad
    assert not network.extract_embeddings(noise(1), aggregation="mean", freeze_backbone=True).requires_grad


def test_an_own_class_is_loaded_without_a_checkpoint_and_refused_without_its_classes(clean_registry):
    class Counting(Network):
        name = "counting"

        def __init__(self, device, num_classes, audio_config=AUDIO):
            super().__init__(device=device, audio_config=audio_config, num_classes=num_classes)

    class Whole(Network):
        name = "whole"

    for cls in (Counting, Whole):
        avex_serve.register_model_class(cls)
    assert avex_serve.load_model(ModelSpec(name="whole"))(noise(1)).shape == (1, 4)
    with pytest.raises(ValueError, match=r"'counting' needs num_classes; give build_model\(num_classes=...\)"):
        avex_serve.load_model(ModelSpec(name="counting"))


def test_a_batch_is_inferred_row_by_row(network):
    batch = noise(3)
    torch.testing.assert_close(network.batch_inference(batch), network(batch))
    torch.testing.assert_close(network.batch_inference(batch[None]), network(batch))
    with pytest.raises(NotImplementedError, match="Network doesn't support gradient checkpointing"):
        network.enable_gradient_checkpointing()
