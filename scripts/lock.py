"""Pin what the image installs: `python scripts/lock.py` writes deploy/requirements.txt and requirements.cuda.txt.

They list the dependencies of pyproject.toml, and what these depend on, at the versions of constraints.txt. The
script reads this from the metadata of the installed packages, so run it where `make` has installed them.
"""

import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import requires
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEADER: Final = "# What the image installs. Written by scripts/lock.py from pyproject.toml and constraints.txt.\n"
IMAGE: Final = {  # where the packages are installed
    "python_version": "3.11",
    "python_full_version": "3.11.9",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


def lock() -> dict[Path, str]:
    """The files to write, and their text."""
    extras = PROJECT["optional-dependencies"]
    served = [*PROJECT["dependencies"], *extras["tracing"]]
    return {
        ROOT / "deploy" / "requirements.txt": HEADER + _pins(served),
        ROOT / "deploy" / "requirements.cuda.txt": HEADER + _pins([*served, *extras["cuda"]]),
    }


def _pins(requirements: Iterable[str]) -> str:
    """A line `name==version` for each package that is required, directly or not."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    names = required(requirements, IMAGE)
    return "".join(f"{pin}\n" for pin in sorted({pinned[name] for name in names}, key=str.lower))


def required(requirements: Iterable[str], environment: Mapping[str, str]) -> set[str]:
    """The names of the packages that are required, directly or not, where the markers have these values."""
    waiting = [Requirement(each) for each in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            further = [Requirement(each) for each in requires(name) or []]
            values = {**environment, "extra": extra}
            waiting += [each for each in further if each.marker is None or each.marker.evaluate(values)]
    return {name for name, _ in seen}


if __name__ == "__main__":
    for path, text in lock().items():
        path.write_text(text)
