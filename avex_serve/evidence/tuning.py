"""What serves a bundle fastest on a machine: engine × precision × threads, each checked before it is measured.

Nothing but the service uses what was kept. A run over an archive gives the same bytes on any machine.
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from avex_serve.bundles.reading import Bundle, read_bundle
from avex_serve.bundles.remote import local_bundle
from avex_serve.errors import AvexServeError, InputError, StorageError, VerificationError
from avex_serve.evidence.cases import this_machine
from avex_serve.evidence.first import open_checked
from avex_serve.inference.engine import Engine
from avex_serve.scheduling.cores import usable_cores

logger = logging.getLogger(__name__)

FILE: Final = "tuned.json"
ROUNDS: Final = 5
_TURN_SECONDS: Final = 0.5  # of a measurement, at least
_GAIN: Final = 1.05  # smaller gains are within what one machine shows from day to day


class Setup(msgspec.Struct, frozen=True):
    """What runs a bundle; the names are those of `open_bundle`."""

    device: str
    precision: str
    runtime: str
    threads: int

    def settings(self) -> str:
        """The same as settings of the service."""
        named = {
            "DEVICE": self.device,
            "PRECISION": self.precision,
            "RUNTIME": self.runtime,
            "THREADS": self.threads,
        }
        return " ".join(f"AVEX_{name}={value}" for name, value in named.items())


_ENGINES: Final = (
    ("cpu", "int8", "auto"),
    ("cpu", "float32", "auto"),
    ("cpu", "float32", "openvino"),
    ("cuda", "float32", "auto"),
)


@dataclass(frozen=True)
class Measured:
    """How fast one choice answers."""

    choice: Setup
    format: str  # see `Backend.format`
    rates: tuple[float, ...]  # windows a second, of each round

    def times(self, other: "Measured") -> float:
        """How many times as fast as another this is: the median of the rounds."""
        return statistics.median(mine / its for mine, its in zip(self.rates, other.rates, strict=True))


@dataclass(frozen=True)
class Tuning:
    """What was measured of a bundle.

    Attributes:
        bundle: it.
        measured: what answers as the evidence says.
        usual: what serves the bundle where nothing else was asked for.
        left_out: the others, each with the reason.
    """

    bundle: Bundle
    measured: list[Measured]
    usual: Measured
    left_out: list[str]

    @property
    def best(self) -> Measured:
        """The fastest, but the usual one unless another is clearly faster, and in every round."""
        fastest = max(self.measured, key=lambda each: each.times(self.usual))
        ahead = all(mine > its for mine, its in zip(fastest.rates, self.usual.rates, strict=True))
        return fastest if ahead and fastest.times(self.usual) >= _GAIN else self.usual


def tune(address: str, say: Callable[[str], None]) -> Tuning:
    """Measure what runs a bundle on this machine, taking turns.

    Args:
        address: as of `open_bundle`.
        say: is called with the name of each engine before it is checked.

    Raises:
        VerificationError: nothing here answers as the evidence says.
        AvexServeError: of the bundle, as of `read_bundle`.
    """
    bundle = read_bundle(local_bundle(address))
    cores = usable_cores()
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        racers: list[tuple[Setup, Engine, np.ndarray]] = []
        for device, precision, runtime in _ENGINES:
            name = f"{device}, {precision}" + ("" if runtime == "auto" else f", {runtime}")
            say(name)
            try:
                checked = open_checked(
                    bundle.directory, device, precision=precision, threads=cores, runtime=runtime, mode="on"
                )
            except AvexServeError as error:
                left_out.append(f"{name}: {error}")
                continue
            stack.enter_context(checked)
            for threads in _counts(cores) if device == "cpu" else [cores]:
                engine = stack.enter_context(Engine(bundle, checked.backend, threads))
                racers.append((Setup(device, precision, runtime, threads), engine, _rows(engine)))
        if not racers:
            raise VerificationError("nothing on this machine can serve the bundle:\n" + "\n".join(left_out))
        rates: list[list[float]] = [[] for _ in racers]
        for _ in range(ROUNDS):
            for found, (_, engine, rows) in zip(rates, racers, strict=True):
                found.append(_rate(engine, rows))
    measured = [
        Measured(choice, engine.backend.format, tuple(found))
        for (choice, engine, _), found in zip(racers, rates, strict=True)
    ]
    return Tuning(bundle, measured, _usual(measured, cores), left_out)


def _counts(cores: int) -> list[int]:
    """Numbers of threads: powers of two, and all cores."""
    return [2**i for i in range(cores.bit_length()) if 2**i < cores] + [cores]


def _usual(measured: list[Measured], cores: int) -> Measured:
    """As `open_bundle` chooses: CUDA where it works, or else int8 where the bundle has it."""
    asked = [each for each in measured if each.choice.runtime == "auto" and each.choice.threads == cores]
    asked = asked or measured
    return next((each for each in asked if each.choice.device == "cuda"), asked[0])


def _rows(engine: Engine) -> np.ndarray:
    """Noise for as many calls as run at the same time, in the shape of the bundle's first input."""
    audio, shape = engine.manifest.audio, engine.manifest.inputs[0].shape
    row = (audio.window_samples,) if audio is not None else tuple(1 if size == -1 else size for size in shape[1:])
    noise = np.random.default_rng(0).standard_normal((engine.threads * engine.backend.max_batch, *row), np.float32)
    return (0.1 * noise).clip(-1, 1)


def _rate(engine: Engine, rows: np.ndarray) -> float:
    """Windows a second."""
    begun, windows = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < _TURN_SECONDS:
        engine.infer(rows)
        windows += len(rows)
    return windows / taken


def table(tuning: Tuning) -> str:
    """What was measured, as text."""
    manifest, machine = tuning.bundle.manifest, this_machine()
    lines = [
        f"bundle {manifest.name}, version {manifest.version}, on {usable_cores()} cores of {machine.cpu}",
        "",
        f"{'graph':12}{'threads':>8}{'windows a second':>28}{'× as served':>14}",
    ]
    for each in tuning.measured:
        median, low, high = map(_figure, (statistics.median(each.rates), min(each.rates), max(each.rates)))
        rate = f"{median} ({low}–{high})"
        mark = "  usual" if each is tuning.usual else ""
        lines.append(f"{each.format:12}{each.choice.threads:8} {rate:>27}{each.times(tuning.usual):14.2f}{mark}")
    lines += [f"not measured: {reason}" for reason in tuning.left_out]
    return "\n".join(lines)


def _figure(rate: float) -> str:
    """Three digits, or all that are in front of the point."""
    return f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"


# -- what was chosen for this processor ---------------------------------------------------------------------------

_Kept = dict[str, dict[str, Setup]]  # by digest of the bundle, then by processor


def check_folder(folder: Path) -> None:
    """Raise StorageError unless a choice can be kept there, InputError if the file there is damaged."""
    _write(_read(folder / FILE), folder / FILE)


def keep(tuning: Tuning, folder: Path) -> Path:
    """Keep the best choice for this processor; returns the file. Errors as of `check_folder`."""
    path = folder / FILE
    choices = _read(path)
    choices.setdefault(tuning.bundle.digest, {})[this_machine().cpu] = tuning.best.choice
    _write(choices, path)
    return path


def kept(bundle: Bundle, folder: Path) -> Setup | None:
    """What was kept of a bundle for this processor, None if nothing was; InputError if the file is damaged.

    A folder that can't be read, such as another user's, stops no service.
    """
    try:
        choices = _read(folder / FILE)
    except StorageError as error:
        logger.warning("%s; bundles are served as without avex-serve tune", error)
        return None
    return choices.get(bundle.digest, {}).get(this_machine().cpu)


def _read(path: Path) -> _Kept:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InputError(f"{path} is damaged: {error}; delete it, and run avex-serve tune again") from error


def _write(choices: _Kept, path: Path) -> None:
    unfinished = path.with_name(f".{FILE}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(choices)))
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}; set AVEX_BUNDLE_CACHE") from error
