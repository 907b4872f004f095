"""Models of avex itself as the backbone of our probes, compared with avex's own probes."""

import warnings

import pytest
import torch

from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.models.base_model import adapt
from avex_serve.models.efficientnet import Bottleneck
from avex_serve.models.layers import tap_by_hooks
from avex_serve.models.probes import build_probe_from_config
from avex_serve.models.probes.storage import load_head
from avex_serve.models.utils.factory import build_model_from_spec
from tests.models.backbones import TINY, noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("avex", reason="avex is not installed: its own models can't be given to our probes")
    import avex.configs
    import avex.models.efficientnet
    import avex.models.probes

# What avex itself warns of is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore")


# Without what draws random numbers in training.
STEADY = {**TINY, "encoder_layerdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0}


def beats():
    audio = avex.configs.AudioConfig(representation="raw", normalize=False, target_length_seconds=1)
    spec = avex.configs.ModelSpec(name="beats", pretrained=False, audio_config=audio, init_config=STEADY)
    return avex.build_model_from_spec(spec, "cpu")


def efficientnet():
    audio = avex.configs.AudioConfig(n_fft=800, hop_length=160, target_length_seconds=1)
    return avex.models.efficientnet.Model(pretrained=False, device="cpu", audio_config=audio)


@pytest.fixture(params=[beats, efficientnet], ids=["beats", "efficientnet"])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.mark.parametrize("layers", [["last_layer"], ["all"], [0, -1]], ids=str)
def test_our_probe_gives_what_avexs_probe_gives(model, layers):
    fields = {"probe_type": "linear", "target_layers": layers, "aggregation": "mean"}
    ours = build_probe_from_config(ProbeConfig(**fields), num_classes=3, device="cpu", base_model=model).eval()
    logits = ours(noise(3))
    assert not any(part._forward_hooks for part in model.modules())
    theirs = avex.models.probes.build_probe_from_config(
        avex.configs.ProbeConfig(**fields), num_classes=3, device="cpu", base_model=model
    ).eval()
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(noise(3)), rtol=1e-6, atol=1e-6)


def test_a_probe_trained_in_avex_answers_as_there_or_is_refused(model):
    fields = {"probe_type": "linear", "target_layers": ["last_layer"], "aggregation": "mean"}
    ours = build_ours(model)  # with the weights from before the training
    theirs = avex.models.probes.build_probe_from_config(
        avex.configs.ProbeConfig(**fields), num_classes=3, device="cpu", base_model=model
    )
    theirs.train()(noise(3))  # as in a step of the training
    with torch.no_grad():
        expected = theirs.eval()(noise(3, seed=2))

    def load(**changes):
        config = ProbeConfig(**fields, **changes)
        probe = build_probe_from_config(config, 3, "cpu", base_model=ours, target_length=16000)
        load_head(probe, theirs.state_dict(), "head.pt")
        return probe.eval()

    if hasattr(model, "backbone"):  # BEATs, which has no statistics
        probe = load()
    else:
        with pytest.raises(ValueError, match=r"another backbone.*running_mean"):
            load()
        probe = load(freeze_backbone=False)
    with torch.no_grad():
        torch.testing.assert_close(probe(noise(3, seed=2)), expected, rtol=1e-5, atol=1e-5)


def test_layers_masks_and_the_length_of_a_clip_are_avexs(model):
    mask = torch.zeros(2, 16000, dtype=torch.bool)
    mask[1, 8000:] = True
    names = model.register_hooks_for_layers(["all"])
    with torch.no_grad():
        expected = model.extract_embeddings(noise(2), padding_mask=mask, aggregation="none")
        model.deregister_all_hooks()
        found = adapt(model).taps(noise(2), names, mask)
    for name, embedding in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], embedding, rtol=0, atol=0)
    assert adapt(model).get_model_layers() == names
    assert adapt(model).clip_samples == 16000


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_any_layer_of_ours_is_what_avex_hooks(model, training, masked):
    torch.manual_seed(0)
    ours = build_ours(model)
    modules = dict(model.named_modules())
    # A model that gives features doesn't run its pooling in avex.
    names = [name for name in ours.tappable_layers() if name in modules and name != "model.avgpool"]
    assert len(names) > 20
    mask = None
    if masked:
        mask = torch.zeros(3, 16000, dtype=torch.bool)
        mask[1, 8000:] = True
    with torch.no_grad():
        theirs = tap_by_hooks(model.train(training), noise(3), names, mask)
        found = ours.train(training).taps(noise(3), names, mask)
    for name in names:
        torch.testing.assert_close(
            found[name], theirs[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def build_ours(theirs):
    """Our model with the weights of avex's, and without what draws random numbers in training."""
    name = "beats" if hasattr(theirs, "backbone") else "efficientnet"
    for part in theirs.modules():
        if type(part).__name__ == "StochasticDepth":
            part.p = 0.0
    audio = AudioConfig(representation="raw") if name == "beats" else AudioConfig(n_fft=800, hop_length=160)
    init = STEADY if name == "beats" else None
    model = build_model_from_spec(ModelSpec(name=name, audio_config=audio, init_config=init), "cpu")
    for part in model.modules():
        if isinstance(part, Bottleneck):
            part.dropped = 0.0
    model.load_state_dict(theirs.state_dict(), strict=False)
    return model


def test_a_batch_as_large_as_a_clip_has_tokens_equals_its_clips_one_by_one():
    torch.manual_seed(0)
    model = adapt(beats().eval())
    wave = noise(8, seconds=0.2)  # eight tokens
    with torch.no_grad():
        (together,) = model.taps(wave, [model.last_layer_name]).values()
        one_by_one = torch.cat([next(iter(model.taps(row[None], [model.last_layer_name]).values())) for row in wave])
    assert together.shape[:2] == (8, 8)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
