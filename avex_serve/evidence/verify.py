"""Verification: a bundle's answers compared with its evidence, and the result as a table.

The exporter verifies the bundle that it writes. ``avex-serve verify`` repeats this on another machine.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from avex_serve.bundles.manifest import Activation, Manifest, ProbeInfo
from avex_serve.bundles.reading import read_bundle
from avex_serve.bundles.remote import local_bundle
from avex_serve.errors import AudioError, BundleError, TensorError
from avex_serve.evidence.cases import Case, Check, Decisions, Errors, Machine, Outputs, read_evidence, this_machine
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine
from avex_serve.inference.results import Prediction
from avex_serve.inference.scores import Selection

# Errors are relative to the largest expected value or to 1, whichever is larger. Two ways to compute a spectrum, and
# the float32 roundings of a transformer, are within this tolerance.
TOLERANCE = 1e-4
# For half precision, whose numbers have eleven bits: a few roundings of a deep network.
_HALF_TOLERANCE = 2e-2
# A format also passes if its error against float64 is within tolerance, or at most this many times the eager
# module's error against float64: both are rounding errors, and one clip shows one random value of each.
_NOISE_FACTOR = 4.0
# At the export, int8 is compared with float32 on many clips. On another machine its error may be this many times the
# error at the export, plus the slack: a value between two levels is rounded up on one CPU and down on another.
_INT8 = "onnx-int8"
_INT8_FACTOR, _INT8_SLACK = 2.0, 1e-3


def verify_bundle(
    address: str | os.PathLike[str], device: str = "cpu", *, full: bool = False, runtime: str = "auto"
) -> tuple[str, bool]:
    """Run a bundle's evidence again on this machine.

    Args:
        address: as in `open_bundle`.
        device: as in `open_bundle`.
        full: show all checks, not only the worst ones.
        runtime: as in `open_bundle`.

    Returns:
        The result as text (the table, and both machines), and whether everything agrees.

    Raises:
        BundleError: an incomplete bundle, or one without evidence.
        DependencyError: torch, CUDA or OpenVINO is missing.
        InputError: an unknown device or runtime, or those that don't go together.
    """
    directory = local_bundle(address)
    read_bundle(directory)  # opening checks only the files that it loads
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(open_bundle(directory, device, precision="float32", runtime=runtime))]
        record, cases = read_evidence(engines[0].bundle)
        check_fit(engines[0], cases)
        if engines[0].manifest.quantisation is not None and device != "cuda" and runtime == "auto":
            engines.append(stack.enter_context(open_bundle(directory, device, precision="int8")))
        checks = [c for case in cases for engine in engines for c in run_case(engine, case, record.checks)]
    passed = all(check.passed for check in checks)
    others = dict.fromkeys(c.format for c in record.checks if c.format not in {e.backend.format for e in engines})
    skipped = [f"not run again, since {device} is served by another format: {name}" for name in others]
    machines = f"{_machine('exported on', record.machine)}\n{_machine('verified on', this_machine())}"
    return f"{table(checks, skipped, full=full)}\n\n{machines}", passed


def _machine(title: str, machine: Machine) -> str:
    return f"{title}: " + machine.lines().replace("\n", "\n" + " " * (len(title) + 2))


def check_fit(engine: Engine, cases: Sequence[Case]) -> None:
    """Raise BundleError unless the evidence has the shapes of the bundle's inputs and outputs."""
    expected = {spec.name: spec.shape[1:] for spec in engine.manifest.outputs}
    for case in cases:
        if case.sample_rate is None:
            with contextlib.suppress(AudioError):  # samples of another scale: the comparison tells what they do
                engine.check_input(case.input)
        rows = len(case.input if case.spans is None else case.spans)
        for outputs in (case.eager, case.eager if case.exact is None else case.exact):
            if (found := {name: value.shape[1:] for name, value in outputs.items()}) != expected:
                raise BundleError(
                    f"the evidence for {case.name!r} has outputs {found}, the manifest {expected}; export again"
                )
            if not rows or any(value.dtype.kind != "f" or len(value) != rows for value in outputs.values()):
                raise BundleError(
                    f"the evidence for {case.name!r} holds no numbers for each of {rows} rows; export again"
                )


# -- one case -----------------------------------------------------------------------------------------------------


def run_case(engine: Engine, case: Case, measured: Sequence[Check] | None = None) -> Iterator[Check]:
    """Compare the engine's outputs with the eager module's: for clips in batches, for a recording end to end.

    Args:
        engine: runs the format to verify.
        case: the input and the expected outputs.
        measured: the checks of the export, which give the limits for int8; None: this is the export.
    """
    parts = _parts(engine.manifest)
    if case.sample_rate is not None:
        predicted = _predict(engine, case, case.sample_rate, parts)
        for part in parts:
            expected = (part.scored(case.eager), part.scored(case.exact or {}))
            yield _check(engine, case, part, predicted.get(part.name, {}), *expected, measured)
        return
    # Int8 rounds activations by the range of a whole batch, and the service runs it with batches of one clip.
    for rows in (1,) if engine.backend.format == _INT8 else case.batches:
        which = np.arange(rows) % len(case.input)
        mask = None if case.padding_mask is None else case.padding_mask[which]
        found = engine.backend.run(*engine.graph_inputs(case.input[which], mask))
        eager, exact = (
            {name: value[which] for name, value in (outputs or {}).items()} for outputs in (case.eager, case.exact)
        )
        for part in parts:
            yield _check(engine, case, part, part.of(found), part.of(eager), part.of(exact), measured)


@dataclass(frozen=True)
class _Part:
    """The subject of a line of the table: a head with its embedding, or an embedding without a head."""

    name: str | None  # None: the bundle has one part
    head: ProbeInfo | None
    embedding: str | None

    @property
    def activation(self) -> Activation:
        return "none" if self.head is None else self.head.activation

    def of(self, outputs: Outputs) -> Outputs:
        """The part's own outputs, as ``logits`` and ``embedding``."""
        names = {"logits": None if self.head is None else self.head.logits, "embedding": self.embedding}
        return {short: outputs[name] for short, name in names.items() if name is not None and name in outputs}

    def scored(self, outputs: Outputs) -> Outputs:
        """`of` with scores in place of logits, computed by other code than the service's, in float64."""
        own = dict(self.of(outputs))
        if "logits" not in own:
            return own
        logits = own.pop("logits").astype(np.float64)
        if self.activation == "sigmoid":
            with np.errstate(over="ignore"):
                logits = 1 / (1 + np.exp(-logits))
        elif self.activation == "softmax":
            logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
            logits /= logits.sum(axis=-1, keepdims=True)
        return {"scores": logits, **own}


def _parts(manifest: Manifest) -> list[_Part]:
    parts = [_Part(probe.name, probe, probe.embedding) for probe in manifest.probes]
    parts = parts or [_Part(info.output, None, info.output) for info in manifest.embeddings]
    return parts if len(parts) > 1 else [replace(parts[0], name=None)]


def _predict(engine: Engine, case: Case, sample_rate: int, parts: Sequence[_Part]) -> dict[str | None, Outputs]:
    """Scores and embedding of a recording by part, from the methods that serve; empty if they refuse it."""
    most = max((probe.classes for probe in engine.manifest.probes), default=1)
    try:
        predictions = engine.predict_all(case.input, sample_rate, top_k=most) if engine.manifest.probes else []
        outputs = {part.embedding for part in parts}
        embeddings = {output: engine.embed(case.input, sample_rate, output=output) for output in outputs}
    except (TensorError, AudioError):  # an output that is not finite, or samples of another scale
        return {}
    found: dict[str | None, Outputs] = {p.name: {"embedding": embeddings[p.embedding].embeddings} for p in parts}
    spans = embeddings[parts[0].embedding].spans
    windows = spans if case.spans is not None and np.array_equal(spans, case.spans) else np.empty((0, 2))
    for part, prediction in zip(parts, predictions, strict=False):  # a bundle without heads has no predictions
        scores = _scores(prediction, windows, engine.labels(prediction.probe))
        found[part.name] = {"scores": scores, **found[part.name]}
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


def _check(
    engine: Engine,
    case: Case,
    part: _Part,
    found: Outputs,
    eager: Outputs,
    exact: Outputs,
    measured: Sequence[Check] | None,
) -> Check:
    """Compare outputs of a part with those of the eager module and, if there are any, with those in float64."""
    format_, end_to_end = engine.backend.format, case.sample_rate is not None
    key = (case.name, part.name, len(next(iter(eager.values()))), format_, end_to_end)
    errors, passed, by_float64 = {}, True, set()
    for output, value in eager.items():
        error = Errors(
            eager=_distance(found.get(output), value),
            float64=_distance(found.get(output), exact.get(output)),
            eager_error=_distance(value, exact.get(output)),
        )
        errors[output] = error
        if _within(error.eager, _limit(key, output, measured)):
            continue
        noise = None if error.eager_error is None else max(_tolerance(format_), _NOISE_FACTOR * error.eager_error)
        if format_ != _INT8 and noise is not None and _within(error.float64, noise):
            by_float64.add(output)
        else:
            passed = False
    decided_by = "scores" if end_to_end else "logits"
    decisions = None
    if decided_by in eager and errors[decided_by].eager is not None:
        reference = exact if decided_by in by_float64 else eager
        decisions = _decide(found[decided_by], reference[decided_by], _threshold(part.activation, end_to_end))
    return Check(
        input=case.name,
        part=part.name,
        rows=len(next(iter(eager.values()))),
        format=format_,
        whole_way=end_to_end,
        errors=errors,
        decisions=decisions,
        by_float64=passed and bool(by_float64),
        passed=passed,
    )


def describe_failure(checks: Sequence[Check], measured: Sequence[Check]) -> str | None:
    """The largest error that failed, in words, and its limit; None if all checks passed."""
    failed = [
        (math.inf if error.eager is None else error.eager, output, check)
        for check in checks
        if not check.passed
        for output, error in check.errors.items()
    ]
    if not failed:
        return None
    error, output, check = max(failed, key=lambda each: each[0])
    name = output if check.part is None else f"{output} of {check.part}"
    subject = f"{name} for {check.input!r}, {check.rows} at once"
    if error == math.inf:
        return f"{subject}: not finite, or of another shape"
    limit = _limit(_key(check), output, measured)
    return f"{subject}: off by {error:.1e} of the largest value, or of 1; expected at most {limit:.1e}"


def _key(check: Check) -> tuple[Any, ...]:
    """What a check of the export and one of this machine have in common."""
    return check.input, check.part, check.rows, check.format, check.whole_way


def _tolerance(format_: str) -> float:
    return _HALF_TOLERANCE if format_ == "torch-half" else TOLERANCE


def _limit(key: tuple[Any, ...], output: str, measured: Sequence[Check] | None) -> float:
    """The largest error that passes; of int8 from the same check at the export, where gates are the limit."""
    format_ = key[3]
    if format_ != _INT8:
        return _tolerance(format_)
    if measured is None:
        return math.inf
    same = (check for check in measured if _key(check) == key and output in check.errors)
    check = next(same, None)
    return 0.0 if check is None else _INT8_FACTOR * (check.errors[output].eager or 0.0) + _INT8_SLACK


def _distance(found: np.ndarray | None, expected: np.ndarray | None) -> float | None:
    """The relative error; None if an array is missing, has another shape or is not finite."""
    if found is None or expected is None or found.shape != expected.shape:
        return None
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return None
    return float(np.abs(found.astype(np.float64) - expected).max() / max(1.0, float(np.abs(expected).max())))


def _within(error: float | None, limit: float) -> bool:
    return error is not None and error <= limit


def _threshold(activation: Activation, end_to_end: bool) -> float | None:
    """The threshold of scores or, for clips, of logits; None: only the best label counts."""
    if end_to_end:
        return float(Selection.of(activation, None, None).threshold)
    return None if activation == "softmax" else 0.0


def _decide(found: np.ndarray, expected: np.ndarray, threshold: float | None) -> Decisions:
    """Count the rows (N, C) with another best label, or other labels above the threshold, and by what margin.

    The limit of the errors also limits these margins: an error of e swaps two labels only if they are within 2 e of
    each other, and moves a label across the threshold only if it is within e of it.
    """
    rows = np.arange(len(found))
    best, expected_best = found.argmax(axis=1), expected.argmax(axis=1)
    differ, margins = best != expected_best, expected[rows, expected_best] - expected[rows, best]
    if threshold is not None:
        crossed = (found >= threshold) != (expected >= threshold)
        differ |= crossed.any(axis=1)
        margins = np.maximum(margins, np.where(crossed, np.abs(expected - threshold), 0).max(axis=1))
    return Decisions(compared=len(found), differ=int(differ.sum()), margin=float(margins.max()))


# -- the table ----------------------------------------------------------------------------------------------------

_LEGEND = (
    "eager: largest error against the module that was exported, relative to the largest value or to 1",
    "float64: the same against that module in float64; module: that module's own error against float64",
    "decisions: whether the best label, and the labels above the threshold, are the module's",
)
_OTHERS_LEGEND = (
    "other (…): rows with other decisions, and how close their labels are to each other or to the threshold"
)
_INT8_LEGEND = f"{_INT8}: judged by gates at the export, and elsewhere by the errors found at the export"
_NOISE_LEGEND = (
    "≈: passed by its error against float64, which is within tolerance or at most "
    f"{_NOISE_FACTOR:g} times the module's own"
)
_SECTIONS = ((False, "clips through the graph", "rows"), (True, "recordings, end to end", "windows"))


def table(checks: Sequence[Check], skipped: Sequence[str] = (), *, full: bool = False) -> str:
    """The checks as text: all of them or, of each format, those that failed and the worst one."""
    shown = list(checks) if full else _worst(checks)
    lines: list[str] = []
    for end_to_end, title, unit in _SECTIONS:
        section = [check for check in shown if check.whole_way is end_to_end]
        for part in dict.fromkeys(check.part for check in section):
            lines += [""] if lines else []
            lines += [] if part is None else [f"{part}:"]
            lines += _rows(title, unit, [check for check in section if check.part == part])
    if others := len(checks) - len(shown):
        lines.append(f"{others} others passed with smaller errors; `avex-serve verify BUNDLE --full` shows them")
    lines += ["", *_LEGEND]
    for legend, applies in (
        (_OTHERS_LEGEND, any(check.decisions is not None and check.decisions.differ for check in shown)),
        (_INT8_LEGEND, any(check.format == _INT8 for check in shown)),
        (_NOISE_LEGEND, any(check.by_float64 for check in shown)),
    ):
        lines += [legend] if applies else []
    return "\n".join([*(line.rstrip() for line in lines), *skipped])


def _worst(checks: Sequence[Check]) -> list[Check]:
    """The checks that failed and, of each kind, the one with other decisions or the largest error."""

    def badness(check: Check) -> tuple[int, float]:
        differ = 0 if check.decisions is None else check.decisions.differ
        return differ, max((error.eager or 0.0 for error in check.errors.values()), default=0.0)

    worst: dict[tuple[bool, str | None, str], Check] = {}
    for check in checks:
        kind = (check.whole_way, check.part, check.format)
        if kind not in worst or badness(check) > badness(worst[kind]):
            worst[kind] = check
    kept = {id(check) for check in worst.values()}
    return [check for check in checks if id(check) in kept or not check.passed]


def _rows(title: str, unit: str, checks: Sequence[Check]) -> list[str]:
    outputs = list(dict.fromkeys(output for check in checks for output in check.errors))
    lines = [f"{title:24}" + "".join(f"{output + ' error':^27}" for output in outputs)]
    columns = f"{'eager':>9}{'float64':>9}{'module':>9}" * len(outputs)
    lines.append(f"  {'format':11}{unit:>9}  {columns}  {'decisions':16}     input")
    for check in checks:
        numbers = "".join(_numbers(check.errors.get(output)) for output in outputs)
        mark = "≈" if check.by_float64 else "✓" if check.passed else "✗"
        decided = _decided(check.decisions)
        lines.append(f"  {check.format:11}{check.rows:9}  {numbers}  {decided:16}  {mark}  {check.input}")
    return lines


def _numbers(errors: Errors | None) -> str:
    found = (None,) * 3 if errors is None else (errors.eager, errors.float64, errors.eager_error)
    return "".join(f"{'–':>9}" if error is None else f"{error:9.1e}" for error in found)


def _decided(decisions: Decisions | None) -> str:
    if decisions is None:
        return "–"
    if not decisions.differ:
        return "as eager"
    return f"{decisions.differ} other ({decisions.margin:.0e})"
