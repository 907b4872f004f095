"""The machine of a verification: versions and processor, which determine the last digits of an answer."""

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from msgspec import Struct

# onnxruntime and torch choose their kernels by these.
_X86 = ("sse4_1", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve")
_PACKAGES = ("avex-serve", "numpy", "onnx", "onnxruntime", "torch")


class Machine(Struct, frozen=True, kw_only=True):
    """What affects numbers on a machine; nothing that identifies it."""

    cpu: str
    features: tuple[str, ...]  # of the processor, by their names in Linux
    system: str  # system and architecture
    versions: dict[str, str]  # of Python and of the installed packages

    def lines(self) -> str:
        """The machine as text, in two lines."""
        features = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.cpu}{features}, {self.system}\n{', '.join(f'{n} {v}' for n, v in self.versions.items())}"


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
