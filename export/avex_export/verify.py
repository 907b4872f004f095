"""Verification: each format compared with the eager module, through the engine that serves it."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from avex_export.cases import example_inputs, make_cases
from avex_export.formats import meta_shapes
from avex_export.graph import Assembly, eager_graph
from avex_export.progress import bar
from avex_serve.bundles.manifest import TORCHSCRIPT
from avex_serve.bundles.reading import Bundle
from avex_serve.evidence.cases import Case, CaseEntry, Check, Record, this_machine
from avex_serve.evidence.verify import TOLERANCE, run_case
from avex_serve.inference.backend import Backend
from avex_serve.inference.engine import Engine
from avex_serve.inference.onnx import OnnxBackend

# Bytes of the recordings that a bundle stores, as 16-bit samples.
_KEPT_AUDIO = 2**22


def verify(
    assembly: Assembly, bundle: Bundle, backends: Sequence[Backend], recordings: Sequence[Path]
) -> tuple[Record, list[Case]]:
    """Compare each format with the eager module.

    Args:
        assembly: what was exported.
        bundle: the unfinished bundle; if it holds a traced module, its shapes are checked on the meta device too.
        backends: one for each format.
        recordings: real audio to compare on, in place of the synthetic one.

    Returns:
        The results, and the cases that the bundle stores.

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
        return [check for case in bar(cases, "compare") for engine in engines for check in run_case(engine, case)]


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
