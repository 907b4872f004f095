"""What a verification ran on: versions and processor, on which the last digits of an answer depend."""

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from msgspec import Struct

# Which of them a processor has decides which kernels onnxruntime and torch choose.
_X86 = ("sse4_1", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve")
_PACKAGES = ("avex-serve", "numpy", "onnx", "onnxruntime", "torch")


class Machine(Struct, frozen=True, kw_only=True):
    """A machine, by what matters to numbers; nothing that tells which one it is."""

    cpu: str
    features: tuple[str, ...]  # those that matter, as Linux calls them
    system: str  # system and architecture
    versions: dict[str, str]  # of Python and of the packages that are installed

    def lines(self) -> str:
        """As text, in two lines."""
        features = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.cpu}{features}, {self.system}\n{', '.join(f'{n} {v}' for n, v in self.versions.items())}"


def this_machine() -> Machine:
    """Where this process runs."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    told = _cpuinfo()
    has = set(told.get("flags", told.get("Features", "")).split())
    return Machine(
        cpu=told.get("model name") or _macos_cpu() or platform.processor() or "unknown processor",
        features=tuple(feature for feature in (*_X86, *_ARM) if feature in has),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; nothing on other systems."""
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
