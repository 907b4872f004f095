"""TorchScript, on CUDA or on the CPU: the one module of the serving side that imports torch."""

from pathlib import Path

import numpy as np
import torch

from avex_serve.errors import BundleError, DependencyError


def cuda_is_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()


class TorchBackend:
    """A traced module on one device."""

    def __init__(self, path: Path, output_names: list[str], device: str, *, half: bool = False) -> None:
        """Load the module; DependencyError if the device is missing, BundleError for a bad file."""
        if device == "cuda" and not cuda_is_available():
            raise DependencyError("device cuda was asked for, but torch sees no CUDA device; use cpu or auto")
        try:
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
            # Not in the file: frozen weights are constants, which can't move to another device.
            self._module = torch.jit.freeze(module)
        except RuntimeError as error:
            raise BundleError(f"torch can't load {path}: {error}") from error
        self.device = device
        self.format = "torch-half" if half else "torchscript"
        self.max_batch = 16 if device == "cuda" else 1
        self._output_names = output_names

    @torch.inference_mode()
    def run(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See `Backend.run`."""
        # torch warns about read-only arrays, such as those made from received bytes.
        owned = [np.require(batch, requirements=("C", "W")) for batch in inputs]
        outputs = self._module(*(torch.from_numpy(batch).to(self.device) for batch in owned))
        return {name: tensor.float().cpu().numpy() for name, tensor in zip(self._output_names, outputs, strict=True)}
