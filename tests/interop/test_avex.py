"""Models of avex itself as the backbone of our probes, compared with avex's own probes."""

import warnings

import pytest
import torch

from avex_serve.configs import ProbeConfig
from avex_serve.models.custom import adapt
from avex_serve.models.probes import build_probe_from_config
from tests.models.backbones import TINY, noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("avex", reason="avex is not installed: its own models can't be given to our probes")
    import avex.configs
    import avex.models.efficientnet
    import avex.models.probes

# What avex itself warns of is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore")


def beats():
    audio = avex.configs.AudioConfig(representation="raw", normalize=False, target_length_seconds=1)
    spec = avex.configs.ModelSpec(name="beats", pretrained=False, audio_config=audio, init_config=TINY)
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


def test_a_batch_as_large_as_a_clip_has_tokens_equals_its_clips_one_by_one():
    torch.manual_seed(0)
    model = adapt(beats().eval())
    wave = noise(8, seconds=0.2)  # eight tokens
    with torch.no_grad():
        (together,) = model.taps(wave, [model.last_layer_name]).values()
        one_by_one = torch.cat([next(iter(model.taps(row[None], [model.last_layer_name]).values())) for row in wave])
    assert together.shape[:2] == (8, 8)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
