"""What a saved probe's folder says of its head: calibration, headline of the evaluation, training recordings."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from avex_export.graph import Assembly, Head
from avex_export.request import ProbeSource
from avex_serve.bundles.manifest import TRAINED_ON, EvaluationInfo
from avex_serve.bundles.trained import read_trained_on
from avex_serve.calibration.scales import CALIBRATION, Calibration, read_calibration
from avex_serve.errors import InputError
from avex_serve.training.report import read_evaluation


class Measured(NamedTuple):
    """Of one head; None: not known."""

    calibration: Calibration | None = None
    evaluation: EvaluationInfo | None = None
    trained_on: frozenset[str] | None = None  # SHA-256 of each recording


def measured(source: ProbeSource, assembly: Assembly, head: Head, say: Callable[[str], None]) -> Measured:
    """What is known of a head; the calibration and the evaluation only if they are about what is exported.

    Args:
        source: where the head comes from.
        assembly: what is exported.
        head: of the assembly.
        say: is called with the reason why these are left out.

    Raises:
        BundleError: a damaged calibration, or damaged digests.
        InputError: a damaged evaluation, or a calibration of other labels.
    """
    folder = None if source.weights is None else source.weights.parent
    if source.saved is None or folder is None or assembly.headless:
        return Measured()
    found = Measured(read_calibration(folder), _read_evaluation(folder), read_trained_on(folder / TRAINED_ON))
    if found.calibration is None and found.evaluation is None:
        return found
    audio, length = assembly.audio, source.saved.target_length
    if source.activation != source.saved.activation:
        reason = "its scores are others than in its training"
    elif audio is not None and length is not None and audio.window_samples != length:
        reason = "it was evaluated on clips of another length"
    else:
        if found.calibration is not None and tuple(e.label for e in found.calibration.labels) != head.labels:
            raise InputError(f"{folder / CALIBRATION} is of other labels than the probe's; remove it, or fit again")
        return found
    say(f"calibration and evaluation of {source.name} are left out: {reason}")
    return Measured(trained_on=found.trained_on)


def _read_evaluation(folder: Path) -> EvaluationInfo | None:
    found = read_evaluation(folder)
    if found is None or found.macro is None or found.macro.average_precision.value is None:
        return None
    precision = found.macro.average_precision
    low, high = precision.low, precision.high
    return EvaluationInfo(
        average_precision=found.macro.average_precision.value,
        interval=None if low is None or high is None else (low, high),
        windows=found.windows,
        recordings=found.recordings,
        split=found.evaluated,
    )
