"""The files of a model by path or URI, on disk, on the hub or in cloud storage: checkpoints and label maps."""

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from avex_serve.bundles.reading import parse_labels, sha256_of
from avex_serve.bundles.remote import STORES, connect
from avex_serve.errors import BundleError

logger = logging.getLogger(__name__)

LabelMapping = dict[str, dict[Any, Any]]

# hf://owner/repository/file, with @revision after the repository (as in the hub's own URIs) or at the end.
_HUB = re.compile(
    r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<inner>[^/]+))?/(?P<file>[^@]+?)(@(?P<outer>[^@]+))?", re.ASCII
)


def resolve_file(uri: str, kind: str = "Checkpoint", *, sha256: str | None = None) -> Path:
    """The local file for a path or URI, downloaded if necessary.

    Args:
        uri: a path or ``file://…``; ``s3://…`` or ``gs://…``, cached in the user's cache folder until the remote
            file changes; or ``hf://owner/repository/file[@revision]``, cached in the hub's cache
            (``HF_HUB_OFFLINE=1``: read from the cache only).
        kind: what the file is, for messages.
        sha256: hex digest that the file must have; None: any. For a file on the hub without a revision a mismatch is
            only a warning, because the file may have been replaced since the digest was published.

    Raises:
        FileNotFoundError: no such file; the message says what to do.
        ModuleNotFoundError: cloud storage without the package for it.
        ValueError: an unknown scheme, a malformed URI, or another digest.
    """
    scheme = urlparse(uri).scheme if "://" in uri else ""
    if scheme == "hf":
        path = _from_hub(uri, kind)
    elif scheme in STORES:
        path = _from_cloud(uri, scheme, kind)
    elif scheme in ("", "file"):
        if scheme and urlparse(uri).netloc not in ("", "localhost"):
            raise ValueError(f"{uri!r} names a host; expected file:///absolute/path, or a path without file://")
        path = Path(unquote(urlparse(uri).path) if scheme else uri).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{kind} not found: {path}; check the path")
    else:
        raise ValueError(f"{uri!r}: scheme {scheme}:// is not known; use a path, file://, hf://, s3:// or gs://")
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        mismatch = f"{kind} {uri} has sha256 {found}, but {sha256} is published for it"
        if scheme != "hf" or _parse_hub(uri)[2] is not None:
            raise ValueError(f"{mismatch}; download it again")
        logger.warning("%s: it is another file, or was replaced on the hub since", mismatch)
    return path


def with_revision(uri: str, path: Path) -> str | None:
    """The URI that `resolve_file` resolved to this path, with the hub's revision. None for local files (private)."""
    if not uri.startswith("hf://"):
        return uri if uri.startswith(tuple(f"{scheme}://" for scheme in STORES)) else None
    repository, file, _ = _parse_hub(uri)
    revision = path.parts[-1 - len(Path(file).parts)]  # the hub's cache: …/snapshots/REVISION/FILE
    return f"hf://{repository}/{file}@{revision}"


def find_local(uri: str) -> Path | None:
    """The file if it is on this machine, else None. Needs no network."""
    if uri.startswith("hf://"):
        from huggingface_hub import try_to_load_from_cache

        repository, file, revision = _parse_hub(uri)
        found = try_to_load_from_cache(repository, file, revision=revision)
        return Path(found) if isinstance(found, str) else None
    if "://" in uri and not uri.startswith("file://"):
        return None
    try:
        return resolve_file(uri)
    except FileNotFoundError:
        return None


def read_label_mapping(uri: str) -> LabelMapping | None:
    """The label map of a classifier from a path or URI, JSON ``{label: index}``. None, with a warning, if absent.

    Returns ``{"label_to_index": {label: index}, "index_to_label": {index: label}}``. Raises ValueError for another
    file than labels with the indices 0 to n - 1, each once.
    """
    try:
        path = resolve_file(uri, "Label map")
    except (FileNotFoundError, ModuleNotFoundError) as error:
        logger.warning("%s; label_mapping is None", error)
        return None
    try:
        labels = parse_labels(path.read_bytes(), source=uri)
    except BundleError as error:
        raise ValueError(str(error)) from None
    return {
        "label_to_index": {label: index for index, label in enumerate(labels)},
        "index_to_label": dict(enumerate(labels)),
    }


def count_labels(uri: str | None) -> int | None:
    """Number of labels in a label map, or None if that is not known without network."""
    path = None if uri is None else find_local(uri)
    mapping = None if path is None else read_label_mapping(str(path))
    return None if mapping is None else len(mapping["label_to_index"])


def _parse_hub(uri: str) -> tuple[str, str, str | None]:
    match = _HUB.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r} names no file on the hub; expected hf://owner/repository/file[@revision]")
    return match["repository"], match["file"], match["inner"] or match["outer"]


def _from_hub(uri: str, kind: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repository, file, revision = _parse_hub(uri)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{kind} not found: {uri} is neither in the hub's cache nor can it be downloaded "
            f"({type(error).__name__}). With network access run 'hf download {repository} {file}{at}', or give the "
            "path of a file (checkpoint_path; for avex-export: a model YAML with checkpoint_path)"
        ) from error


def _from_cloud(uri: str, scheme: str, kind: str) -> Path:
    try:
        system, remote = connect(uri)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{uri} needs {STORES[scheme]}, which is not installed; pip install 'avex-serve[cloud]'",
            name=STORES[scheme],
        ) from error
    try:
        version = system.ukey(remote)  # changes with the remote file
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avex_serve" / "checkpoints"
        folder = cache / hashlib.sha256(f"{uri} {version}".encode()).hexdigest()[:32]
        target = folder / Path(remote).name
        if not target.is_file():
            _download(system, remote, target)
    except OSError as error:
        raise FileNotFoundError(
            f"{kind} not found: {uri} can't be read ({type(error).__name__}: {error}); check the address, the "
            "credentials and the network"
        ) from error
    return target


def _download(system: Any, remote: str, target: Path) -> None:
    """Download to a temporary name and rename, so that no other process sees a partial file."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        system.get_file(remote, str(part))
        part.replace(target)
