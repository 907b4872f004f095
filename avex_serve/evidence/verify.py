"""Verification: a bundle's answers against its evidence, and the table of it.

The exporter runs this on the bundle that it writes, ``avex-serve verify`` on the bundle where it arrived.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from avex_serve.bundles.manifest import Activation, Manifest, ProbeInfo
from avex_serve.bundles.reading import check_files, read_manifest
from avex_serve.errors import BundleError, TensorError
from avex_serve.evidence.cases import Case, Check, Decisions, Errors, Outputs, read_evidence
from avex_serve.evidence.machine import Machine, this_machine
from avex_serve.inference.engine import Engine
from avex_serve.inference.opening import open_bundle
from avex_serve.inference.results import Prediction
from avex_serve.inference.scores import Selection, score_scale

# Largest error that passes, relative to the largest output or to 1, whichever is more: float32 through a
# transformer and two ways to take a spectrum.
TOLERANCE = 1e-4
# Of half precision, whose numbers have eleven bits: a few roundings of a network that is as deep.
_HALF_TOLERANCE = 2e-2
# Judged by the module's own computation in float64, a format may be as far from that, or so many times as far as the
# eager module is: both are off by rounding, each in its own way, and of one clip both are a single draw.
NOISE_FACTOR = 4.0
# Integers are judged by gates, on more clips than these, where they are made. Elsewhere they may be as far off as
# they were there, and a little more: a value between two levels falls to one side on this CPU, to the other on that.
INT8 = "onnx-int8"
_INT8_FACTOR, _INT8_SLACK = 2.0, 1e-3


def tolerance_of(format_: str) -> float:
    """The largest error that passes in a format, relative to the largest output or to 1, whichever is more."""
    return _HALF_TOLERANCE if format_ == "torch-half" else TOLERANCE


def run_case(engine: Engine, case: Case, measured: Sequence[Check] | None = None) -> Iterator[Check]:
    """Compare the engine's graph, or its whole way for a recording, with what the eager module answered.

    Args:
        engine: what is verified.
        case: what it is asked.
        measured: what came out where the bundle was exported, by which int8 is judged; None: that is here.
    """
    if case.sample_rate is None:
        # Activations are rounded by the range of a whole batch, and those that are served have one clip.
        batches = (1,) if engine.backend.format == INT8 else case.batches
        for rows in batches:
            yield from _check_clips(engine, case, rows, measured)
    else:
        yield from _check_recording(engine, case, case.sample_rate, measured)


def verify_bundle(directory: str | os.PathLike[str], device: str = "cpu") -> tuple[str, bool]:
    """Run a bundle's evidence again on this machine.

    Args:
        directory: made by ``avex-export``.
        device: as in `open_bundle`.

    Returns:
        what came out as text (the table, and both machines), and whether everything agrees.

    Raises:
        BundleError: not a whole bundle, or without evidence.
        DependencyError: torch or CUDA is needed and missing.
        InputError: an unknown device.
    """
    check_files(read_manifest(directory))  # those that aren't opened as well
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(open_bundle(directory, device, precision="float32"))]
        record, cases = read_evidence(engines[0].bundle)
        _check_fit(engines[0], cases)
        if engines[0].manifest.quantisation is not None and device != "cuda":
            engines.append(stack.enter_context(open_bundle(directory, device, precision="int8")))
        checks = [c for case in cases for engine in engines for c in run_case(engine, case, record.checks)]
    passed = all(check.passed for check in checks)
    others = dict.fromkeys(c.format for c in record.checks if c.format not in {e.backend.format for e in engines})
    skipped = [f"not run again, for it isn't what {device} is served by: {name}" for name in others]
    machines = f"{_machine('exported on', record.machine)}\n{_machine('verified on', this_machine())}"
    return f"{table(checks, skipped)}\n\n{machines}", passed


def _machine(title: str, machine: Machine) -> str:
    return f"{title}: " + machine.lines().replace("\n", "\n" + " " * (len(title) + 2))


# -- one case -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A head with the embedding that it reads, or an embedding alone: what a line of the table is about."""

    name: str | None  # None: there is but one
    head: ProbeInfo | None
    embedding: str | None

    @property
    def activation(self) -> Activation:
        return "none" if self.head is None else self.head.activation

    def of(self, outputs: Outputs) -> Outputs:
        """Its own among the outputs, by the names that they have where there is one part."""
        names = {"logits": None if self.head is None else self.head.logits, "embedding": self.embedding}
        return {short: outputs[name] for short, name in names.items() if name is not None and name in outputs}


def _parts(manifest: Manifest) -> list[_Part]:
    parts = [_Part(probe.name, probe, probe.embedding) for probe in manifest.probes]
    parts = parts or [_Part(info.output, None, info.output) for info in manifest.embeddings]
    return parts if len(parts) > 1 else [replace(parts[0], name=None)]


def _check_clips(engine: Engine, case: Case, rows: int, measured: Sequence[Check] | None) -> Iterator[Check]:
    """The clips through the graph, as one batch in which they come again and again until it has that many rows."""
    which = np.arange(rows) % len(case.input)
    mask = None if case.padding_mask is None else case.padding_mask[which]
    found = engine.backend.run(*engine.graph_inputs(case.input[which], mask))
    eager = {name: value[which] for name, value in case.eager.items()}
    exact = None if case.exact is None else {name: value[which] for name, value in case.exact.items()}
    for part in _parts(engine.manifest):
        threshold = None if part.activation == "softmax" else 0.0
        of_it = None if exact is None else part.of(exact)
        yield _check(engine, case.name, part, part.of(found), part.of(eager), of_it, measured, threshold=threshold)


def _check_recording(
    engine: Engine, case: Case, sample_rate: int, measured: Sequence[Check] | None
) -> Iterator[Check]:
    """The recording the whole way: what `Engine.predict_all` and `Engine.embed` answer."""
    parts = _parts(engine.manifest)
    found = _answers(engine, case, sample_rate, parts)
    for part in parts:
        eager = _scored(part.of(case.eager), part.activation)
        exact = None if case.exact is None else _scored(part.of(case.exact), part.activation)
        threshold = Selection.of(score_scale(part.activation), None, None).threshold
        of_it = {} if found is None else found[part.name]
        yield _check(engine, case.name, part, of_it, eager, exact, measured, threshold=threshold, whole_way=True)


def _answers(
    engine: Engine, case: Case, sample_rate: int, parts: Sequence[_Part]
) -> dict[str | None, Outputs] | None:
    """Scores and embedding of each part by its name; None if an output is not finite."""
    predictions: list[Prediction] = []
    embeddings = {}
    most = max((probe.classes for probe in engine.manifest.probes), default=1)
    try:
        if engine.manifest.probes:
            predictions = engine.predict_all(case.input, sample_rate, top_k=most)
        for output in {part.embedding for part in parts if part.embedding is not None}:
            embeddings[output] = engine.embed(case.input, sample_rate, output=output)
    except TensorError:
        return None
    spans = next(iter(embeddings.values())).spans
    windows = spans if case.spans is not None and np.array_equal(spans, case.spans) else np.empty((0, 2))
    found: dict[str | None, Outputs] = {}
    scores = {p.probe: _scores(p, windows, engine.labels(p.probe)) for p in predictions}
    for part in parts:
        outputs = {} if part.head is None else {"scores": scores[part.head.name]}
        assert part.embedding is not None
        found[part.name] = {**outputs, "embedding": embeddings[part.embedding].embeddings}
    return found


def _scores(prediction: Prediction, spans: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Scores (N, C) of a prediction that reports every label of every window; NaN where it reports none."""
    scores = np.full((len(spans), len(labels)), np.nan)
    row = {(start, end): i for i, (start, end) in enumerate(spans.tolist())}
    column = {label: i for i, label in enumerate(labels)}
    for detection in prediction.detections:
        if (span := (detection.start, detection.end)) in row:
            scores[row[span], column[detection.label]] = detection.score
    return scores


def _scored(outputs: Outputs, activation: Activation) -> Outputs:
    """With scores in place of the logits, in float64 by the textbook: not by the code that serves."""
    if "logits" not in outputs:
        return outputs
    logits = outputs["logits"].astype(np.float64)
    if activation == "sigmoid":
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-logits))
    elif activation == "softmax":
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
    else:
        scores = logits
    return {"scores": scores, **{name: value for name, value in outputs.items() if name != "logits"}}


def _check(
    engine: Engine,
    name: str,
    part: _Part,
    found: Outputs,
    eager: Outputs,
    exact: Outputs | None,
    measured: Sequence[Check] | None,
    *,
    threshold: float | None,
    whole_way: bool = False,
) -> Check:
    format_ = engine.backend.format
    rows = len(next(iter(eager.values())))
    key = (name, part.name, rows, format_, whole_way)
    before = None if measured is None else [c for c in measured if _key(c) == key]
    errors, passed, by_float64 = {}, True, set()
    for output, value in eager.items():
        errors[output] = _errors(found.get(output), value, None if exact is None else exact[output])
        if _within(errors[output].eager, _limit(format_, output, before)):
            continue
        if format_ != INT8 and _is_noise(errors[output], tolerance_of(format_)):
            by_float64.add(output)
        else:
            passed = False
    decided_by = "scores" if whole_way else "logits"
    decisions = None
    if decided_by in eager and errors[decided_by].eager is not None:
        reference = exact[decided_by] if decided_by in by_float64 and exact is not None else eager[decided_by]
        decisions = _decide(found[decided_by], reference, threshold)
    return Check(
        input=name,
        part=part.name,
        rows=rows,
        format=format_,
        whole_way=whole_way,
        errors=errors,
        decisions=decisions,
        by_float64=passed and bool(by_float64),
        passed=passed,
    )


def _key(check: Check) -> tuple[str, str | None, int, str, bool]:
    return check.input, check.part, check.rows, check.format, check.whole_way


def _limit(format_: str, output: str, measured: Sequence[Check] | None) -> float:
    """The largest error that passes in a format, by what it was where the bundle was exported."""
    if format_ != INT8:
        return tolerance_of(format_)
    if measured is None:
        return math.inf
    errors = next((check.errors[output] for check in measured if output in check.errors), None)
    return 0.0 if errors is None else _INT8_FACTOR * (errors.eager or 0.0) + _INT8_SLACK


def _errors(found: np.ndarray | None, eager: np.ndarray, exact: np.ndarray | None) -> Errors:
    return Errors(
        eager=_distance(found, eager),
        float64=None if exact is None else _distance(found, exact),
        own=None if exact is None else _distance(eager, exact),
    )


def _distance(found: np.ndarray | None, expected: np.ndarray) -> float | None:
    """Largest difference relative to the largest expected value or to 1; None for another shape, or not finite."""
    if found is None or found.shape != expected.shape:
        return None
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return None
    return float(np.abs(found.astype(np.float64) - expected).max() / _scale(expected))


def _scale(expected: np.ndarray) -> float:
    return max(1.0, float(np.abs(expected).max()))


def _within(error: float | None, limit: float) -> bool:
    return error is not None and error <= limit


def _is_noise(errors: Errors, tolerance: float) -> bool:
    """Whether it is as near to float64 as it should be to eager mode, or hardly further than eager mode itself."""
    return errors.own is not None and _within(errors.float64, max(tolerance, NOISE_FACTOR * errors.own))


def _decide(found: np.ndarray, expected: np.ndarray, threshold: float | None) -> Decisions:
    """How many rows (N, C) name another label first, or others at all, and by how much.

    This needs no limit of its own: an error of e carries two labels past each other only if they are within 2 e, and
    one over the threshold only if it is within e of it.
    """
    rows = np.arange(len(found))
    best, expected_best = found.argmax(axis=1), expected.argmax(axis=1)
    differ, margins = best != expected_best, expected[rows, expected_best] - expected[rows, best]
    if threshold is not None:
        crossed = (found >= threshold) != (expected >= threshold)
        differ |= crossed.any(axis=1)
        margins = np.maximum(margins, np.where(crossed, np.abs(expected - threshold), 0).max(axis=1))
    return Decisions(compared=len(found), differ=int(differ.sum()), margin=float(margins.max()))


def _check_fit(engine: Engine, cases: Sequence[Case]) -> None:
    """Raise BundleError unless the evidence is of this bundle's inputs and outputs."""
    expected = {spec.name: spec.shape[1:] for spec in engine.manifest.outputs}
    for case in cases:
        if case.sample_rate is None:
            engine.check_input(case.input)
        rows = len(case.input if case.spans is None else case.spans)
        for outputs in (case.eager, case.eager if case.exact is None else case.exact):
            if (found := {name: value.shape[1:] for name, value in outputs.items()}) != expected:
                raise BundleError(
                    f"the evidence for {case.name!r} is of {found}; the manifest says {expected}; export again"
                )
            if not rows or any(value.dtype.kind != "f" or len(value) != rows for value in outputs.values()):
                raise BundleError(
                    f"the evidence for {case.name!r} holds no numbers for each of {rows} rows; export again"
                )


# -- the table ----------------------------------------------------------------------------------------------------

_LEGEND = (
    "eager: largest error against the module that was exported, relative to the largest value or to 1",
    "float64: the same against that module in float64; own: what the module itself is off from float64",
    "named: whether the best label and those above the threshold are the module's",
)
_OTHERS_LEGEND = (
    "other (…): that many rows were named otherwise, for labels so close to each other or the threshold",
)
_INT8_LEGEND = (
    f"{INT8}: judged by gates where it was exported, elsewhere by whether it is as near as it was there",
)
_NOISE_LEGEND = (
    f"≈: judged by float64, from which it is off by no more than may pass, or than {NOISE_FACTOR:g} times what the "
    "module itself is",
)


_SECTIONS = ((False, "clips through the graph", "rows"), (True, "recordings, the whole way", "windows"))


def table(checks: Sequence[Check], skipped: Sequence[str] = ()) -> str:
    """All checks as text, at most 117 characters wide."""
    lines: list[str] = []
    for whole_way, title, unit in _SECTIONS:
        of_it = [check for check in checks if check.whole_way is whole_way]
        for part in dict.fromkeys(check.part for check in of_it):
            lines += [""] if lines else []
            lines += [] if part is None else [f"{part}:"]
            lines += _rows(title, unit, [check for check in of_it if check.part == part])
    others = any(check.decisions is not None and check.decisions.differ for check in checks)
    lines += ["", *_LEGEND, *(_OTHERS_LEGEND if others else ())]
    lines += _INT8_LEGEND if any(check.format == INT8 for check in checks) else ()
    lines += _NOISE_LEGEND if any(check.by_float64 for check in checks) else ()
    return "\n".join([*(line.rstrip() for line in lines), *skipped])


def _rows(title: str, unit: str, checks: Sequence[Check]) -> list[str]:
    outputs = list(dict.fromkeys(output for check in checks for output in check.errors))
    lines = [f"{title:46}" + "".join(f"{output + ' error':^27}" for output in outputs)]
    columns = f"{'eager':>9}{'float64':>9}{'own':>9}" * len(outputs)
    lines.append(f"{'input':26}{unit:>7}  {'format':11}{columns}  named")
    for check in checks:
        numbers = "".join(_numbers(check.errors.get(output)) for output in outputs)
        mark = "≈" if check.by_float64 else "✓" if check.passed else "✗"
        lines.append(
            f"{check.input[:25]:26}{check.rows:7}  {check.format:11}{numbers}  {_named(check.decisions):16}  {mark}"
        )
    return lines


def _numbers(errors: Errors | None) -> str:
    found = (None,) * 3 if errors is None else (errors.eager, errors.float64, errors.own)
    return "".join(f"{'–':>9}" if error is None else f"{error:9.1e}" for error in found)


def _named(decisions: Decisions | None) -> str:
    if decisions is None:
        return "–"
    if not decisions.differ:
        return "as eager"
    return f"{decisions.differ} other ({decisions.margin:.0e})"
