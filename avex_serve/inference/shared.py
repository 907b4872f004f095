"""Graphs written once so that several processes map the same weights.

onnxruntime maps a file of weights, and then arranges a copy of them for its kernels, in each process. It can write
that copy, and a process that loads what was written maps it: the system keeps one in memory for all of them.
onnxruntime compares it with what this processor needs, so another processor uses less of it and computes the same.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from avex_serve.bundles.manifest import ONNX
from avex_serve.bundles.sealing import atomic_directory
from avex_serve.errors import BundleError

logger = logging.getLogger(__name__)

Write = Callable[[Path], None]


def shared_graph(folder: Path, key: str, write: Write) -> tuple[Path, int] | None:
    """The graph of a key, written by the first process that asks for it; other processes wait for that.

    Graphs that no process uses are removed before another one is written.

    Args:
        folder: for the graphs, each in a folder named by its key.
        key: of everything that determines the graph.
        write: writes the graph as ``model.onnx``, and its weights, into a folder; BundleError if it can't.

    Returns:
        The path, and a file descriptor to close when the graph is no longer used; None if it can't be written, and
        the log says why.
    """
    home = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not home.is_dir():
                _remove_unused(folder)
                with atomic_directory(home, marker=ONNX) as fresh:
                    write(fresh)
                    _flush(fresh)
            used = os.open(home / ONNX, os.O_RDONLY)
            fcntl.flock(used, fcntl.LOCK_SH)
    except (OSError, BundleError) as error:
        logger.warning(
            "each worker has its own copy of the weights, since they can't be shared in %s: %s", folder, error
        )
        return None
    return home / ONNX, used


def _remove_unused(folder: Path) -> None:
    """Remove the graphs that no process uses, and what a process left that was killed while it wrote."""
    for home in (path for path in folder.iterdir() if path.is_dir()):
        if (home / ONNX).is_file():
            with (home / ONNX).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
        shutil.rmtree(home)


def _flush(folder: Path) -> None:
    """Have the files on the disk before they get their name, which is all that later starts look at."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
