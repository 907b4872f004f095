"""Answers with avex itself; run by a Python that has it. See `worker.serve` for what is spoken.

python worker_avex.py FOLDER PROBE
"""

import logging
import sys
import warnings
from pathlib import Path

from worker import serve

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)


def main(folder: Path, probe_name: str) -> None:
    """Load backbone and probe, and answer."""
    import torch
    import yaml
    from avex import load_model
    from avex.configs import ModelSpec, ProbeConfig
    from avex.models.probes import build_probe_from_config
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    content = yaml.safe_load((folder / "model.yml").read_text())
    spec = ModelSpec(**content["model_spec"])
    checkpoint = folder / content["checkpoint_path"]
    if spec.name == "efficientnet":  # load_model would download ImageNet's weights first
        from avex.models.efficientnet import Model

        model = Model(pretrained=False, device="cpu", audio_config=spec.audio_config, return_features_only=True)
        model.load_state_dict(load_file(checkpoint), strict=False)
    else:
        model = load_model(spec, device="cpu", checkpoint_path=str(checkpoint), return_features_only=True)
    fields = yaml.safe_load((folder / probe_name / "probe.yml").read_text())["probe_config"]
    head = load_file(folder / probe_name / "model.safetensors")
    probe = build_probe_from_config(
        ProbeConfig(**fields), num_classes=len(head["classifier.bias"]), device="cpu", base_model=model
    )
    probe.load_state_dict(head, strict=False)
    probe.eval()

    def answer(batch):
        with torch.no_grad():
            return probe(torch.from_numpy(batch)).numpy()

    serve(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
