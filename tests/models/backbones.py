"""Small backbones with random weights, in memory and on disk."""

import torch
import yaml
from safetensors.torch import save_file

from avex_serve.configs import AudioConfig, ModelSpec
from avex_serve.models.utils.factory import build_model_from_spec

RATE = 16000
TINY = {
    "embed_dim": 24,
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 64,
}


def tiny_spec(*, seconds=1, fields=None, **init):
    audio = AudioConfig(sample_rate=RATE, representation="raw", target_length_seconds=seconds)
    return ModelSpec(
        name="beats", pretrained=False, audio_config=audio, init_config={**TINY, **init}, **(fields or {})
    )


def tiny_beats(seed=0, *, num_classes=None, **options):
    return stirred(tiny_spec(**options), seed, num_classes)


# 57 tokens: the last patches of 1 s are half of padding.
TINY_EAT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "target_length": 112}


def tiny_eat_spec(*, seconds=1, fields=None, **init):
    audio = AudioConfig(sample_rate=RATE, representation="raw", target_length_seconds=seconds)
    return ModelSpec(
        name="eat_hf", pretrained=False, audio_config=audio, init_config={**TINY_EAT, **init}, **(fields or {})
    )


def tiny_eat(seed=0, *, num_classes=None, **options):
    return stirred(tiny_eat_spec(**options), seed, num_classes)


def stirred(spec, seed, num_classes):
    torch.manual_seed(seed)
    model = build_model_from_spec(spec, "cpu", num_classes=num_classes)
    with torch.no_grad():  # far from the small values of an initialisation, so that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def noise(rows, seconds=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(rows, round(seconds * RATE), generator=generator)


def sweep():
    time = torch.arange(RATE)[None] / RATE
    return 0.4 * torch.sin(2 * torch.pi * (300 + 3500 * time) * time) + 0.1 * noise(1)


def effnet_spec(*, seconds=1, variant="b0", **audio):
    settings = {"n_fft": 800, "hop_length": 160, "n_mels": 64, "target_length_seconds": seconds, **audio}
    return ModelSpec(
        name="efficientnet", pretrained=False, audio_config=AudioConfig(**settings), efficientnet_variant=variant
    )


def effnet(seed=0, *, num_classes=None, **options):
    torch.manual_seed(seed)
    model = build_model_from_spec(effnet_spec(**options), "cpu", num_classes=num_classes)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases, so that they matter
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.model.features[8][0].weight.mul_(0.1)  # values about 1, as heads expect them
        for norm in norms:  # statistics of real activations, without which rounding errors grow from layer to layer
            norm.momentum = 1.0
        model.train()(torch.cat([noise(2, seed=2), sweep(), torch.zeros(1, RATE)]))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def write_model(path, model, spec, **entries):
    """Write a YAML file with the checkpoint beside it, as users have theirs; return its path."""
    save_file({n: t.clone() for n, t in model.state_dict().items()}, path.with_suffix(".safetensors"))
    content = {"model_spec": spec.model_dump(exclude_none=True), "checkpoint_path": f"{path.stem}.safetensors"}
    path.write_text(yaml.safe_dump({**content, **entries}))
    return path
