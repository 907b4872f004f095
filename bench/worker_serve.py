"""Answers with avex-serve: a bundle's graph, clip by clip as the service does, or the probe in eager mode.

python worker_serve.py BUNDLE PRECISION
python worker_serve.py --eager FOLDER PROBE
"""

import sys
from collections.abc import Callable
from pathlib import Path

import avex_serve


def main(arguments: list[str]) -> None:
    """Load, and answer."""
    answer = eager(Path(arguments[1]), arguments[2]) if arguments[0] == "--eager" else served(*arguments)
    from worker import serve  # and numpy with it, which a program that only opens a bundle wouldn't import by itself

    serve(answer)


def served(bundle: str, precision: str) -> Callable:
    """What answers from a bundle."""
    engine = avex_serve.open_bundle(bundle, precision=precision)
    import numpy as np

    return lambda batch: np.concatenate([engine.infer(row[None])["logits"] for row in batch])


def eager(folder: Path, probe_name: str) -> Callable:
    """What answers by the probe in eager mode."""
    import torch

    from avex_serve.models.probes import load_probe

    torch.set_num_threads(1)
    base = avex_serve.load_model(folder / "model.yml", return_features_only=True)
    probe = load_probe(folder / probe_name, base_model=base).eval()

    def answer(batch):
        with torch.no_grad():
            return probe(torch.from_numpy(batch)).numpy()

    return answer


if __name__ == "__main__":
    main(sys.argv[1:])
