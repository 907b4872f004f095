"""Each format compared with the eager module, through the engine that serves it; and the effect of each pass."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from avex_export.cases import example_inputs, make_cases
from avex_export.formats import meta_shapes, write_onnx
from avex_export.graph import Assembly, eager_graph, export_graph
from avex_export.passes import CONSTANTS
from avex_serve.bundles.manifest import TORCHSCRIPT
from avex_serve.bundles.reading import Bundle
from avex_serve.evidence.cases import Case, CaseEntry, Check, Gain, Record, this_machine
from avex_serve.evidence.verify import TOLERANCE, run_case
from avex_serve.inference.backend import Backend
from avex_serve.inference.engine import Engine
from avex_serve.inference.onnx import OnnxBackend

# Bytes of the recordings that a bundle stores, as 16-bit samples.
_KEPT_AUDIO = 2**22
_ROUNDS = 9  # of a profile; the median counts


def verify(
    assembly: Assembly, bundle: Bundle, backends: Sequence[Backend], recordings: Sequence[Path]
) -> tuple[Record, list[Case]]:
    """Compare each format with the eager module; return the results, and the cases that the bundle stores.

    Args:
        assembly: what was exported.
        bundle: the unfinished bundle. If it holds a traced module, its shapes are checked on the meta device too.
        backends: one for each format.
        recordings: files to compare on, in place of synthetic sounds.

    Raises:
        AudioError: a recording that can't be read.
        NotFoundError: a recording that doesn't exist.
    """
    cases, skipped = make_cases(assembly, recordings)
    checks = compare(cases, bundle, backends)
    if (bundle.directory / TORCHSCRIPT).exists():
        checks.append(_check_on_meta(assembly, bundle.directory / TORCHSCRIPT))
    kept = _kept(cases)
    if len(kept) < len(cases):
        skipped.append(f"not stored in the bundle: {len(cases) - len(kept)} recordings, for their size")
    record = Record(
        machine=this_machine(),
        optimisation=OnnxBackend.optimisation.name,
        tolerance=TOLERANCE,
        passed=all(check.passed for check in checks),
        cases=tuple(CaseEntry(name=c.name, sample_rate=c.sample_rate, batches=c.batches) for c in kept),
        checks=tuple(checks),
        skipped=tuple(skipped),
    )
    return record, kept


def compare(cases: Sequence[Case], bundle: Bundle, backends: Sequence[Backend]) -> list[Check]:
    """Run the cases on each backend; arguments as in `verify`."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(Engine(bundle, backend)) for backend in backends]
        shown = tqdm(cases, "compare", leave=False, disable=None)
        return [check for case in shown for engine in engines for check in run_case(engine, case)]


def _kept(cases: Sequence[Case]) -> list[Case]:
    kept, room = [], _KEPT_AUDIO
    for case in cases:
        size = 0 if case.sample_rate is None else 2 * case.input.size
        if size <= room:
            kept.append(case)
            room -= size
    return kept


def _check_on_meta(assembly: Assembly, torchscript: Path) -> Check:
    """Whether the traced module has the eager module's shapes on a device that computes nothing."""
    example = example_inputs(assembly, 3)
    with torch.no_grad():
        expected = [tuple(output.shape) for output in eager_graph(assembly)(*example)]
    try:
        passed = meta_shapes(torchscript, example) == expected
    except (RuntimeError, NotImplementedError):
        passed = False
    return Check(
        input="shapes on device meta",
        rows=3,
        format="torchscript",
        whole_way=False,
        errors={},
        decisions=None,
        by_float64=False,
        passed=passed,
    )


# -- profile ------------------------------------------------------------------------------------------------------


def profile(assembly: Assembly, without: Collection[str], progress: Callable[[str], None]) -> list[Gain]:
    """Compare the graph with all passes to the graphs without each of them, on one clip and one thread.

    The graphs take turns, so that other work on the machine slows all of them alike.

    Args:
        assembly: what is exported; its input is audio.
        without: passes that all graphs leave out.
        progress: is called with each step.
    """
    applied = [*export_graph(assembly, without).passes, *({CONSTANTS} - {*without})]
    inputs = [tensor.numpy() for tensor in example_inputs(assembly, 1)]
    with tempfile.TemporaryDirectory(prefix="avex-profile-") as folder:
        backends = {}
        for i, name in enumerate(["", *applied]):
            graph_name = f"without {name}" if name else "with all passes"
            progress(f"profile: build {graph_name} ({i + 1}/{len(applied) + 1})")
            path = Path(folder) / f"{i}.onnx"
            graph = export_graph(assembly, {*without, name})
            write_onnx(graph, example_inputs(assembly, 2), path, assembly.input_names, {}, {*without, name})
            backends[name] = OnnxBackend(path, assembly.input_names, list(graph.outputs))
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
