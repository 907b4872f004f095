"""Profiling: how much faster each pass makes the graph on this machine, and how much it changes the numbers."""

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from avex_export.cases import example_inputs
from avex_export.formats import write_onnx
from avex_export.graph import Assembly, export_graph
from avex_export.passes import CONSTANTS
from avex_serve.evidence.cases import Gain
from avex_serve.inference.onnx import OnnxBackend

_ROUNDS = 9  # the median counts


def profile(assembly: Assembly, without: Collection[str] = (), tell: Callable[[str], None] = print) -> list[Gain]:
    """Compare the graph with all passes to the graphs without each, on one clip and one thread.

    The graphs take turns, so that other work on the machine slows all of them alike.

    Args:
        assembly: what is exported; its input is audio.
        without: passes that all graphs leave out.
        tell: where progress goes.
    """
    applied = [*export_graph(assembly, without).passes, *({CONSTANTS} - {*without})]
    inputs = [tensor.numpy() for tensor in example_inputs(assembly, 1)]
    names = [f"input{i}" for i in range(len(inputs))]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avex-profile-")))
        backends = {}
        for i, name in enumerate(["", *applied]):
            tell(f"profile: build {f'without {name}' if name else 'with all passes'} ({i + 1}/{len(applied) + 1})")
            path = folder / f"{i}.onnx"
            graph = export_graph(assembly, {*without, name})
            write_onnx(graph, example_inputs(assembly, 2), path, names, {}, {*without, name})
            backends[name] = OnnxBackend(path, names, list(graph.outputs))
        times: dict[str, list[float]] = {name: [] for name in backends}
        first = assembly.outputs[0].name
        answers = {name: backend.run(*inputs)[first] for name, backend in backends.items()}
        for _ in range(_ROUNDS):
            for name, backend in backends.items():
                started = time.perf_counter()
                backend.run(*inputs)
                times[name].append(time.perf_counter() - started)
    return [
        Gain(
            name=name,
            speedup=statistics.median(slow / fast for slow, fast in zip(times[name], times[""], strict=True)),
            difference=float(np.abs(answers[name] - answers[""]).max() / max(1.0, np.abs(answers[""]).max())),
        )
        for name in applied
    ]


def gains_table(gains: Sequence[Gain]) -> str:
    """The gains as text."""
    lines = [f"{'pass':16} {'speed-up':>8} {'difference':>11}"]
    lines += [f"{gain.name:16} {gain.speedup:8.3f} {gain.difference:11.1e}" for gain in gains]
    return "\n".join(lines)
