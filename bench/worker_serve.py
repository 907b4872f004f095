"""Answers with avex-serve: a bundle's graph, clip by clip as the service does, or the probe in eager mode.

python worker_serve.py BUNDLE PRECISION
python worker_serve.py --eager FOLDER PROBE
"""

import sys
from pathlib import Path

import numpy as np
from worker import serve


def main(arguments: list[str]) -> None:
    """Load, and answer."""
    if arguments[0] == "--eager":
        import torch

        from avex_serve import load_model
        from avex_serve.models.probes import load_probe

        torch.set_num_threads(1)
        folder = Path(arguments[1])
        base = load_model(folder / "model.yml", return_features_only=True)
        probe = load_probe(folder / arguments[2], base_model=base).eval()

        def answer(batch: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return probe(torch.from_numpy(batch)).numpy()
    else:
        from avex_serve import open_bundle

        engine = open_bundle(arguments[0], precision=arguments[1])

        def answer(batch: np.ndarray) -> np.ndarray:
            return np.concatenate([engine.infer(row[None])["logits"] for row in batch])

    serve(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
