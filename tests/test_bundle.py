"""A bundle is whole or refused, and reading gives back what was written."""

import copy
import hashlib
import json
import os
import shutil

import msgspec
import onnx
import pytest

from avex_serve.bundles.manifest import LABELS, MANIFEST, ONNX, ONNX_INT8, TORCHSCRIPT, Manifest
from avex_serve.bundles.reading import parse_labels, read_bundle, read_manifest, sha256_of
from avex_serve.bundles.sealing import dump_labels, seal_bundle
from avex_serve.bundles.trained import read_trained_on, trained_on, write_trained_on
from avex_serve.errors import BundleError
from avex_serve.writing import atomic_directory
from tests.bundles import DIM, PROBE, WINDOW, calibrated_copy, calibration, copy_bundle, replace_file
from tests.bundles import LABELS as NAMES

FIELDS = {
    "name": "full",
    "version": "2.1",
    "kind": "audio",
    "model": "beats",
    "probes": [
        {
            "name": "mlp",
            "config": {"hidden_dims": [8], "aggregation": None, "x": {"y": None}},
            "trained": True,
            "activation": "none",
            "labels": LABELS,
            "classes": 3,
            "logits": "logits",
            "embedding": "embedding",
            "reads": "0123456789abcdef" * 4,
        }
    ],
    "embeddings": [{"output": "embedding", "layers": ["a", "b"], "fingerprint": "fedcba9876543210" * 4}],
    "audio": {"sample_rate": 32000, "window_samples": 160},
    "inputs": [{"name": "waveform", "shape": (-1, 160)}],
    "outputs": [{"name": "logits", "shape": (-1, 3)}, {"name": "embedding", "shape": (-1, 768)}],
    "half": True,
    "licence": "CC-BY-4.0",
    "checkpoint": "hf://owner/repository/model.safetensors@0123",
    "tools": {"torch": "2.8"},
}
FULL = msgspec.convert({**FIELDS, "files": {}}, Manifest)
INT8 = {
    "kind": "int8",
    "weight_bits": 7,
    "products": 3,
    "calibration": "sounds",
    "agreement": {
        "clips": 9,
        "cosine": 1.0,
        "centred_cosine": 0.99,
        "lowest_centred_cosine": 0.9,
        "decisions": 1.0,
        "decided": 90,
    },
}
EMBEDDING = {"output": "embedding", "layers": ["last"]}
HEAD = PROBE | {"activation": "none", "embedding": "embedding"}
WAVEFORM = {"name": "waveform", "shape": [-1, WINDOW]}
UNICODE = ("Zaunkönig", "夜鶯", 'a "quoted"\n\\ 🐦')


@pytest.fixture
def bundle(tmp_path, audio_bundle):
    """A bundle of this test alone."""
    return copy_bundle(audio_bundle, tmp_path / "bundle")


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def refuses(folder, *expected):
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    message = str(caught.value)
    assert str(folder) in message
    for part in expected:
        assert part in message
    assert caught.value.exit_code == 3


def test_reads_what_was_written(tmp_path):
    with atomic_directory(tmp_path / "full", marker=MANIFEST) as folder:
        (folder / ONNX).write_bytes(b"graph")
        (folder / ONNX_INT8).write_bytes(b"small graph")
        (folder / "README.md").write_text("card")
        quantisation = {"file": ONNX_INT8, **INT8}
        manifest = msgspec.convert({**FIELDS, "files": {}, "quantisation": quantisation}, Manifest)
        sealed = seal_bundle(folder, {"mlp": UNICODE}, manifest)
    bundle = read_bundle(str(tmp_path / "full"))
    assert bundle.manifest == sealed.manifest
    assert bundle.labels == {"mlp": UNICODE}
    assert bundle.digest == hashlib.sha256((tmp_path / "full" / MANIFEST).read_bytes()).hexdigest()
    assert bundle.manifest.files == {
        name: hashlib.sha256((tmp_path / "full" / name).read_bytes()).hexdigest()
        for name in (ONNX, ONNX_INT8, LABELS, "README.md")
    }
    assert bundle.manifest.quantisation is not None
    assert msgspec.to_builtins(bundle.manifest.quantisation) == quantisation
    written = msgspec.to_builtins(bundle.manifest)
    for name in ("schema_version", "files", "quantisation"):
        del written[name]
    for each in (written, *written["probes"]):
        for name in ("calibrates", "calibration", "evaluation", "trained_on"):
            assert each.pop(name, None) is None
    expected = json.loads(
        json.dumps(FIELDS | {"audio": FIELDS["audio"] | {"resampler": "soxr_hq", "shortest_samples": None}})
    )
    for spec in expected["inputs"] + expected["outputs"]:
        spec["dtype"] = "float32"
    assert json.loads(json.dumps(written)) == expected
    assert bundle.path(ONNX) == tmp_path / "full" / ONNX
    assert bundle.path(TORCHSCRIPT) is None


def test_writing_what_was_read_gives_the_same_bytes(tmp_path, audio_bundle):
    read = read_bundle(audio_bundle)
    again = tmp_path / "again"
    shutil.copytree(audio_bundle, again, ignore=shutil.ignore_patterns(MANIFEST, LABELS))
    seal_bundle(again, read.labels, read.manifest)
    for name in (MANIFEST, LABELS):
        assert (again / name).read_bytes() == (audio_bundle / name).read_bytes()
    assert read_bundle(again).digest == read.digest


@pytest.mark.parametrize("trained", [True, False])
def test_says_whether_its_head_is_trained(tmp_path, audio_bundle, trained):
    heads = [HEAD | {"name": name, "trained": name == "a" or trained} for name in ("a", "b")]
    assert read_bundle(copy_bundle(audio_bundle, tmp_path / "b", probes=heads)).manifest.trained is trained


def test_each_head_has_its_own_labels(tmp_path, audio_bundle):
    bundle = copy_bundle(audio_bundle, tmp_path / "b", probes=[HEAD, HEAD | {"name": "b", "labels": "b.json"}])
    replace_file(bundle, "b.json", b'{"x": 2, "y": 1, "z": 0}')
    assert read_bundle(bundle).labels == {"linear": NAMES, "b": ("z", "y", "x")}
    replace_file(bundle, "b.json", b'{"x": 0}')
    refuses(bundle, "b.json", "1 labels, the model answers 3")
    replace_file(bundle, "b.json", None)
    refuses(bundle, "does not list b.json")


@pytest.mark.parametrize("name", [ONNX, LABELS])
def test_refuses_a_changed_byte(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    refuses(bundle, name, "changed")


@pytest.mark.parametrize("name", [ONNX, LABELS])
def test_refuses_a_missing_file(bundle, name):
    (bundle / name).unlink()
    refuses(bundle, f"lacks {name}")


def test_refuses_a_folder_in_place_of_a_file(bundle):
    (bundle / ONNX).unlink()
    (bundle / ONNX).mkdir()
    refuses(bundle, f"lacks {ONNX}")


def test_refuses_what_is_no_bundle(tmp_path, bundle):
    refuses(tmp_path / "nowhere", "not a folder")
    refuses(bundle / ONNX, "not a folder")
    refuses(tmp_path / ("n" * 300), "can't be read")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", f"holds no {MANIFEST}")
    (bundle / MANIFEST).unlink()
    refuses(bundle, f"holds no {MANIFEST}")
    (bundle / MANIFEST).mkdir()
    refuses(bundle, "can't be read")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe\x00", b"[1", b'{"licence": "M\xffT"}'])
def test_refuses_a_manifest_that_is_not_json(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    refuses(bundle, "is not JSON")


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"null", b"{}", b"1"])
def test_refuses_a_manifest_without_schema_version(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    refuses(bundle, "schema version None")


@pytest.mark.parametrize("version", [0, 1, 4, "2", None, [2]])
def test_refuses_an_unknown_schema_version(tmp_path, audio_bundle, version):
    # Other fields of a later version must not be what is complained about.
    folder = copy_bundle(audio_bundle, tmp_path / "b", schema_version=version, later="field")
    refuses(folder, f"schema version {version!r}", "reads 2 and 3")


def test_schema_version_2_stays_readable(tmp_path, audio_bundle):
    fields = json.loads((audio_bundle / MANIFEST).read_text("utf-8"))
    assert fields["schema_version"] == 3
    folder = copy_bundle(audio_bundle, tmp_path / "b", schema_version=2)
    written = json.loads((folder / MANIFEST).read_text("utf-8"))
    for probe in written["probes"]:
        del probe["calibration"], probe["evaluation"]
    del written["calibrates"]
    (folder / MANIFEST).write_text(json.dumps(written), "utf-8")
    bundle = read_bundle(folder)
    assert bundle.manifest.schema_version == 2
    assert bundle.scores_digest == bundle.digest


def test_recordings_that_trained_a_head_are_a_listed_file_of_digests(tmp_path, audio_bundle):
    folder = shutil.copytree(audio_bundle, tmp_path / "b")
    bundle = read_bundle(folder)
    (probe,) = bundle.manifest.probes
    assert trained_on(bundle, probe) is None, "not known"
    probes = (msgspec.structs.replace(probe, trained_on="trained_on.txt"),)
    changed = msgspec.structs.replace(bundle.manifest, probes=probes, files={})
    with pytest.raises(BundleError, match=r"trained_on\.txt is not among the files"):
        seal_bundle(folder, bundle.labels, changed)
    write_trained_on(["b" * 64, "a" * 64, "b" * 64], folder / "trained_on.txt")
    sealed = seal_bundle(folder, bundle.labels, changed)
    assert trained_on(sealed, sealed.manifest.probes[0]) == {"a" * 64, "b" * 64}
    assert (folder / "trained_on.txt").read_text() == f"{'a' * 64}\n{'b' * 64}\n"
    (folder / "trained_on.txt").write_text("dawn.wav\n")
    with pytest.raises(BundleError, match="something else than SHA-256 digests"):
        read_trained_on(folder / "trained_on.txt")


def test_a_calibration_is_kept_and_must_fit(tmp_path, audio_bundle):
    folder = calibrated_copy(audio_bundle, tmp_path / "b")
    bundle = read_bundle(folder)
    assert bundle.manifest.probes[0].calibration == calibration()
    assert bundle.scores_digest == read_bundle(audio_bundle).digest != bundle.digest
    (probe,) = json.loads((folder / MANIFEST).read_text("utf-8"))["probes"]
    labels = probe["calibration"]["labels"]
    changed = copy.deepcopy(probe)
    changed["calibration"]["labels"] = labels[:2]
    refuses(copy_bundle(folder, tmp_path / "c", probes=[changed]), "a calibration of 2 labels")
    changed["calibration"]["labels"] = [labels[1], labels[0], labels[2]]
    refuses(copy_bundle(folder, tmp_path / "d", probes=[changed]), "is of other labels")
    changed["calibration"]["labels"] = [{**labels[0], "scale": {**labels[0]["scale"], "slope": -1}}, *labels[1:]]
    refuses(copy_bundle(folder, tmp_path / "e", probes=[changed]), "slope")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"surprise": 1}, "surprise"),
        ({"audio": {"sample_rate": 16000, "window_samples": WINDOW, "surprise": 1}}, "surprise"),
        ({"name": "../up"}, "name"),
        ({"name": "line\n"}, "name"),
        ({"name": ""}, "name"),
        ({"version": "a/b"}, "version"),
        ({"kind": "video"}, "kind"),
        ({"kind": "embedding"}, "don't fit together"),
        ({"audio": None}, "don't fit together"),
        ({"probes": [HEAD | {"activation": "relu"}]}, "activation"),
        ({"probes": [HEAD | {"classes": 4}]}, "4 labels for logits of width 3"),
        ({"probes": [HEAD | {"classes": 0}]}, "classes"),
        ({"probes": [HEAD | {"reads": "abc"}]}, "reads"),
        ({"probes": [HEAD | {"logits": "others"}]}, "no output 'others'"),
        ({"probes": [HEAD | {"embedding": None}]}, "don't fit together"),
        ({"probes": [HEAD | {"embedding": "logits"}]}, "['logits'] are not among the embeddings"),
        ({"probes": [HEAD, HEAD]}, "probes of the same name: ['linear', 'linear']"),
        ({"probes": [], "embeddings": []}, "return nothing"),
        ({"embeddings": [{"output": "x", "layers": []}, EMBEDDING]}, "no output 'x'"),
        ({"activation": "sigmoid"}, "activation"),
        ({"outputs": [{"name": "embedding", "shape": [-1, DIM]}]}, "no output 'logits'"),
        ({"outputs": [{"name": "logits", "shape": []}]}, "outputs"),
        (
            {"outputs": [{"name": name, "shape": [-1, 3]} for name in ("logits", "embedding", "logits")]},
            "of the same name",
        ),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"name": "waveform", "shape": [-1, 800]}]}, "windows of 1600"),
        ({"inputs": [{"name": "waveform", "shape": [-1, WINDOW], "dtype": "int8"}]}, "dtype"),
        ({"inputs": [{"name": "waveform", "shape": [-1, -1]}]}, "not (-1, 1600), for windows of 1600"),
        ({"inputs": [WAVEFORM, WAVEFORM]}, "a second one is a bool mask"),
        ({"inputs": [{**WAVEFORM, "dtype": "bool"}]}, "a second one is a bool mask"),
        ({"inputs": [WAVEFORM, {"name": "padding_mask", "shape": [-1, 800], "dtype": "bool"}]}, "their shape"),
        ({"inputs": [WAVEFORM, *[{**WAVEFORM, "dtype": "bool"}] * 2]}, "inputs"),
        ({"audio": {"sample_rate": 16000, "window_samples": WINDOW, "shortest_samples": 9}}, "not (-1, -1)"),
        (
            {
                "audio": {"sample_rate": 16000, "window_samples": WINDOW, "shortest_samples": WINDOW + 1},
                "inputs": [{"name": "waveform", "shape": [-1, -1]}],
            },
            "shorter than the shortest clip",
        ),
        ({"audio": {"sample_rate": 0, "window_samples": WINDOW}}, "sample_rate"),
        ({"audio": {"sample_rate": 16000, "window_samples": WINDOW, "resampler": "linear"}}, "resampler"),
        ({"files": {}}, "does not list labels.json"),
        ({"files": {LABELS: "abc"}}, "files"),
    ],
    ids=str,
)
def test_refuses_a_bad_manifest(tmp_path, audio_bundle, changes, expected):
    refuses(copy_bundle(audio_bundle, tmp_path / "b", **changes), MANIFEST, expected)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/b", "..", ".", ".hidden", "", "a\\b", "x\n", "x\0"]
)
def test_refuses_files_that_lie_elsewhere(tmp_path, audio_bundle, name):
    (tmp_path / "outside").write_bytes(b"secret")
    files = manifest_of(audio_bundle)["files"] | {name: hashlib.sha256(b"secret").hexdigest()}
    refuses(copy_bundle(audio_bundle, tmp_path / "b", files=files), "not a valid manifest")


def test_links_count_by_what_they_point_to(tmp_path, bundle):
    # The cache of a model hub consists of links; the digest says whether the content is right.
    shutil.move(bundle / ONNX, tmp_path / "blob")
    (bundle / ONNX).symlink_to(tmp_path / "blob")
    assert read_bundle(bundle).path(ONNX) == bundle / ONNX
    (tmp_path / "blob").write_bytes(b"another")
    refuses(bundle, ONNX, "changed")
    (tmp_path / "blob").unlink()
    refuses(bundle, f"lacks {ONNX}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 0, "b": 1}', "2 labels, the model answers 3"),
        ('{"a": 0, "b": 1, "c": 2, "d": 3}', "4 labels, the model answers 3"),
        ('{"a": 0, "b": 1, "c": 3}', "indices must be 0 to 2"),
        ('{"a": 1, "b": 2, "c": 3}', "indices must be 0 to 2"),
        ('{"a": 0, "b": 1, "c": 1}', "indices must be 0 to 2"),
        ('{"a": -1, "b": 0, "c": 1}', "indices must be 0 to 2"),
        ('{"a": 0, "b": 1, "c": 2.0}', "{label: index}"),
        ('{"a": 0, "b": 1, "c": "2"}', "{label: index}"),
        ('{"a": false, "b": true, "c": 2}', "{label: index}"),
        ('{"a": 0, "b": 1, "c": null}', "{label: index}"),
        ('["a", "b", "c"]', "{label: index}"),
        ("{}", "indices"),
        ("", "not JSON"),
        ('{"a": 2, "a": 0, "b": 1, "c": 2}', "more than once"),
        ('{"ä": 0, "b": 1, "c": 2}'.encode("latin-1"), "not JSON"),
        ('{"\\ud800": 0, "b": 1, "c": 2}', "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
    ],
)
def test_refuses_bad_labels(bundle, text, expected):
    replace_file(bundle, LABELS, text if isinstance(text, bytes) else text.encode())
    refuses(bundle, LABELS, expected)


def test_refuses_weights_that_the_manifest_does_not_list(bundle):
    """A graph may read them from any file beside it, whose digest nobody would check."""
    graph = onnx.load(bundle / "model.onnx")
    onnx.save(graph, bundle / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    replace_file(bundle, "model.onnx", (bundle / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"model.onnx reads 'weights.bin', which the manifest doesn't list"):
        read_bundle(bundle)


def test_a_graph_that_ends_where_the_name_of_such_a_file_begins(bundle):
    replace_file(bundle, "model.onnx", (bundle / "model.onnx").read_bytes() + b"\x0a\x08location\x12")
    with pytest.raises(BundleError, match="reads '', which the manifest doesn't list"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", [MANIFEST, LABELS])
def test_a_file_that_would_fill_the_memory_is_not_read(bundle, name):
    with (bundle / name).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match=f"{name} has {2**40} bytes; expected at most"):
        read_manifest(bundle)


def test_a_path_that_is_not_utf8(tmp_path, bundle):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copytree(bundle, folder)
    with pytest.raises(BundleError, match="the path is not UTF-8; rename the folder"):
        read_bundle(folder)


def test_labels_are_in_the_order_of_their_indices(bundle):
    replace_file(bundle, LABELS, b'{"third": 2, "first": 0, "second": 1}')
    assert read_bundle(bundle).labels == {"linear": ("first", "second", "third")}


def test_dumped_labels_are_the_flat_map_that_avex_reads():
    text = dump_labels(UNICODE)
    assert json.loads(text) == {label: index for index, label in enumerate(UNICODE)}
    assert "Zaunkönig" in text
    assert parse_labels(text, source="labels.json") == UNICODE


def test_writing_refuses_labels_twice(tmp_path):
    with pytest.raises(BundleError, match=r"more than once: \['b'\]"):
        seal_bundle(tmp_path, {"mlp": ("a", "b", "b")}, FULL)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("changes", [{"name": "a/b"}, {"half": 1}, {"tools": {"a": 1j}}], ids=str)
def test_writing_refuses_fields_of_another_type_before_it_writes_anything(tmp_path, changes):
    manifest = msgspec.structs.replace(FULL, **changes)
    with pytest.raises(BundleError, match="make no manifest"):
        seal_bundle(tmp_path, {"mlp": NAMES}, manifest)
    assert list(tmp_path.iterdir()) == []


def test_fields_that_do_not_fit_together_make_no_manifest():
    with pytest.raises(BundleError, match="don't fit together"):
        msgspec.structs.replace(FULL, kind="embedding")


def test_writing_refuses_a_file_that_no_manifest_can_list(tmp_path):
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(BundleError, match="hidden"):
        seal_bundle(tmp_path, {"mlp": NAMES}, FULL)


def test_sha256_of_a_file(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def fill(target, content="new"):
    with atomic_directory(target, marker="mark") as folder:
        assert folder.parent.parent == target.parent.resolve(), "renaming is atomic on one file system alone"
        (folder / "mark").write_text(content)
        (folder / "sub").mkdir()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_directory_makes_the_folder_and_its_parents(tmp_path):
    target = tmp_path / "a" / "b" / "target"
    fill(target)
    assert names_in(target) == ["mark", "sub"]
    assert names_in(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == target.parent.stat().st_mode & 0o777, "others may read it as any folder"


def test_atomic_directory_shows_nothing_before_the_end(tmp_path):
    with atomic_directory(tmp_path / "target", marker="mark") as folder:
        (folder / "mark").touch()
        assert not (tmp_path / "target").exists()
    assert (tmp_path / "target" / "mark").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_directory_leaves_nothing_after_an_exception(tmp_path, error):
    def fail():
        with atomic_directory(tmp_path / "target", marker="mark") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == []
    fill(tmp_path / "target", "old")
    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == ["target"]
    assert (tmp_path / "target" / "mark").read_text() == "old"


def test_atomic_directory_removes_the_parents_that_it_made_in_vain(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "in" / "use" / "by" / "target", marker="mark"):
            (tmp_path / "in" / "neighbour").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names_in(tmp_path / "in") == ["neighbour"]
    with pytest.raises(FileExistsError, match="neighbour is a file, not a folder"):
        fill(tmp_path / "in" / "neighbour" / "deeper" / "target")


def test_atomic_directory_replaces_its_like_and_empty_folders(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    fill(target, "first")
    (target / "stale").touch()
    fill(target, "second")
    assert names_in(target) == ["mark", "sub"]
    assert (target / "mark").read_text() == "second"
    assert names_in(tmp_path) == ["target"]


def test_atomic_directory_touches_nothing_else(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and holds no mark"):
            fill(tmp_path / name)
    assert names_in(tmp_path) == ["file", "folder"]
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "text"


def test_atomic_directory_takes_a_relative_path_and_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in ("deep/er", "."):
        with atomic_directory(type(tmp_path)(target), marker="mark") as folder:
            (folder / "mark").touch()
        shutil.rmtree(tmp_path / "here" / "deep", ignore_errors=True)
    assert names_in(tmp_path / "here") == ["mark"]
    assert names_in(tmp_path) == ["here"]


def test_atomic_directory_follows_a_link(tmp_path):
    fill(tmp_path / "version-1", "old")
    (tmp_path / "current").symlink_to("version-1")
    fill(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "version-1" / "mark").read_text() == "new"
