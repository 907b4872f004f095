"""The evidence in a bundle: inputs with the eager module's answers.

    verification.json   the cases, the machine that computed them, and the result of each comparison (`Record`)
    verification.npz    for case i: i/input, i/eager/OUTPUT and i/float64/OUTPUT; i/spans for a recording,
                        i/padding_mask for padded clips

Audio with the samples of a 16-bit file, as the exporter uses, is stored as 16-bit integers.
"""

import contextlib
import platform
import subprocess
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from avex_serve.bundles.manifest import EVIDENCE, VERIFICATION, Positive
from avex_serve.bundles.reading import Bundle
from avex_serve.errors import BundleError

EVIDENCE_VERSION: Final = 1
MAX_BYTES: Final = 2**30  # of the arrays, which a small file can hold compressed
INT16_SCALE: Final = 32768.0

# onnxruntime and torch choose their kernels by these.
_X86 = ("sse4_1", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve")
_PACKAGES = ("avex-serve", "numpy", "onnx", "onnxruntime", "openvino", "torch")

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """An input and the eager module's answers to it."""

    name: str
    input: np.ndarray  # clips or embeddings (K, …), or a recording (S,); float32
    sample_rate: int | None  # Hz, of a recording that is predicted end to end; None: clips for the graph
    batches: tuple[int, ...]  # for clips: batch sizes to run, each filled by repeating the clips
    spans: np.ndarray | None  # (N, 2) float64, for a recording: start and end of its windows in seconds
    eager: Outputs  # by output, float32: one row per clip or window, each computed alone
    exact: Outputs | None  # the same in float64; None: the module can't compute in float64
    padding_mask: np.ndarray | None = None  # (K, S) bool, for clips: True where padded; None: nothing is padded


class CaseEntry(Struct, frozen=True, kw_only=True):
    """A case without its arrays."""

    name: str
    sample_rate: Positive | None
    batches: tuple[Positive, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for clips without a batch size."""
        if self.sample_rate is None and not self.batches:
            raise ValueError(f"{self.name!r} can't be run: it has no batch sizes")


class Errors(Struct, frozen=True, kw_only=True):
    """Largest errors of one output, relative to its largest value or to 1, whichever is larger."""

    eager: float | None  # against the eager module; None: not finite, or another shape
    float64: float | None  # against the eager module in float64; None: unknown
    eager_error: float | None = field(name="own")  # of the eager module itself against float64


class Decisions(Struct, frozen=True, kw_only=True):
    """Clips or windows with other labels than the eager module's."""

    compared: int
    differ: int
    margin: float  # largest distance between the labels, or to the threshold, where they differ; 0 if none do


class Check(Struct, frozen=True, kw_only=True):
    """One case in one batch size and format."""

    input: str
    part: str | None = None  # which head, or which embedding without a head, if there are several
    rows: int
    format: str
    whole_way: bool  # whether a recording was predicted end to end
    errors: dict[str, Errors]  # by output
    decisions: Decisions | None
    by_float64: bool  # whether it passed only by its error against float64
    passed: bool


class Gain(Struct, frozen=True, kw_only=True):
    """The effect of one pass of the exporter on the ONNX graph."""

    name: str
    speedup: float  # time without it over time with it, on the exporting machine
    difference: float  # largest change of the first output, relative to its largest value or to 1


class Machine(Struct, frozen=True, kw_only=True):
    """The properties of a machine that affect numbers; none that identifies it."""

    cpu: str
    features: tuple[str, ...]  # of the processor, by their names in Linux
    system: str  # system and architecture
    versions: dict[str, str]  # of Python and of the installed packages

    def lines(self) -> str:
        """The machine as text, in two lines."""
        features = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.cpu}{features}, {self.system}\n{', '.join(f'{n} {v}' for n, v in self.versions.items())}"


class Record(Struct, frozen=True, kw_only=True):
    """The content of ``verification.json``."""

    evidence_version: Literal[1] = EVIDENCE_VERSION
    machine: Machine
    optimisation: str  # of onnxruntime, as in the service
    tolerance: float
    passed: bool
    # Those with arrays in verification.npz.
    cases: Annotated[tuple[CaseEntry, ...], Meta(min_length=1)]
    checks: tuple[Check, ...]
    skipped: tuple[str, ...]  # cases that were not compared or not stored, with the reason
    passes: tuple[Gain, ...] = ()  # if they were profiled


def write_evidence(folder: Path, record: Record, cases: Sequence[Case]) -> None:
    """Write both files; the record must list these cases, in this order."""
    (folder / VERIFICATION).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    arrays: dict[str, np.ndarray] = {}
    for i, case in enumerate(cases):
        arrays[f"{i}/input"] = _packed(case.input)
        arrays |= {f"{i}/eager/{name}": value for name, value in case.eager.items()}
        arrays |= {f"{i}/float64/{name}": value for name, value in (case.exact or {}).items()}
        extra = {"spans": case.spans, "padding_mask": case.padding_mask}
        arrays |= {f"{i}/{name}": value for name, value in extra.items() if value is not None}
    np.savez_compressed(folder / EVIDENCE, allow_pickle=False, **arrays)


def read_evidence(bundle: Bundle) -> tuple[Record, list[Case]]:
    """The record and the cases of a bundle.

    Raises:
        BundleError: the bundle has no evidence, or it is damaged.
    """
    with _opened(bundle) as (record, stored):
        return record, [_case(entry, i, stored) for i, entry in enumerate(record.cases)]


def has_evidence(bundle: Bundle) -> bool:
    """Whether the bundle carries evidence; those of the first exporters don't."""
    return None not in (bundle.path(VERIFICATION), bundle.path(EVIDENCE))


def read_first(bundle: Bundle) -> tuple[Record, list[Case]]:
    """The record, and the first case of clips; for a bundle of clips of any length, the shortest clips too.

    The other cases stay on the disk. Errors as of `read_evidence`.
    """
    audio = bundle.manifest.audio
    with _opened(bundle) as (record, stored):
        clips = [i for i, entry in enumerate(record.cases) if entry.sample_rate is None] or [0]
        first = [clips[0]]
        if audio is not None and audio.shortest_samples is not None:
            first.append(min(clips, key=lambda i: stored.zip.getinfo(f"{i}/input.npy").file_size))
        return record, [_case(record.cases[i], i, stored) for i in dict.fromkeys(first)]


@contextlib.contextmanager
def _opened(bundle: Bundle) -> Iterator[tuple[Record, Any]]:
    """The record, and numpy's archive of the arrays, which reads each when it is asked for."""
    text, arrays = bundle.path(VERIFICATION), bundle.path(EVIDENCE)
    if text is None or arrays is None:
        raise BundleError(
            f"{bundle.directory} holds no {EVIDENCE if text else VERIFICATION}, which its verification needs: it "
            "was made before bundles had evidence; export it again"
        )
    try:
        raw = msgspec.json.decode(text.read_bytes())
        version = raw.get("evidence_version") if isinstance(raw, dict) else None
        if version != EVIDENCE_VERSION:
            raise BundleError(
                f"{text} has evidence version {version!r}, this avex-serve reads {EVIDENCE_VERSION}; export again, "
                "or install the avex-serve that made it"
            )
        record = msgspec.convert(raw, Record)
        with zipfile.ZipFile(arrays) as archive:
            if (size := sum(info.file_size for info in archive.infolist())) > MAX_BYTES:
                raise BundleError(f"{arrays} would take {size} bytes of memory; expected at most {MAX_BYTES}")
        with arrays.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            yield record, stored
    except (
        msgspec.MsgspecError,
        ValueError,
        KeyError,
        EOFError,
        RecursionError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise BundleError(f"the evidence in {bundle.directory} can't be read ({error}); export again") from None


def _case(entry: CaseEntry, i: int, stored: Mapping[str, np.ndarray]) -> Case:
    def outputs(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{i}/{kind}/"
        return {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}

    return Case(
        name=entry.name,
        input=_unpacked(stored[f"{i}/input"]),
        sample_rate=entry.sample_rate,
        batches=entry.batches,
        spans=stored[f"{i}/spans"] if entry.sample_rate is not None else None,
        eager=outputs("eager"),
        exact=outputs("float64") or None,
        padding_mask=stored[mask] if (mask := f"{i}/padding_mask") in stored else None,
    )


def _packed(samples: np.ndarray) -> np.ndarray:
    """The samples as int16 if a 16-bit file can hold each of them, else unchanged."""
    if np.abs(samples).max() > 1:
        return samples
    scaled = samples * np.float32(INT16_SCALE)
    whole = (scaled == np.rint(scaled)).all() and scaled.max() < INT16_SCALE
    return scaled.astype(np.int16) if whole else samples


def _unpacked(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32) / np.float32(INT16_SCALE) if stored.dtype == np.int16 else stored


# -- the machine --------------------------------------------------------------------------------------------------


def this_machine() -> Machine:
    """The machine that this process runs on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    info = _cpuinfo()
    has = set(info.get("flags", info.get("Features", "")).split())
    return Machine(
        cpu=info.get("model name") or _macos_cpu() or platform.processor() or "unknown processor",
        features=tuple(feature for feature in (*_X86, *_ARM) if feature in has),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _cpuinfo() -> dict[str, str]:
    """The first core's fields in /proc/cpuinfo; empty on other systems than Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _macos_cpu() -> str | None:
    if platform.system() != "Darwin":
        return None
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
