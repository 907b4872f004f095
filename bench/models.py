"""Full-size backbones with random weights, each with trained-looking linear probes, as files that avex loads too.

python models.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from avex_serve import load_model
from avex_serve.configs import AudioConfig, ModelSpec, ProbeConfig
from avex_serve.models.base_model import ModelBase
from avex_serve.models.probes import build_probe_from_config, save_probe
from avex_serve.models.utils.factory import build_model_from_spec

SECONDS, RATE, CLASSES = 10, 16000, 50
RAW = AudioConfig(sample_rate=RATE, representation="raw", target_length_seconds=SECONDS)
MEL = AudioConfig(
    sample_rate=RATE, representation="mel_spectrogram", n_fft=800, hop_length=160, target_length_seconds=SECONDS
)
SPECS = {
    "beats": ModelSpec(name="beats", pretrained=False, device="cpu", audio_config=RAW, init_config={}),
    "efficientnet": ModelSpec(name="efficientnet", pretrained=False, device="cpu", audio_config=MEL),
    "eat": ModelSpec(name="eat_hf", pretrained=False, device="cpu", audio_config=RAW),
}
PROBES = {"last": ["last_layer"], "all": ["all"]}


def clips(count: int = 8) -> np.ndarray:
    """(count, S) float32: chirps in noise, of different pitch and loudness."""
    random, time = np.random.default_rng(0), np.arange(SECONDS * RATE) / RATE
    pitch = [200.0 + 350.0 * i for i in range(count)]
    waves = [0.5 / (i + 1) * np.sin(2 * np.pi * (f + 30 * time) * time) for i, f in enumerate(pitch)]
    return (np.stack(waves) + 0.03 * random.standard_normal((count, time.size))).astype(np.float32)


def write_models(folder: Path) -> None:
    """Write each backbone (``NAME/model.yml`` and its checkpoint) and its probes (``NAME/last``, ``NAME/all``)."""
    for name, spec in SPECS.items():
        home = folder / name
        if (home / "all").is_dir():
            continue
        home.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = build_model_from_spec(spec, "cpu", return_features_only=True)
        roughen(model)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, home / "checkpoint.safetensors")
        fields = spec.model_dump(exclude_unset=True) | {"audio_config": spec.audio_config.model_dump()}
        content = {"checkpoint_path": "checkpoint.safetensors", "model_spec": fields}
        (home / "model.yml").write_text(yaml.safe_dump(content))
        base = load_model(home / "model.yml", return_features_only=True)
        for probe_name, layers in PROBES.items():
            config = ProbeConfig(target_layers=list(layers))
            probe = build_probe_from_config(config, CLASSES, "cpu", base_model=base)
            save_probe(
                probe, home / probe_name, [f"class {i}" for i in range(CLASSES)], home / "model.yml", "sigmoid"
            )


@torch.no_grad()
def roughen(model: ModelBase) -> None:
    """Make weights less even than they begin: biases, gains with outliers, and statistics of real activations."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[torch.randperm(len(module.weight))[:4]] *= 8.0
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:  # random weights make rounding grow from layer to layer, trained ones don't
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == 320:
                module.weight.mul_(0.3)
        model.train()(torch.from_numpy(clips(4)))
        model.eval()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_models(folder)
    np.save(folder / "clips.npy", clips())
