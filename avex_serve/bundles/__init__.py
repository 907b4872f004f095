"""A bundle on disk: what it holds, its reading and its writing."""

import os
from pathlib import Path


def bundle_cache() -> Path:
    """The folder that bundles of URLs are copied into."""
    home = Path(os.environ.get("BENTOML_HOME") or "~/bentoml")
    return Path(os.environ.get("AVEX_BUNDLE_CACHE") or home / "avex-bundles").expanduser()
