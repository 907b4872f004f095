"""Backends run a bundle's graph: numpy in, numpy out. Which one is decided here."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

from avex_serve.bundles.manifest import DATA_SUFFIX, ONNX, ONNX_INT8, PT2, TORCHSCRIPT, Manifest
from avex_serve.bundles.reading import Bundle
from avex_serve.errors import BundleError, DependencyError, InputError

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


class Choice(NamedTuple):
    """Which graph of a bundle runs where."""

    graph: Path
    device: str
    int8: bool

    @property
    def others(self) -> set[str]:
        """Names of the files that a bundle may hold for other devices, precisions and programs."""
        graphs = {ONNX, ONNX_INT8, TORCHSCRIPT, PT2} - {self.graph.name}
        return graphs | {name + DATA_SUFFIX for name in graphs}


def choose_backend(bundle: Bundle, device: str = "auto", precision: str = "auto") -> Choice:
    """The graph for a device: ``cpu`` (onnxruntime), ``cuda`` (TorchScript), ``auto`` (cuda where it works).

    A bundle exported without ONNX is run by TorchScript on the CPU too, if torch is installed. The precision
    ``auto`` is int8 on the CPU where the bundle has it, since who exported it asked for that, and else float32.

    Raises:
        InputError: an unknown device or precision, or int8 on CUDA.
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
    int8 = bundle.manifest.quantisation
    if precision == "int8" and int8 is None:
        raise BundleError(f"{bundle.directory} holds no int8 graph; export it again with --quantize int8")
    rounded = int8 is not None and precision != "float32"
    if int8 is not None and rounded:
        onnx = bundle.path(int8.file)
    if device == "cpu" and onnx is not None:
        return Choice(onnx, device, rounded)
    if torchscript is None:
        raise BundleError(
            f"{bundle.directory} holds no graph for {device}; export it again with "
            f"--format {'torchscript' if device == 'cuda' else 'onnx'}"
        )
    return Choice(torchscript, device, False)


def backend_loader(choice: Choice, manifest: Manifest) -> Callable[[], Backend]:
    """What loads the graph; the backend's module is imported here, and nothing needs Python for long after that.

    Raises:
        DependencyError: torch is needed and missing; the loader raises it where CUDA is.
    """
    names = [output.name for output in manifest.outputs]
    if choice.graph.name != TORCHSCRIPT:
        from avex_serve.inference.onnx import OnnxBackend

        inputs = [spec.name for spec in manifest.inputs]
        return partial(OnnxBackend, choice.graph, inputs, names, int8=choice.int8)
    if not _torch_installed():
        raise DependencyError(
            f"{choice.graph.name} on {choice.device} needs torch, which is not installed; "
            "pip install 'avex-serve[cuda]'"
        )
    from avex_serve.inference.torch import TorchBackend

    return partial(TorchBackend, choice.graph, names, choice.device, half=manifest.half)


def _torch_installed() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # blocked, or half loaded
        return False


def _cuda_works() -> bool:
    # Importing torch takes seconds and hundreds of megabytes: only where the driver shows a device.
    if not Path("/dev/nvidiactl").exists() or not _torch_installed():
        return False
    from avex_serve.inference.torch import cuda_is_available

    return cuda_is_available()
