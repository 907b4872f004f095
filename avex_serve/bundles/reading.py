"""Reading a bundle, whose content `avex_serve.bundles.manifest` describes, and its labels.

An incomplete bundle is refused: every listed file must exist, the labels must match the width of the logits, and
the schema version must be known. Digests take as long as loading a graph, so `check_files` is a separate step.
"""

import hashlib
import json
import logging
import mmap
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from avex_serve.bundles.manifest import MANIFEST, PROBE, READABLE, Manifest, ProbeInfo
from avex_serve.errors import BundleError, quoted

logger = logging.getLogger(__name__)

# The bytes that precede the path of an external file of weights in an ONNX graph, and the path's length: protobuf's
# encoding of StringStringEntryProto(key="location", value=…).
EXTERNAL_DATA: Final = b"\x0a\x08location\x12"

MAX_JSON: Final = 2**26  # bytes of the manifest, and of labels: more of it would fill the memory, not be a bundle


class Bundle(NamedTuple):
    """A bundle on disk."""

    directory: Path
    manifest: Manifest
    labels: Mapping[str, tuple[str, ...]]  # of each probe by name, in the order of its logits
    digest: str  # sha256 of the manifest, which holds the digests of all files

    @property
    def scores_digest(self) -> str:
        """The same for bundles that make the same scores and differ in their calibration."""
        return self.manifest.calibrates or self.digest

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
            if name.endswith(".onnx"):
                _check_external_data(bundle, name)
    except OSError as error:
        raise BundleError(f"{bundle.directory} can't be read as a bundle: {error}") from None


def _check_file(path: Path, expected: str) -> None:
    if sha256_of(path) != expected:
        raise BundleError(f"{path} was changed after the export (its sha256 differs); copy the bundle again")


def _check_external_data(bundle: Bundle, name: str) -> None:
    """Raise BundleError if an ONNX graph has weights in a file whose digest the manifest doesn't hold."""
    if not (bundle.directory / name).stat().st_size:
        return  # it can't be mapped, nor loaded
    with (bundle.directory / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
        start = 0
        while (start := graph.find(EXTERNAL_DATA, start) + len(EXTERNAL_DATA)) >= len(EXTERNAL_DATA):
            length = int.from_bytes(graph[start : start + 1])
            place = graph[start + 1 : start + 1 + length].decode("utf-8", "replace")
            if place not in bundle.manifest.files:
                raise BundleError(
                    f"{bundle.directory / name} reads {place!r}, which the manifest doesn't list; export again"
                )


def _read(root: Path) -> Bundle:
    try:
        str(root).encode()
    except UnicodeEncodeError:
        raise BundleError(f"{str(root)!a}: the path is not UTF-8; rename the folder") from None
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder; expected a bundle made by avex-export")
    try:
        text = _json(root / MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{root} {no_manifest(root)}") from None
    manifest = decode_manifest(text, source=str(root / MANIFEST))
    for name in manifest.files:
        if not (root / name).is_file():
            raise BundleError(f"{root} lacks {name}, which its manifest lists; copy the bundle again")
    labels = {probe.name: _probe_labels(root, manifest, probe) for probe in manifest.probes}
    return Bundle(directory=root, manifest=manifest, labels=labels, digest=hashlib.sha256(text).hexdigest())


def no_manifest(folder: Path) -> str:
    """What is wrong with a folder without a manifest, for messages: some give the probe in place of its bundle."""
    remedy = "make a bundle with avex-export"
    if (folder / PROBE).is_file():
        remedy = f"it is a saved probe: make a bundle of it with avex-export --probe {quoted(folder)}"
    return f"holds no {MANIFEST}; {remedy}"


def decode_manifest(text: bytes, *, source: str) -> Manifest:
    """The manifest in the content of ``manifest.json``.

    Raises:
        BundleError: not JSON, an unknown schema version, or fields that don't fit; `source` says where it is from.
    """
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in READABLE:
        raise BundleError(
            f"{source} has schema version {version!r}, this avex-serve reads "
            f"{' and '.join(map(str, READABLE))}; "
            "export again, or install the avex-serve that made it"
        )
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{source} is not a valid manifest: {error}") from None


def _probe_labels(root: Path, manifest: Manifest, probe: ProbeInfo) -> tuple[str, ...]:
    path = root / probe.labels
    if probe.labels not in manifest.files:
        raise BundleError(f"{root / MANIFEST} does not list {probe.labels}; export again")
    text = _json(path)
    _check_file(path, manifest.files[probe.labels])
    labels = parse_labels(text, source=str(path))
    if len(labels) != probe.classes:
        raise BundleError(f"{path} has {len(labels)} labels, the model answers {probe.classes}")
    if probe.calibration is not None and tuple(each.label for each in probe.calibration.labels) != labels:
        raise BundleError(f"{root / MANIFEST}: the calibration of {probe.name} is of other labels; export again")
    return labels


def _json(path: Path) -> bytes:
    """A file of JSON; BundleError if it is too large for one of a bundle."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise BundleError(f"{path} has {size} bytes; expected at most {MAX_JSON}: export again")
    return path.read_bytes()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_labels(text: str | bytes, *, source: str) -> tuple[str, ...]:
    """Labels in the order of their indices, from avex's ``{label: index}`` JSON.

    Raises:
        BundleError: not such an object, a label given twice, or indices that are not 0 … n-1, each once.
    """
    try:
        mapping = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON of labels: {error}") from None
    if not isinstance(mapping, dict) or not all(type(index) is int for index in mapping.values()):
        raise BundleError(f"{source} must be one JSON object {{label: index}}")
    if sorted(mapping.values()) != list(range(len(mapping))) or not mapping:
        raise BundleError(f"{source}: indices must be 0 to {len(mapping) - 1}, each once")
    return tuple(sorted(mapping, key=mapping.__getitem__))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):  # json silently keeps the last one
        raise ValueError("a label is given more than once")
    "".join(mapping).encode()  # UnicodeEncodeError for half a surrogate pair, which no answer could repeat
    return mapping


def check_labels(labels: Sequence[str], source: str) -> None:
    """Log a warning for labels that differ only by case or spaces.

    Raises:
        ValueError: an empty label, or one that is there twice.
    """
    if not all(label.strip() for label in labels):
        raise ValueError(f"{source} has an empty label; give each class a name")
    if twice := repeated(labels):
        raise ValueError(f"{source} has labels more than once: {', '.join(map(repr, twice))}")
    alike: dict[str, str] = {}
    for label in labels:
        first = alike.setdefault("".join(label.split()).casefold(), label)
        if first != label:
            logger.warning("%s has %r and %r, which differ only by case or spaces", source, first, label)


def repeated(labels: Sequence[str]) -> list[str]:
    """The first five labels that occur more than once."""
    return sorted(label for label, count in Counter(labels).items() if count > 1)[:5]
