"""Bundles of which one file is damaged. Its digest is right: whoever damaged it could write that too.

An input is the name of the file, a line break, and its content.
"""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

from avex_serve.bundles.manifest import LABELS, MANIFEST, ONNX
from avex_serve.bundles.reading import check_files, read_manifest
from avex_serve.errors import BundleError
from tests.bundles import make_audio_bundle, replace_file
from tests.fuzz import mutations

NAME = "hostile"
LABEL_FILES = (
    b'{"a": 0, "a": 1}', b'{"\\ud800": 0}', b"[" * 100_000, b'{"a": 1e400, "b": 0}', b'{"\xff": 0}', b"{}", b"",
    b'{"a": 0, "b": 1, "c": ' + b"9" * 5000 + b"}", b'{"a\\u0000": 0, "b": 1, "c": 2}', b"\xef\xbb\xbf{}",
    b'{"": 0, " ": 1, "\\n": 2}', b'{"' + b"a" * 10**6 + b'": 0, "b": 1, "c": 2}',
)  # fmt: skip


def damaged(random):
    """An input."""
    honest = _honest()
    name = random.choice((MANIFEST, MANIFEST, MANIFEST, LABELS, ONNX))
    if name == ONNX:
        content = mutations.spoilt(random, honest[ONNX])
    elif name == LABELS and random.random() < 0.3:
        content = random.choice(LABEL_FILES)
    else:
        content = mutations.spoilt_json(random, json.loads(honest[name]))
    return name.encode() + b"\n" + content


def write(folder, data):
    """Make the bundle of an input in a folder, which may hold the one before."""
    name, _, content = data.partition(b"\n")
    folder.mkdir(exist_ok=True)
    for path, honest in _honest().items():
        (folder / path).write_bytes(honest)
    if name.decode() == MANIFEST:
        (folder / MANIFEST).write_bytes(content)
    else:
        replace_file(folder, name.decode(), content)


def read(folder):
    """Read the bundle as the service does before it loads the graph; BundleError is the only refusal."""
    with contextlib.suppress(BundleError):
        check_files(read_manifest(folder))


@functools.cache
def _honest():
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_audio_bundle(Path(folder) / NAME, NAME)
        return {path.name: path.read_bytes() for path in bundle.iterdir()}
