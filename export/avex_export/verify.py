"""Verification: each format against the eager module, through the engine that serves it."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from avex_export.cases import example_inputs, make_cases
from avex_export.formats import meta_shapes
from avex_export.graph import Assembly, Graph
from avex_export.progress import bar
from avex_serve.bundles.manifest import TORCHSCRIPT, Manifest
from avex_serve.bundles.reading import Bundle
from avex_serve.evidence.cases import Case, CaseEntry, Check, Gain, Record, write_evidence
from avex_serve.evidence.machine import Machine, this_machine
from avex_serve.evidence.verify import TOLERANCE, run_case, table
from avex_serve.inference.backend import Backend
from avex_serve.inference.engine import Engine
from avex_serve.inference.onnx import OnnxBackend

# Bytes of recordings that a bundle carries, as 16-bit samples.
_KEPT_AUDIO = 2**22


@dataclass(frozen=True)
class Verification:
    """All comparisons of an export."""

    checks: tuple[Check, ...]
    cases: tuple[Case, ...]  # those that the bundle carries
    skipped: tuple[str, ...]  # what was not compared or is not kept, and why
    machine: Machine  # on which it ran
    gains: tuple[Gain, ...] = ()  # of the passes, if they were profiled

    @property
    def passed(self) -> bool:
        """Whether everything that was compared agrees."""
        return all(check.passed for check in self.checks)

    def table(self) -> str:
        """As text."""
        return table(self.checks, self.skipped)

    def write(self, folder: Path) -> None:
        """Put the evidence into a bundle that is being made."""
        record = Record(
            machine=self.machine,
            optimisation=OnnxBackend.optimisation.name,
            tolerance=TOLERANCE,
            passed=self.passed,
            cases=tuple(CaseEntry(name=c.name, sample_rate=c.sample_rate, batches=c.batches) for c in self.cases),
            checks=self.checks,
            skipped=self.skipped,
            passes=self.gains,
        )
        write_evidence(folder, record, self.cases)


def verify(
    graph: Graph,
    assembly: Assembly,
    manifest: Manifest,
    folder: Path,
    backends: Mapping[str, Backend],
    recordings: Sequence[Path] = (),
) -> Verification:
    """Compare each format with the eager module.

    Args:
        graph: the eager module.
        assembly: what was exported.
        manifest: of the bundle that is being made; its files need not be listed yet.
        folder: where the bundle is being made; a traced module in it is run on the meta device too.
        backends: by format.
        recordings: real audio to compare on, in place of the synthetic one.

    Raises:
        AudioError: a recording that can't be read.
        NotFoundError: a recording that is not there.
    """
    cases, skipped = make_cases(graph, assembly, recordings)
    checks = compare(cases, assembly, manifest, folder, list(backends.values()))
    if (folder / TORCHSCRIPT).exists():
        checks.append(_on_meta(graph, assembly, folder / TORCHSCRIPT))
    kept = _kept(cases)
    if len(kept) < len(cases):
        skipped.append(f"not kept in the bundle: {len(cases) - len(kept)} recordings, for their size")
    return Verification(tuple(checks), tuple(kept), tuple(skipped), this_machine())


def compare(
    cases: Sequence[Case], assembly: Assembly, manifest: Manifest, folder: Path, backends: Sequence[Backend]
) -> list[Check]:
    """Run the cases on each backend; arguments as in `verify`."""
    labels = {head.name: head.labels for head in assembly.heads}
    bundle = Bundle(directory=folder, manifest=manifest, labels=labels, digest="0" * 64)
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


def _on_meta(graph: Graph, assembly: Assembly, torchscript: Path) -> Check:
    example = example_inputs(assembly, 3)
    with torch.no_grad():
        expected = [tuple(output.shape) for output in graph(*example)]
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
