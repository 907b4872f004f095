"""Writing a bundle: to a temporary name beside the target and renamed at the end, so it is whole or not there."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from avex_serve.bundles.manifest import FILE_NAME_PATTERN, MANIFEST, Manifest
from avex_serve.bundles.reading import read_manifest, sha256_of
from avex_serve.errors import BundleError


@contextlib.contextmanager
def atomic_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """A new folder to fill; on leaving without an error it takes the target's place, otherwise it is gone.

    An existing target is replaced only if it is empty or holds the file `marker`, so that a slip of the
    keyboard never deletes somebody's folder.

    Raises:
        FileExistsError: the target is something else.
    """
    target = target.resolve()  # "." has no name to build a temporary one from, and a link stays a link
    if target.exists() and not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and holds no {marker}: not replaced; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(Path(scratch) / "old")
        fresh.rename(target)


def seal_bundle(folder: Path, labels: Mapping[str, tuple[str, ...]], fields: Mapping[str, Any]) -> Manifest:
    """Finish the bundle in `folder`: write the labels and the manifest with the digest of every file.

    Args:
        folder: holds the graphs and the evidence.
        labels: by probe, in the order of the logits.
        fields: the fields of `Manifest` but ``files``.

    Raises:
        BundleError: fields that don't fit together.
    """
    draft = draft_manifest(fields)
    for probe in draft.probes:
        (folder / probe.labels).write_text(dump_labels(labels[probe.name]), "utf-8")
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    if strange := [name for name in files if not re.match(FILE_NAME_PATTERN, name)]:
        raise BundleError(f"a bundle can't hold {', '.join(strange)}; expected names that match {FILE_NAME_PATTERN}")
    manifest = draft_manifest({**fields, "files": files})
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return read_manifest(folder).manifest  # what can't be read is not sealed


def draft_manifest(fields: Mapping[str, Any]) -> Manifest:
    """The manifest of a bundle that is being made; BundleError for fields that don't fit together."""
    try:
        return msgspec.convert({"files": {}, **fields}, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"these fields make no manifest: {error}") from None


def dump_labels(labels: tuple[str, ...]) -> str:
    """The text of ``labels.json``; duplicates raise BundleError."""
    if len(set(labels)) != len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        raise BundleError(f"labels must differ from one another; more than once: {twice[:5]}")
    return json.dumps({label: index for index, label in enumerate(labels)}, indent=1, ensure_ascii=False) + "\n"
