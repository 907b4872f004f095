"""Opening a bundle: from a folder to an engine, with what takes time side by side."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from avex_serve.bundles.reading import check_files, read_manifest
from avex_serve.errors import BundleError
from avex_serve.inference.backend import backend_loader, choose_backend

if TYPE_CHECKING:
    from avex_serve.inference.engine import Engine


def open_bundle(
    directory: str | os.PathLike[str], device: str = "auto", *, precision: str = "auto", threads: int | None = None
) -> "Engine":
    """Open a bundle: check that it is whole and as it was exported, and load its graph.

    The digests of graphs that aren't loaded, such as those for other devices, are left to ``avex-serve verify``.

    Args:
        directory: made by ``avex-export``.
        device: ``cpu`` (onnxruntime), ``cuda`` (TorchScript) or ``auto`` (cuda where it works).
        precision: ``float32``, ``int8`` or ``auto`` (int8 on the CPU where the bundle has it).
        threads: that infer side by side; as many as the cores that may be used by default.

    Raises:
        BundleError: not a whole bundle, or no graph in it for that device and precision.
        DependencyError: torch or CUDA is needed and missing.
        InputError: an unknown device or precision.
    """
    bundle = read_manifest(Path(directory))
    choice = choose_backend(bundle, device, precision)
    with ThreadPoolExecutor(2, thread_name_prefix="avex-open") as pool:
        checking = pool.submit(check_files, bundle, choice.others)  # large files take as long as loading them
        try:
            loading = pool.submit(backend_loader(choice, bundle.manifest))
            # Imported here, for it takes as long as loading a small graph.
            from avex_serve.inference.batcher import batched
            from avex_serve.inference.engine import Engine

            backend = loading.result()
        except BundleError:
            checking.result()  # a changed file is the better reason
            raise
        checking.result()
    return Engine(bundle, batched(backend), threads)
