"""Reference data and recordings that lie beside the repository, or where AVEX_SHARED says."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("AVEX_SHARED") or Path(__file__).parents[2] / "shared")


def shared(name):
    """A folder of the shared data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(
            f"{path} is absent; set AVEX_SHARED to the folder with the reference data", allow_module_level=True
        )
    return path
