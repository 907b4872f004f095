"""The recordings that trained a head, by the SHA-256 of their files, as results and embeddings are stored.

A saved probe and a bundle carry them as text with a digest on each line, in which `sha256sum` finds a recording.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from avex_serve.bundles.manifest import ProbeInfo
from avex_serve.bundles.reading import Bundle
from avex_serve.errors import BundleError

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def write_trained_on(digests: Iterable[str], path: Path) -> None:
    """Write digests to a file."""
    path.write_text("".join(f"{digest}\n" for digest in sorted(set(digests))), "utf-8")


def read_trained_on(path: Path) -> frozenset[str] | None:
    """The digests in a file, or None if there is no such file; BundleError for a file that holds something else."""
    try:
        lines = path.read_text("utf-8").split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} can't be read: {error}; fit the probe again") from None
    if not all(_DIGEST.fullmatch(line) for line in lines):
        raise BundleError(f"{path} holds something else than SHA-256 digests, one on each line; fit the probe again")
    return frozenset(lines)


def trained_on(bundle: Bundle, probe: ProbeInfo) -> frozenset[str] | None:
    """The digests of the recordings that trained a head of a bundle; None: not known."""
    return None if probe.trained_on is None else read_trained_on(bundle.directory / probe.trained_on)


def describe_seen(seen: int, recordings: int) -> str:
    """That some recordings trained the head, and why it matters."""
    return f"{seen} of {recordings} recordings trained this head, which is better on these than on new ones"
