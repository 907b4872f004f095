"""The first answer of an engine, compared with the evidence before anybody relies on it.

A processor, a driver or a new version of a library may compute wrongly without an error. The first answer is needed
in any case, to set up what a graph needs. So it is one whose right value the bundle carries.
"""

import logging
import os
from dataclasses import replace
from typing import Final, Literal

import msgspec
import numpy as np

from avex_serve.errors import BundleError, InputError, VerificationError, quoted
from avex_serve.evidence.cases import Case, Check, has_evidence, read_first
from avex_serve.evidence.verify import check_fit, describe_failure, run_case
from avex_serve.inference.backend import open_bundle
from avex_serve.inference.engine import Engine

logger = logging.getLogger(__name__)

# Whether a bundle that answers otherwise is refused, is served with a warning, or isn't compared.
Mode = Literal["on", "warn", "off"]
VARIABLE: Final = "AVEX_CHECK"
# TorchScript compiles for CUDA in the second call what the first one has seen.
_CALLS: Final = {"cpu": 1, "cuda": 3}


def read_mode() -> Mode:
    """What the environment says, by default "on"; InputError for another value."""
    value = os.environ.get(VARIABLE) or "on"
    try:
        mode: Mode = msgspec.convert(value, Mode)
    except msgspec.ValidationError:
        raise InputError(f"{VARIABLE} is {value!r}; expected on, warn or off") from None
    return mode


def open_checked(
    address: str | os.PathLike[str],
    device: str = "auto",
    *,
    precision: str = "auto",
    threads: int | None = None,
    runtime: str = "auto",
    mode: Mode | None = None,
) -> Engine:
    """Open a bundle, and compare its first answer on this machine with its evidence.

    A bundle without evidence answers once for silence, and so does any bundle if `mode` is "off".

    Args:
        address: as of `open_bundle`, like the other arguments.
        device: see there.
        precision: see there.
        threads: see there.
        runtime: see there.
        mode: None: what AVEX_CHECK says.

    Raises:
        VerificationError: the answer differs, and `mode` is "on". With "warn", each answer has a warning.
        BundleError: the graph loads but doesn't answer, or the evidence is damaged.
        InputError: AVEX_CHECK is something else; or as of `open_bundle`.
    """
    mode = read_mode() if mode is None else mode
    engine = open_bundle(address, device, precision=precision, threads=threads, runtime=runtime)
    try:
        if mode == "off":
            _answer_silence(engine)
        elif not has_evidence(engine.bundle):
            logger.info("bundle %s carries no evidence: its first answer isn't compared", engine.manifest.name)
            _answer_silence(engine)
        elif (failure := _compare(engine)) is not None:
            if mode == "on":
                raise VerificationError(f"{failure}; {VARIABLE}=warn uses it nevertheless")
            logger.warning("%s", failure)
            engine.warnings += (failure,)
    except BaseException:
        engine.close()
        raise
    return engine


def _compare(engine: Engine) -> str | None:
    """What is wrong with the first answers, and the remedy; None if they agree with the evidence."""
    record, cases = read_first(engine.bundle)
    check_fit(engine, cases)
    checks: list[Check] = []
    for case in cases:
        try:
            for _ in range(_CALLS[engine.backend.device]):
                checks += run_case(engine, _as_served(engine, case), record.checks)
        except Exception as error:  # onnxruntime and torch have their own error classes
            raise _unanswered(engine, repr(case.name), error) from error
    failure = describe_failure(checks, record.checks)
    if failure is None:
        return None
    manifest, backend = engine.manifest, engine.backend
    verify = f"avex-serve verify {quoted(engine.bundle.directory)}"
    if backend.format == "openvino":
        verify += " --runtime openvino"
    return (
        f"on this machine bundle {manifest.name}, version {manifest.version}, answers otherwise than its evidence "
        f"({backend.format} on {backend.device}): {failure}; `{verify}` "
        "shows more, and another precision or device may answer as expected"
    )


def _as_served(engine: Engine, case: Case) -> Case:
    """The case in the sizes of batches that the backend is called with."""
    served = tuple(rows for rows in case.batches if rows <= engine.backend.max_batch)
    return replace(case, batches=served or case.batches[:1])


def _answer_silence(engine: Engine) -> None:
    manifest = engine.manifest
    try:
        if (audio := manifest.audio) is not None:
            engine.infer_recording(np.zeros(audio.window_samples, np.float32), audio.sample_rate)
        else:
            engine.infer(np.zeros([1 if size == -1 else size for size in manifest.inputs[0].shape], np.float32))
    except Exception as error:
        raise _unanswered(engine, "silence", error) from error


def _unanswered(engine: Engine, what: str, error: Exception) -> BundleError:
    return BundleError(f"bundle {engine.manifest.name} loads, but fails to answer for {what}: {error}")
