"""Backends run a bundle's graph: numpy in, numpy out. Which one is decided here."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from avex_serve.bundle import Bundle
from avex_serve.errors import BundleError, DependencyError, InputError
from avex_serve.manifest import ONNX, TORCHSCRIPT

if TYPE_CHECKING:
    import numpy as np

Precision = Literal["auto", "float32", "int8"]


class Backend(Protocol):
    """Runs one graph. Calls from several threads at once are allowed."""

    device: str  # "cpu" or "cuda"
    format: str  # "onnx", "onnx-int8", "torchscript" or, in half precision, "torch-half"
    max_batch: int  # rows a call takes best

    def run(self, *inputs: "np.ndarray") -> "dict[str, np.ndarray]":
        """Outputs by name for one batch (B, …) of each input of the manifest; every output has B rows."""
        ...


def find_backend(bundle: Bundle, device: str = "auto", precision: str = "auto") -> Callable[[], Backend]:
    """What loads the graph for a device: ``cpu`` (onnxruntime), ``cuda`` (TorchScript), ``auto`` (cuda if it works).

    A bundle exported without ONNX is run by TorchScript on the CPU too, if torch is installed. The precision
    ``auto`` is int8 on the CPU where the bundle has it, since who exported it asked for that, and else float32.

    Raises:
        InputError: an unknown device or precision, or int8 on CUDA.
        DependencyError: torch or CUDA is needed and missing.
        BundleError: the bundle holds no graph for that device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r}; expected auto, cpu or cuda")
    if precision not in get_args(Precision):
        raise InputError(f"precision {precision!r}; expected {', '.join(get_args(Precision))}")
    if precision == "int8":
        if device == "cuda":
            raise InputError("precision int8 is for device cpu; cuda runs float32")
        device = "cpu"
    onnx, torchscript = bundle.path(ONNX), bundle.path(TORCHSCRIPT)
    if device == "auto":
        device = "cuda" if torchscript is not None and _cuda_works() else "cpu"
    names = [output.name for output in bundle.manifest.outputs]
    int8 = bundle.manifest.quantisation
    if precision == "int8" and int8 is None:
        raise BundleError(f"{bundle.directory} holds no int8 graph; export it again with --quantize int8")
    rounded = int8 is not None and precision != "float32"
    if int8 is not None and rounded:
        onnx = bundle.path(int8.file)
    if device == "cpu" and onnx is not None:
        from avex_serve.runtime.onnx_backend import OnnxBackend

        return partial(OnnxBackend, onnx, [spec.name for spec in bundle.manifest.inputs], names, int8=rounded)
    if torchscript is None:
        raise BundleError(
            f"{bundle.directory} holds no graph for {device}; export it again with "
            f"--format {'torchscript' if device == 'cuda' else 'onnx'}"
        )
    if not _torch_installed():
        raise DependencyError(
            f"{torchscript.name} on {device} needs torch, which is not installed; pip install 'avex-serve[cuda]'"
        )
    from avex_serve.runtime.torch_backend import TorchBackend

    return partial(TorchBackend, torchscript, names, device, half=bundle.manifest.half)


def _torch_installed() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # blocked, or half loaded
        return False


def _cuda_works() -> bool:
    # Importing torch takes seconds and hundreds of megabytes: only where the driver shows a device.
    if not Path("/dev/nvidiactl").exists() or not _torch_installed():
        return False
    from avex_serve.runtime.torch_backend import cuda_is_available

    return cuda_is_available()
