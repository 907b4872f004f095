"""Any bundle on labelled recordings. Needs no torch."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avex_serve.bundles.manifest import PROBE, Activation
from avex_serve.bundles.trained import trained_on
from avex_serve.calibration.scales import log_odds
from avex_serve.errors import InputError
from avex_serve.evidence.first import open_checked
from avex_serve.inference.scores import activate
from avex_serve.training.dataset import LabelOptions
from avex_serve.training.embed import run_windows
from avex_serve.training.files import can_make_page, write_report
from avex_serve.training.noise import noise_logits
from avex_serve.training.page import PAGE
from avex_serve.training.report import Evaluation, Predictions, report
from avex_serve.writing import report_full_disk


@dataclass(frozen=True)
class EvaluationRequest(LabelOptions):
    """The options of ``avex-serve evaluate``; see its ``--help``."""

    bundle: Path | str  # a folder or a URL
    data: Path | tuple[Path, ...]
    output: Path | None = None  # folder of the report
    probe: str | None = None
    seed: int = 0
    overlap: float = 0.0  # seconds
    cache: Path = Path("~/.cache/avex-serve")


def evaluate_bundle(request: EvaluationRequest, say: Callable[[str], None] = print) -> Evaluation:
    """Evaluate a head of a bundle on all windows with a known label. The report says how many trained it.

    The files of `write_report` are written into ``request.output``, if that is given.

    Args:
        request: what to do.
        say: is called with the progress.

    Raises:
        BundleError: not a bundle.
        InputError: data or options that can't be used.
        NotFoundError: no such data or probe.
        UnsupportedError: the bundle takes embeddings, or has no head.
        VerificationError: on this machine the bundle answers otherwise than its evidence.
    """
    if request.output is not None and request.output.exists() and not request.output.is_dir():
        raise InputError(f"--output {request.output} is a file; name a folder for the report")
    if request.output is not None and (request.output / PROBE).exists():
        raise InputError(f"--output {request.output} holds a probe with a report of its own; name another folder")
    store = request.cache.expanduser() / "outputs"
    page = request.output is not None and can_make_page(say)
    with (
        open_checked(request.bundle, "cpu", precision="float32") as engine,
        tempfile.TemporaryDirectory(prefix="avex-evaluate-") as scratch,
    ):
        _ = engine.audio_spec
        head = engine.probe(request.probe)
        labels = engine.labels(head.name)
        dataset = request.read(request.data, labels)
        windows, lost = run_windows(
            engine,
            [head.logits],
            dataset,
            store,
            Path(scratch),
            overlap=request.overlap,
            min_overlap=request.min_overlap,
            say=say,
        )
        logits = _logits(windows.outputs[0], head.activation)
        noise = noise_logits(engine, [head.logits], lambda outputs: _logits(outputs[0], head.activation), store)
        predictions = [Predictions.of(np.arange(len(logits)), logits, head.calibration, head.activation)]
        evaluation = report(
            windows,
            labels,
            predictions,
            model=engine.manifest.model,
            probe=head.name,
            chosen={},
            evaluated="all",
            calibration=head.calibration,
            noise=noise,
            problems=[*dataset.problems, *lost],
            seed=request.seed,
            trained_on=trained_on(engine.bundle, head),
        )
        if request.output is not None:
            with report_full_disk():
                request.output.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=request.output) as unfinished:
                    write_report(Path(unfinished), evaluation, windows, predictions, page=page)
                    for path in Path(unfinished).iterdir():
                        path.replace(request.output / path.name)
                if not page:  # of an earlier report
                    (request.output / PAGE).unlink(missing_ok=True)
        return evaluation


def _logits(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """Logits whose sigmoid is the score (N, C) that the bundle reports; raw logits as they are."""
    as_they_are = activation in ("sigmoid", "none")
    return np.array(logits) if as_they_are else log_odds(activate(logits, activation), activation)
