"""``avex-serve info`` and ``avex-serve diff``: what a bundle is, and what changed between two of them."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avex_serve.bundles.reading import Bundle


def add_parser(commands: Any) -> None:
    """Add the two commands and their options."""
    parser = commands.add_parser("info", help="what a bundle takes and answers, and what it was made from")
    parser.set_defaults(run=_show)
    parser.add_argument("bundle", help="made by avex-export: a folder or a URL, such as hf://owner/name")
    parser.add_argument("--json", action="store_true", help="all of it, as one JSON document")
    parser = commands.add_parser("diff", help="what changed between two bundles; exit code 1 if anything did")
    parser.set_defaults(run=_compare)
    parser.add_argument("old", help="a bundle")
    parser.add_argument("new", help="another bundle")


def _show(arguments: argparse.Namespace) -> int:
    """Print a bundle, after all of its digests are checked."""
    from avex_serve.bundles.reading import read_bundle
    from avex_serve.bundles.remote import local_bundle

    bundle = read_bundle(local_bundle(arguments.bundle))
    if arguments.json:
        print(json.dumps(_document(bundle), ensure_ascii=False))
    else:
        print("\n".join(f"{name:12}{text}" for name, text in _lines(bundle)))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from avex_serve.bundles.reading import read_bundle
    from avex_serve.bundles.remote import local_bundle

    old, new = (
        dict(_fields("", _document(read_bundle(local_bundle(each))))) for each in (arguments.old, arguments.new)
    )
    changed = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    for name in changed:
        print(f"{name}: {_value(old, name)} → {_value(new, name)}")
    if not changed:
        print("the same bundle")
    return int(bool(changed))


def _document(bundle: "Bundle") -> dict[str, Any]:
    from msgspec import to_builtins

    manifest: dict[str, Any] = to_builtins(bundle.manifest)
    labels = {name: list(each) for name, each in bundle.labels.items()}
    return manifest | {"labels": labels, "digest": bundle.digest}


def _lines(bundle: "Bundle") -> Iterator[tuple[str, str]]:
    from avex_serve.bundles.trained import trained_on

    manifest = bundle.manifest
    yield "bundle", f"{manifest.name}, version {manifest.version}, sha256 {bundle.digest}"
    yield "backbone", manifest.model + ("" if manifest.checkpoint is None else f", {manifest.checkpoint}")
    if manifest.audio is not None:
        audio = manifest.audio
        seconds = f"windows of {audio.window_samples / audio.sample_rate:g} s"
        if audio.shortest_samples is not None:
            seconds = f"clips from {audio.shortest_samples / audio.sample_rate:g} s, by default {seconds}"
        yield (
            "takes",
            f"{'padded ' if manifest.takes_padding_mask else ''}audio at {audio.sample_rate} Hz, {seconds}",
        )
    else:
        yield "takes", f"embeddings of shape {list(manifest.inputs[0].shape)}"
    for probe in manifest.probes:
        training = "" if probe.trained else ", NOT TRAINED: random weights"
        kind = probe.config.get("probe_type", "head")
        yield "probe", f"{probe.name}: {kind}, {probe.classes} labels, {probe.activation} scores{training}"
        yield "labels", ", ".join(bundle.labels[probe.name])
        if probe.calibration is not None:
            yield "calibrated", probe.calibration.describe()
        if probe.evaluation is not None:
            found = probe.evaluation
            tried = f"{found.windows} windows of {found.recordings} recordings ({found.split})"
            yield "evaluated", f"average precision {found.average_precision:.3f}, on {tried}"
        if (digests := trained_on(bundle, probe)) is not None:
            yield "trained on", f"{len(digests)} recordings, by their SHA-256 in {probe.trained_on}"
    for each in manifest.embeddings:
        yield "embedding", f"{each.output} of {', '.join(each.layers)}"
    if manifest.quantisation is not None:
        agreement = manifest.quantisation.agreement
        decisions = "" if agreement.decisions is None else f", {agreement.decisions:.1%} of decisions equal"
        yield "int8", f"cosine to float32 {agreement.centred_cosine:.4f}{decisions}, on {agreement.clips} clips"
    yield "licence", manifest.licence
    yield "made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    for name in sorted(manifest.files):
        yield "file", f"{name}, {(bundle.directory / name).stat().st_size:,} bytes"


def _fields(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Each value in a document by its path: names, and for lists of things with names these."""
    if isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
        value = {each.get("name", each.get("output", str(index))): each for index, each in enumerate(value)}
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _fields(f"{path}.{name}" if path else name, each)
    else:
        yield path, value


def _value(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "(none)"
