"""Several processes that share the weights of one graph."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from avex_serve import open_bundle
from avex_serve.bundles.manifest import DATA_SUFFIX, ONNX
from avex_serve.bundles.reading import read_bundle
from avex_serve.bundles.sealing import seal_bundle
from avex_serve.errors import BundleError
from tests.bundles import WINDOW, make_slow_bundle

CLIP = np.random.default_rng(0).normal(0, 0.1, (1, WINDOW)).astype(np.float32)
WEIGHTS = 4 * WINDOW**2  # bytes
OPEN = """
import re, sys
from pathlib import Path
from avex_serve import open_bundle

def private():
    return int(re.search(r"^Anonymous:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) * 1024

before = private()
with open_bundle(sys.argv[1], "cpu", share=Path(sys.argv[2]) if len(sys.argv) > 2 else None):
    print(private() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bundle whose weights are in a file of their own."""
    bundle = make_slow_bundle(tmp_path_factory.mktemp("large") / "bundle")
    read = read_bundle(bundle)
    graph = onnx.load(str(bundle / ONNX))
    onnx.save(
        graph, str(bundle / ONNX), save_as_external_data=True, location=ONNX + DATA_SUFFIX, size_threshold=1024
    )
    seal_bundle(bundle, read.labels, read.manifest)
    return bundle


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "weights"


def graphs(folder):
    return sorted(path.parent.name for path in folder.glob(f"*/{ONNX}"))


def answer(bundle, **options):
    with open_bundle(bundle, "cpu", **options) as engine:
        return engine.infer(CLIP)


def test_the_answers_are_the_same_to_the_last_bit(large, folder):
    expected = answer(large)
    for _ in range(2):  # written, and found
        found = answer(large, share=folder)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert len(graphs(folder)) == 1


def test_weights_are_in_memory_once(large, folder):
    """A process has no copy of its own of what another one has written."""

    def private(*arguments):
        command = [sys.executable, "-c", OPEN, str(large), *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    private(str(folder))
    alone, sharing = private(), private(str(folder))
    assert alone - sharing > 0.8 * WEIGHTS


def test_other_weights_than_those_that_were_written_are_not_replaced_by_them(large, folder):
    """As on another processor, whose kernels take the weights in another order."""
    expected = answer(large, share=folder)
    (key,) = graphs(folder)
    written = onnx.load(str(folder / key / ONNX), load_external_data=False).graph.initializer
    (place,) = (
        {each.key: each.value for each in tensor.external_data} for tensor in written if tensor.name == "many"
    )
    assert "prepacked_0" in place
    with (folder / key / (ONNX + DATA_SUFFIX)).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(bytes(64))
    assert not np.array_equal(answer(large, share=folder)["logits"], expected["logits"])


def test_what_no_process_uses_is_removed(large, folder, tmp_path):
    other = shutil.copytree(large, tmp_path / "other")
    graph = onnx.load(str(other / ONNX), load_external_data=False)
    graph.doc_string = "another graph"
    (other / ONNX).write_bytes(graph.SerializeToString())
    read = read_bundle(large)
    seal_bundle(other, read.labels, read.manifest)
    (folder / ".unfinished.1" / "new").mkdir(parents=True)
    with open_bundle(large, "cpu", share=folder) as used:
        (first,) = graphs(folder)
        answer(other, share=folder)
        assert len(graphs(folder)) == 2
        np.testing.assert_array_equal(used.infer(CLIP)["logits"], answer(large)["logits"])
        del used
    shutil.rmtree(folder / first)
    answer(large, share=folder)
    assert graphs(folder) == [first]
    assert not (folder / ".unfinished.1").exists()


def test_a_folder_that_cannot_be_written(large, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    expected = answer(large)
    found = answer(large, share=tmp_path / "file" / "weights")
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    (message,) = caplog.messages
    assert re.match("each worker has its own copy of the weights, since they can't be shared in .*file", message)


def test_a_damaged_bundle_is_not_written(large, folder, tmp_path):
    damaged = shutil.copytree(large, tmp_path / "damaged")
    content = bytearray((damaged / (ONNX + DATA_SUFFIX)).read_bytes())
    content[-1] ^= 1
    (damaged / (ONNX + DATA_SUFFIX)).write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        answer(damaged, share=folder)
    assert graphs(folder) == []


def test_small_graphs_are_not_shared(audio_bundle, folder):
    answer(audio_bundle, share=folder)
    assert not Path(folder).exists()
