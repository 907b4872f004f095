"""Which backend serves a bundle, and what is said where none can."""

import io
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from avex_serve import open_bundle
from avex_serve.bundles.manifest import ONNX, ONNX_INT8, TORCHSCRIPT
from avex_serve.cli import main
from avex_serve.errors import BundleError, DependencyError, InputError
from avex_serve.inference import backend as backends
from avex_serve.inference.batcher import Batcher
from tests.bundles import DIM, SAMPLE_RATE, WINDOW, change_manifest, copy_bundle, replace_file, weights

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Tiny(torch.nn.Module):
    """The graph of the tiny audio bundle."""

    def __init__(self, matrices):
        super().__init__()
        for name, matrix in zip(("to_embedding", "to_logits"), matrices, strict=True):
            self.register_buffer(name, torch.from_numpy(matrix.copy()))

    def forward(self, waveform):
        embedding = waveform @ self.to_embedding
        return embedding @ self.to_logits, embedding


@pytest.fixture(scope="session")
def torchscript(audio_bundle):
    """The tiny graph as TorchScript."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Tiny(weights(audio_bundle)), torch.zeros(2, WINDOW)), file)
    return file.getvalue()


@pytest.fixture
def bundle(tmp_path, audio_bundle):
    """A bundle of this test alone, with ONNX."""
    return copy_bundle(audio_bundle, tmp_path / "bundle")


@pytest.fixture
def torchscript_bundle(bundle, torchscript):
    """With TorchScript alone."""
    return replace_file(replace_file(bundle, TORCHSCRIPT, torchscript), ONNX, None)


@pytest.fixture
def without_torch(monkeypatch):
    """As if torch were not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "avex_serve.inference.torch", raising=False)


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "CPU", ""])
def test_refuses_an_unknown_device(audio_bundle, device):
    with pytest.raises(InputError, match=f"device '{device}'; expected auto, cpu or cuda"):
        open_bundle(audio_bundle, device)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_onnx_serves_on_the_cpu(audio_bundle, device):
    with open_bundle(str(audio_bundle), device) as engine:
        assert (engine.backend.device, engine.backend.format) == ("cpu", "onnx")


@pytest.fixture
def int8_bundle(bundle):
    """With a second graph, told apart by an embedding twice as large."""
    model = onnx.load(str(bundle / ONNX))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    replace_file(bundle, ONNX_INT8, model.SerializeToString())
    figures = ("cosine", "centred_cosine", "lowest_centred_cosine", "decisions")
    agreement = {"clips": 9, **dict.fromkeys(figures, 1.0)}
    quantisation = {"kind": "int8", "file": ONNX_INT8, "weight_bits": 7, "products": 2, "calibration": "sounds"}
    return change_manifest(bundle, quantisation=quantisation | {"agreement": agreement})


@pytest.mark.parametrize(
    ("device", "precision", "factor"),
    [("cpu", "auto", 2), ("cpu", "int8", 2), ("auto", "int8", 2), ("cpu", "float32", 1)],
)
def test_int8_serves_on_the_cpu_unless_float32_is_asked_for(int8_bundle, engine, device, precision, factor):
    batch = np.random.default_rng(0).normal(size=(2, WINDOW)).astype(np.float32)
    with open_bundle(int8_bundle, device, precision=precision) as served:
        assert served.backend.format == ("onnx" if precision == "float32" else "onnx-int8")
        assert served.backend.device == "cpu"
        found, expected = served.infer(batch)["embedding"], engine.infer(batch)["embedding"]
    np.testing.assert_allclose(found, factor * expected, rtol=1e-5)


def test_precisions_that_are_not_there(audio_bundle, int8_bundle):
    with pytest.raises(InputError, match="precision 'int4'; expected auto, float32, int8"):
        open_bundle(audio_bundle, precision="int4")
    with pytest.raises(BundleError, match="holds no int8 graph; export it again with --quantize int8"):
        open_bundle(audio_bundle, precision="int8")
    with pytest.raises(InputError, match="precision int8 is for device cpu"):
        open_bundle(int8_bundle, "cuda", precision="int8")
    replace_file(int8_bundle, ONNX_INT8, None)
    with pytest.raises(BundleError, match=r"int8 graph model_int8.onnx is not among the files"):
        open_bundle(int8_bundle)


@needs_no_cuda
def test_onnx_is_preferred_on_the_cpu(bundle, torchscript):
    with open_bundle(replace_file(bundle, TORCHSCRIPT, torchscript)) as engine:
        assert engine.backend.format == "onnx"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_torchscript_serves_where_there_is_no_onnx(torchscript_bundle, engine, wave, device):
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("auto is CUDA here")
    batch = np.random.default_rng(0).normal(size=(5, WINDOW)).astype(np.float32)
    batch.flags.writeable = False  # as one that was made from received bytes
    with open_bundle(torchscript_bundle, device) as served:
        assert (served.backend.device, served.backend.format) == ("cpu", "torchscript")
        for options in ({}, {"overlap": 0.05}):
            ours, theirs = (each.score(wave, SAMPLE_RATE, **options) for each in (served, engine))
            np.testing.assert_array_equal(ours.spans, theirs.spans)
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)
        outputs, expected = served.infer(batch), engine.infer(batch)
        assert list(outputs) == list(expected)
        for name, output in outputs.items():
            assert output.dtype == np.float32
            np.testing.assert_allclose(output, expected[name], rtol=1e-4, atol=1e-5)


def test_torchscript_without_torch_says_what_to_install(torchscript_bundle, without_torch):
    with pytest.raises(DependencyError, match=re.escape("pip install 'avex-serve[cuda]'")) as caught:
        open_bundle(torchscript_bundle)
    assert caught.value.exit_code == 3


@needs_no_cuda
def test_cuda_without_a_device(bundle, torchscript):
    with pytest.raises(DependencyError, match="no CUDA device; use cpu or auto"):
        open_bundle(replace_file(bundle, TORCHSCRIPT, torchscript), "cuda")


def test_cuda_without_torch(bundle, torchscript, without_torch):
    replace_file(bundle, TORCHSCRIPT, torchscript)
    with pytest.raises(DependencyError, match=re.escape("on cuda needs torch")):
        open_bundle(bundle, "cuda")
    with open_bundle(bundle, "auto") as engine:
        assert engine.backend.format == "onnx"


@pytest.mark.parametrize(("device", "wanted"), [("cpu", "onnx"), ("auto", "onnx"), ("cuda", "torchscript")])
def test_a_bundle_without_a_graph_for_the_device(bundle, device, wanted):
    if wanted == "onnx":
        replace_file(bundle, ONNX, None)
    with pytest.raises(BundleError, match=rf"holds no graph for .*; export it again with --format {wanted}"):
        open_bundle(bundle, device)


def test_auto_takes_cuda_where_it_works(bundle, torchscript, monkeypatch):
    opened = []
    monkeypatch.setattr(backends, "_cuda_works", lambda: True)

    def open_torch(*arguments, half):
        opened.append((*arguments, half))
        return SimpleNamespace(device="cuda", format="torchscript", max_batch=16)

    monkeypatch.setattr("avex_serve.inference.torch.TorchBackend", open_torch)
    with open_bundle(bundle) as engine:
        assert engine.backend.format == "onnx", "there is nothing to run on CUDA"
        assert not isinstance(engine.backend, Batcher), "only CUDA is batched"
    with open_bundle(replace_file(bundle, TORCHSCRIPT, torchscript)) as engine:
        assert isinstance(engine.backend, Batcher)
    assert opened == [(bundle / TORCHSCRIPT, ["logits", "embedding"], "cuda", False)]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a CUDA driver")
def test_auto_asks_torch_only_where_there_is_a_driver(bundle, torchscript, monkeypatch):
    monkeypatch.setattr(backends, "_torch_installed", lambda: pytest.fail("torch was looked for"))
    open_bundle(replace_file(bundle, TORCHSCRIPT, torchscript)).close()


def test_what_is_opened_is_checked_and_the_rest_by_verify(bundle, torchscript, capsys):
    data = f"{ONNX}.data"
    graph = str(bundle / ONNX)
    onnx.save_model(onnx.load(graph), graph, save_as_external_data=True, location=data, size_threshold=0)
    for name in (ONNX, data):
        replace_file(bundle, name, (bundle / name).read_bytes())
    replace_file(bundle, TORCHSCRIPT, torchscript)
    (bundle / TORCHSCRIPT).write_bytes(b"changed")
    open_bundle(bundle, "cpu").close()
    assert main(["verify", str(bundle)]) == 3
    assert f"{TORCHSCRIPT} was changed after the export" in capsys.readouterr().err
    weights = bytearray((bundle / data).read_bytes())
    weights[5] ^= 1
    (bundle / data).write_bytes(weights)
    with pytest.raises(BundleError, match=re.escape(f"{data} was changed after the export")):
        open_bundle(bundle, "cpu")


@pytest.mark.parametrize("content", [b"", b"no protobuf", bytes(1000)])
def test_a_damaged_graph_with_the_right_digest(bundle, content):
    replace_file(bundle, ONNX, content)
    with pytest.raises(BundleError, match=r"onnxruntime can't load .*model\.onnx"):
        open_bundle(bundle, "cpu")


@pytest.mark.parametrize("content", [b"", b"no zip", bytes(1000)])
def test_a_damaged_torchscript_with_the_right_digest(torchscript_bundle, torchscript, content):
    for damaged in (content, torchscript[: len(torchscript) // 2]):
        replace_file(torchscript_bundle, TORCHSCRIPT, damaged)
        with pytest.raises(BundleError, match=r"torch can't load .*model\.torchscript\.pt"):
            open_bundle(torchscript_bundle, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [{"name": "audio", "shape": (-1, WINDOW)}]},
        {
            "outputs": [
                {"name": name, "shape": (-1, size)}
                for name, size in {"logits": 3, "embedding": DIM, "more": 1}.items()
            ]
        },
    ],
)
def test_a_graph_that_is_not_the_manifests(tmp_path, audio_bundle, changes):
    with pytest.raises(BundleError, match="its manifest says"):
        open_bundle(copy_bundle(audio_bundle, tmp_path / "other", **changes), "cpu")
