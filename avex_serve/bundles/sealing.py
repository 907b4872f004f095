"""Writing bundles."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from avex_serve.bundles.manifest import CARD, FILE_NAME_PATTERN, MANIFEST, SCHEMA_VERSION, Manifest
from avex_serve.bundles.reading import Bundle, read_manifest, repeated, sha256_of
from avex_serve.calibration.scales import Calibration
from avex_serve.errors import BundleError
from avex_serve.writing import atomic_directory


def seal_bundle(folder: Path, labels: Mapping[str, tuple[str, ...]], manifest: Manifest) -> Bundle:
    """Finish the bundle in `folder`: write the labels, and the manifest with the digest of every file.

    Args:
        folder: holds the graphs, the evidence and the card.
        labels: of each probe by name, in the order of the logits.
        manifest: everything but ``files``, which are filled in here.

    Raises:
        BundleError: a field of the wrong type, labels that don't fit, or a file that no manifest can list.
    """
    try:  # the constructor of a Struct doesn't check types, reading does
        msgspec.convert(msgspec.to_builtins(manifest), Manifest)
    except (TypeError, msgspec.ValidationError) as error:
        raise BundleError(f"these fields make no manifest: {error}") from None
    for probe in manifest.probes:
        (folder / probe.labels).write_text(dump_labels(labels[probe.name]), "utf-8")
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    if strange := [name for name in files if not re.match(FILE_NAME_PATTERN, name)]:
        raise BundleError(f"a bundle can't hold {', '.join(strange)}; expected names that match {FILE_NAME_PATTERN}")
    sealed = msgspec.structs.replace(manifest, files=files)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n")
    return read_manifest(folder)  # a bundle that can't be read is not sealed


def recalibrate(bundle: Bundle, target: Path, version: str, calibrations: Mapping[str, Calibration]) -> Bundle:
    """Write a bundle again with other calibrations: a new version with the same graphs, and so the same scores.

    Args:
        bundle: complete; it stays as it is.
        target: the new folder; a bundle that is there is replaced.
        version: the new one.
        calibrations: by name of the probe.

    Raises:
        BundleError: a version or a calibration that doesn't fit.
        FileExistsError: the target is something else.
    """
    manifest = bundle.manifest
    changed = msgspec.structs.replace(
        manifest,
        schema_version=SCHEMA_VERSION,
        version=version,
        calibrates=bundle.scores_digest,
        probes=tuple(
            msgspec.structs.replace(probe, calibration=calibrations.get(probe.name, probe.calibration))
            for probe in manifest.probes
        ),
    )
    with atomic_directory(target, marker=MANIFEST) as folder:
        for name in manifest.files:
            shutil.copyfile(bundle.directory / name, folder / name)
        if (card := folder / CARD).is_file():
            described = [f"`{name}`: {calibration.describe()}" for name, calibration in calibrations.items()]
            text = f"\n## Calibration of version {version}\n\n" + "\n".join(described) + "\n"
            card.write_text(card.read_text("utf-8") + text, "utf-8")
        sealed = seal_bundle(folder, bundle.labels, changed)
    return sealed._replace(directory=target)


def dump_labels(labels: tuple[str, ...]) -> str:
    """The text of ``labels.json``; BundleError for a label given twice."""
    if twice := repeated(labels):
        raise BundleError(f"labels must differ from one another; more than once: {twice}")
    return json.dumps({label: index for index, label in enumerate(labels)}, indent=1, ensure_ascii=False) + "\n"
