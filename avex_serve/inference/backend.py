"""Opening a bundle: which of its graphs runs on which device, and the backend that runs it."""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from avex_serve.bundles.manifest import DATA_SUFFIX, ONNX, ONNX_INT8, PT2, TORCHSCRIPT, Manifest
from avex_serve.bundles.reading import Bundle, check_files, read_manifest
from avex_serve.bundles.remote import local_bundle
from avex_serve.errors import BundleError, DependencyError, InputError
from avex_serve.scheduling.cores import usable_cores

if TYPE_CHECKING:
    import numpy as np

    from avex_serve.inference.engine import Engine


class Backend(Protocol):
    """Runs one graph, numpy in and numpy out. Calls from several threads at once are allowed."""

    device: str  # "cpu" or "cuda"
    format: str  # "onnx", "onnx-int8", "openvino", "torchscript" or, in half precision, "torch-half"
    max_batch: int  # the fastest number of rows for one call

    def run(self, *inputs: "np.ndarray") -> "dict[str, np.ndarray]":
        """Outputs by name for one batch (B, …) of each input of the manifest; every output has B rows."""
        ...


def open_bundle(
    address: str | os.PathLike[str],
    device: str = "auto",
    *,
    precision: str = "auto",
    threads: int | None = None,
    runtime: str = "auto",
) -> "Engine":
    """Open a bundle: check that it is complete and unchanged, and load its graph.

    The digests of graphs that aren't loaded, such as those for other devices, are left to ``avex-serve verify``.

    Args:
        address: the folder of a bundle, or its URL, such as ``hf://owner/name@revision``.
        device: ``cpu`` (onnxruntime), ``cuda`` (TorchScript) or ``auto`` (cuda where it works). A bundle without
            ONNX runs as TorchScript on the CPU too, if torch is installed.
        precision: ``float32``, ``int8`` or ``auto`` (int8 on the CPU where the bundle has it).
        threads: that infer at the same time; None: one for each core that may be used.
        runtime: ``openvino`` runs the float32 ONNX graph in OpenVINO, on the CPU; ``auto`` never does.

    Raises:
        BundleError: not a complete bundle, or no graph in it for that device and precision.
        DependencyError: torch, CUDA or OpenVINO is needed and missing.
        InputError: an unknown device, precision or runtime, or those that don't go together.
        AvexServeError: of a URL, as of `avex_serve.bundles.remote.local_bundle`.
    """
    if runtime not in ("auto", "openvino"):
        raise InputError(f"runtime {runtime!r}; expected auto or openvino")
    if runtime == "openvino":
        device, precision = _check_openvino(device, precision)
    bundle = read_manifest(local_bundle(address))
    graph, device, int8 = _choose_graph(bundle, device, precision)
    others = {ONNX, ONNX_INT8, TORCHSCRIPT, PT2} - {graph.name}
    others |= {name + DATA_SUFFIX for name in others}
    with ThreadPoolExecutor(2, thread_name_prefix="avex-open") as pool:
        checking = pool.submit(check_files, bundle, others)  # takes as long as loading, for large files
        try:
            if runtime == "openvino":
                load = _openvino_loader(bundle, graph, threads)
            else:
                load = _backend_loader(bundle.manifest, graph, device, int8=int8)
            loading = pool.submit(load)
            # Here and not above: the import takes as long as loading a small graph.
            from avex_serve.inference.batcher import Batcher
            from avex_serve.inference.engine import Engine

            backend = loading.result()
        except BundleError:
            checking.result()  # a changed file is the better reason
            raise
        checking.result()
    return Engine(bundle, Batcher(backend) if backend.device == "cuda" else backend, threads)


def _choose_graph(bundle: Bundle, device: str, precision: str) -> tuple[Path, str, bool]:
    """The graph to run, its device, and whether it is in int8; see `open_bundle`."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r}; expected auto, cpu or cuda")
    if precision not in ("auto", "float32", "int8"):
        raise InputError(f"precision {precision!r}; expected auto, float32, int8")
    if precision == "int8":
        if device == "cuda":
            raise InputError("precision int8 is for device cpu; cuda runs float32")
        device = "cpu"
    torchscript = bundle.path(TORCHSCRIPT)
    if device == "auto":
        device = "cuda" if torchscript is not None and _cuda_works() else "cpu"
    int8 = None if precision == "float32" else bundle.manifest.quantisation
    if precision == "int8" and int8 is None:
        raise BundleError(f"{bundle.directory} holds no int8 graph; export it again with --quantize int8")
    onnx = bundle.path(ONNX if int8 is None else int8.file)
    if device == "cpu" and onnx is not None:
        return onnx, device, int8 is not None
    if torchscript is None:
        raise BundleError(
            f"{bundle.directory} holds no graph for {device}; export it again with "
            f"--format {'torchscript' if device == 'cuda' else 'onnx'}"
        )
    return torchscript, device, False


def _check_openvino(device: str, precision: str) -> tuple[str, str]:
    """Device and precision of OpenVINO; InputError if others were asked for."""
    if device == "cuda":
        raise InputError("runtime openvino is for device cpu")
    if precision == "int8":
        raise InputError("runtime openvino runs float32; int8 is faster without it")
    return "cpu" if device == "auto" else device, "float32" if precision == "auto" else precision


def _openvino_loader(bundle: Bundle, graph: Path, threads: int | None) -> Callable[[], Backend]:
    """As `_backend_loader`, for OpenVINO."""
    if graph.name != ONNX:
        raise BundleError(f"{bundle.directory} holds no {ONNX}; export it again with --format onnx")
    try:
        from avex_serve.inference.openvino import OpenvinoBackend
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise DependencyError(
            "runtime openvino was asked for, but OpenVINO is not installed; pip install 'avex-serve[openvino]'"
        ) from None
    inputs, outputs = ([spec.name for spec in specs] for specs in (bundle.manifest.inputs, bundle.manifest.outputs))
    return partial(OpenvinoBackend, graph, inputs, outputs, threads or usable_cores())


def _backend_loader(manifest: Manifest, graph: Path, device: str, *, int8: bool) -> Callable[[], Backend]:
    """A function that loads the graph; the backend's module is imported here, outside the thread that loads."""
    names = [output.name for output in manifest.outputs]
    if graph.name != TORCHSCRIPT:
        from avex_serve.inference.onnx import OnnxBackend

        return partial(OnnxBackend, graph, [spec.name for spec in manifest.inputs], names, int8=int8)
    if not _torch_installed():
        raise DependencyError(
            f"{graph.name} on {device} needs torch, which is not installed; pip install 'avex-serve[cuda]'"
        )
    from avex_serve.inference.torch import TorchBackend

    return partial(TorchBackend, graph, names, device, half=manifest.half)


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
