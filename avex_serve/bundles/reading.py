"""Reading a bundle, whose content `avex_serve.bundles.manifest` describes.

An incomplete bundle is refused: every listed file must exist, the labels must match the width of the logits, and
the schema version must be known. Digests take as long as loading a graph, so `check_files` is a separate step.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from avex_serve.bundles.labels import parse_labels
from avex_serve.bundles.manifest import MANIFEST, SCHEMA_VERSION, Manifest, ProbeInfo
from avex_serve.errors import BundleError


class Bundle(NamedTuple):
    """A bundle on disk."""

    directory: Path
    manifest: Manifest
    labels: Mapping[str, tuple[str, ...]]  # of each probe by name, in the order of its logits
    digest: str  # sha256 of the manifest, which holds the digests of all files

    def path(self, name: str) -> Path | None:
        """Path of a file of the bundle, or None if the bundle has no such file."""
        return self.directory / name if name in self.manifest.files else None


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Read a bundle and check that it is complete, including the digest of every file.

    Raises:
        BundleError: no bundle there, unknown schema version, a file missing or changed, labels that don't fit.
    """
    bundle = read_manifest(directory)
    check_files(bundle)
    return bundle


def read_manifest(directory: str | os.PathLike[str]) -> Bundle:
    """Read a bundle without computing the digests of its files, except those of its labels; see `read_bundle`."""
    try:
        return _read(Path(directory))
    except OSError as error:
        raise BundleError(f"{directory} can't be read as a bundle: {error}") from None


def check_files(bundle: Bundle, but: Collection[str] = ()) -> None:
    """Raise BundleError if the digest of a file, except those named in `but`, isn't the one in the manifest."""
    try:
        for name, expected in bundle.manifest.files.items():
            if name not in but:
                _check_file(bundle.directory / name, expected)
    except OSError as error:
        raise BundleError(f"{bundle.directory} can't be read as a bundle: {error}") from None


def _check_file(path: Path, expected: str) -> None:
    if sha256_of(path) != expected:
        raise BundleError(f"{path} was changed after the export (its sha256 differs); copy the bundle again")


def _read(root: Path) -> Bundle:
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder; expected a bundle made by avex-export")
    try:
        text = (root / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{root} holds no {MANIFEST}; make a bundle with avex-export") from None
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BundleError(f"{root / MANIFEST} is not JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{root / MANIFEST} has schema version {version!r}, this avex-serve reads {SCHEMA_VERSION}; "
            "export again, or install the avex-serve that made it"
        )
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{root / MANIFEST} is not a valid manifest: {error}") from None
    for name in manifest.files:
        if not (root / name).is_file():
            raise BundleError(f"{root} lacks {name}, which its manifest lists; copy the bundle again")
    labels = {probe.name: _probe_labels(root, manifest, probe) for probe in manifest.probes}
    return Bundle(directory=root, manifest=manifest, labels=labels, digest=hashlib.sha256(text).hexdigest())


def _probe_labels(root: Path, manifest: Manifest, probe: ProbeInfo) -> tuple[str, ...]:
    path = root / probe.labels
    if probe.labels not in manifest.files:
        raise BundleError(f"{root / MANIFEST} does not list {probe.labels}; export again")
    _check_file(path, manifest.files[probe.labels])
    labels = parse_labels(path.read_bytes(), source=str(path))
    if len(labels) != probe.classes:
        raise BundleError(f"{path} has {len(labels)} labels, the model answers {probe.classes}")
    return labels


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
