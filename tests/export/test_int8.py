"""Int8: how products are rounded, what comes of a whole model, and what is refused."""

import contextlib
import io
import json
import shutil
import sys

import msgspec
import numpy as np
import onnx
import pytest
import soundfile
import torch
import yaml
from torch import nn

from avex_export import int8
from avex_export.cli import main
from avex_export.graph import OnePassGraph
from avex_export.passes import Target, rewrite
from avex_export.products import Int8Linear, compensated, nearest, quantise, steps
from avex_serve import open_bundle
from avex_serve.bundles.manifest import VERIFICATION, Manifest
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main as serve
from avex_serve.configs import ProbeConfig
from avex_serve.errors import ExportError, InputError, VerificationError
from avex_serve.evidence.first import open_checked
from avex_serve.inference.onnx import OnnxBackend
from avex_serve.models.probes import build_probe_from_config
from tests.bundles import replace_file
from tests.export.conftest import UNTRAINED
from tests.models.backbones import (
    RATE,
    effnet,
    effnet_spec,
    noise,
    tiny_beats,
    tiny_eat,
    tiny_eat_spec,
    write_model,
)
from tests.shared import shared

INT8 = ("--allow-untrained", "--format", "onnx", "--quantize", "int8")


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# Rounding


@pytest.fixture
def product():
    """A weight, and inputs with channels that go together, as a norm's output has them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    inputs = torch.randn(500, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    return weight, inputs + 0.1 * torch.randn(500, 64, generator=generator)


def test_rounding_that_compensates_answers_better_than_the_nearest_integers(product):
    weight, inputs = product
    step = steps(weight)
    near, best = nearest(weight, step), compensated(weight, step, inputs)
    for integers in (near, best):
        assert torch.equal(integers, integers.round())
        assert integers.abs().max() <= 64
    errors = [relative(inputs @ (each * step[:, None]).T, inputs @ weight.T) for each in (near, best)]
    assert errors[1] < 0.5 * errors[0]
    # Neither input nor weight is changed, and channels that are always zero do no harm.
    inputs[:, 3] = 0
    weight[5] = 0
    integers = compensated(weight, steps(weight), inputs)
    assert torch.isfinite(integers).all()
    assert not integers[5].any()


# Whole models

MODELS = {
    "beats": tiny_beats,
    "beats with norms first": lambda: tiny_beats(layer_norm_first=True, deep_norm=False),
    "beats with gated units": lambda: tiny_beats(activation_fn="glu", deep_norm=False),
    "eat": tiny_eat,
}
BEATS_BLOCK = "backbone.encoder.layers.0"


@torch.no_grad()
def with_outliers(model):
    """Give every norm inside the blocks channels 30 times as large as the others, which their readers take back."""
    beats = hasattr(model.backbone, "encoder")
    for block in model.backbone.encoder.layers if beats else model.backbone.model.blocks:
        norm, reader = (block.self_attn_layer_norm, block.fc1) if beats else (block.norm1, block.mlp.fc1)
        if isinstance(reader, nn.Linear):
            norm.weight[3:5] *= 30
            reader.weight[:, 3:5] /= 20
    return model


@pytest.mark.parametrize("layers", [("last_layer",), ("all",)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_rounded_model_answers_nearly_as_before(name, layers):
    model = with_outliers(MODELS[name]())
    config = ProbeConfig(target_layers=list(layers), aggregation="mean")
    probe = build_probe_from_config(config, 5, "cpu", base_model=model).eval()
    graph = OnePassGraph(Target((probe,), RATE), ())
    rewrite(graph.target)
    clips = int8.find_clips(RATE, RATE, None)
    heard, asked = torch.from_numpy(clips.calibration), torch.from_numpy(clips.held_out)
    with torch.no_grad():
        expected = probe.combine(asked)[0]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        products = quantise(graph, heard)
        found = probe.combine(asked)[0]
    rounded = [part for part in probe.modules() if isinstance(part, Int8Linear)]
    assert len(rounded) == products >= 5
    assert all(part.weight.abs().max() <= 64 for part in rounded)
    mean = expected.mean(dim=0)
    assert nn.functional.cosine_similarity(found - mean, expected - mean).min() > 0.99
    assert not torch.equal(found, expected)
    # What isn't a product of a block is left alone.
    after = model.state_dict()
    kept = [key for key in before if key in after and ("patch" in key or "norm" in key or "local_encoder" in key)]
    assert kept
    assert all(torch.equal(after[key], before[key]) for key in kept)


@pytest.fixture(scope="module")
def eat_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("eat") / "eat.yml"
    return write_model(path, tiny_eat(seed=5), tiny_eat_spec())


@pytest.fixture(scope="module")
def effnet_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("effnet") / "effnet.yml"
    return write_model(path, effnet(), effnet_spec())


@pytest.fixture
def int8_bundle(made_once, one_operator_table, model, eat_model, labels):
    """The bundle of a random linear head on a backbone with an int8 graph, and what its export printed."""

    def make(folder, path):
        folder.mkdir()
        arguments = ["--probe", "linear_last", "--model", path, "--labels", labels, *INT8]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*map(str, arguments), "--output", str(folder / "bundle")])
        assert (code, err.getvalue()) == (0, UNTRAINED)
        (folder / "printed.txt").write_text(out.getvalue())

    def bundle(kind):
        path = {"beats": model, "eat": eat_model}[kind]
        folder = made_once(("int8", kind), lambda folder: make(folder, path))
        return folder / "bundle", (folder / "printed.txt").read_text()

    return bundle


@pytest.mark.parametrize("kind", ["beats", "eat"])
def test_a_bundle_with_int8_serves_it_on_the_cpu(int8_bundle, kind):
    output, out = int8_bundle(kind)
    assert "int8 against float32 on 24 clips held out: cosine" in out

    manifest = read_bundle(output).manifest
    assert manifest.quantisation is not None
    assert manifest.quantisation.file == "model_int8.onnx"
    assert manifest.quantisation.calibration == "built-in sounds"
    agreement = manifest.quantisation.agreement
    assert agreement.clips == 24
    assert agreement.cosine > 0.9995
    assert agreement.centred_cosine > 0.999
    assert agreement.decisions > 0.99
    card = (output / "README.md").read_text()
    assert "AVEX_PRECISION=float32" in card
    assert "int8 against float32 on 24 clips held out" in card

    graph = onnx.load(str(output / "model_int8.onnx")).graph
    operators = [node.op_type for node in graph.node]
    # Two blocks of four products, but for those behind the pooling.
    assert (
        operators.count("MatMulInteger")
        == operators.count("DynamicQuantizeLinear")
        == manifest.quantisation.products
    )
    assert manifest.quantisation.products == {"beats": 7, "eat": 5}[kind]
    integers = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(np.abs(weight.astype(int)).max() for weight in integers) == 64

    wave = noise(1, seconds=3.0, seed=9)[0].numpy()
    embeddings = {}
    for precision in ("auto", "int8", "float32"):
        with open_bundle(output, "cpu", precision=precision) as engine:
            embeddings[precision] = engine.embed(wave, RATE).embeddings
    np.testing.assert_array_equal(embeddings["auto"], embeddings["int8"])
    assert not np.array_equal(embeddings["auto"], embeddings["float32"])
    assert np.abs(embeddings["auto"] - embeddings["float32"]).max() < 0.02 * np.abs(embeddings["float32"]).max()


def test_the_graph_computes_what_the_calibration_did(tmp_path, model, labels):
    from avex_export.assemble import assemble
    from avex_export.formats import write_onnx
    from avex_export.graph import export_graph
    from avex_export.request import ExportRequest, read_probes

    request = ExportRequest(probe=("linear_all",), model=str(model), labels=labels, allow_untrained=True)
    graph = export_graph(assemble(request, read_probes(request)))
    assert quantise(graph, noise(4)) == 7  # of eight, one is behind the pooling
    write_onnx(graph, [noise(2)], tmp_path / "int8.onnx", ["waveform"], {})
    backend = OnnxBackend(tmp_path / "int8.onnx", ["waveform"], ["logits", "embedding"])
    for clip in (noise(1, seed=3), torch.zeros(1, RATE)):
        with torch.no_grad():
            expected = dict(zip(graph.outputs, graph(clip), strict=True))
        found = backend.run(clip.numpy())
        # A value between two levels may fall to either side: then a level is the difference.
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value.numpy(), atol=0.01 * float(value.abs().max()), rtol=0)


# Gates


def manifest(activation):
    """Of a bundle with one head."""
    probe = {"name": "x", "config": {}, "trained": True, "activation": activation, "embedding": "embedding"}
    return msgspec.convert(
        {
            "name": "x",
            "kind": "audio",
            "model": "x",
            "probes": [{**probe, "classes": 2}],
            "embeddings": [{"output": "embedding", "layers": ["x"]}],
            "audio": {"sample_rate": RATE, "window_samples": RATE},
            "inputs": [{"name": "waveform", "shape": (-1, RATE)}],
            "outputs": [{"name": "logits", "shape": (-1, 2)}, {"name": "embedding", "shape": (-1, 2)}],
            "licence": "CC0",
            "tools": {},
            "files": {},
        },
        Manifest,
    )


class Answers:
    """A backend that gives the same answers whatever it hears."""

    device, format, max_batch = "cpu", "onnx", 1

    def __init__(self, embeddings, logits):
        self._rows = iter(zip(embeddings, logits, strict=True))

    def run(self, batch):
        embedding, logits = next(self._rows)
        return {"embedding": embedding[None], "logits": logits[None]}


def test_int8_is_verified_by_what_it_was_off_by_where_it_was_made(tmp_path, int8_bundle, capsys):
    output = shutil.copytree(int8_bundle("beats")[0], tmp_path / "bundle")
    checks = [check for check in read_record(output) if check["format"] == "onnx-int8"]
    recordings, clips = (sum(check["whole_way"] is way for check in checks) for way in (True, False))
    assert (recordings, clips) == (4, 5)
    assert all(check["rows"] == 1 for check in checks if not check["whole_way"])
    assert max(check["errors"]["embedding"]["eager"] for check in checks if not check["whole_way"]) > 1e-4
    assert serve(["verify", str(output), "--full"]) == 0
    assert capsys.readouterr().out.count("onnx-int8  ") == len(checks)
    open_checked(output, precision="int8").close()

    graph = onnx.load(output / "model_int8.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) // 2, tensor.name))
    replace_file(output, "model_int8.onnx", graph.SerializeToString())
    with pytest.raises(VerificationError, match=r"\(onnx-int8 on cpu\): .*; expected at most"):
        open_checked(output)
    open_checked(output, precision="float32").close()
    assert serve(["verify", str(output)]) == 5
    lines = [line for line in capsys.readouterr().out.splitlines() if "✗" in line]
    assert lines
    assert all("onnx-int8" in line for line in lines)
    # What isn't known can't be judged by.
    replace_file(
        output, VERIFICATION, json.dumps(json.loads((output / VERIFICATION).read_bytes()) | {"checks": []}).encode()
    )
    assert serve(["verify", str(output)]) == 5


@pytest.mark.parametrize(
    "options",
    [
        ["--embeddings"],
        ["--probe", "queries"],
        pytest.param(["--probe", "linear_last", "--without", "projections"], marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_what_else_has_an_int8_graph(tmp_path, export, model, labels, options):
    """Embeddings alone; attention whose products aren't merged, by option or since one of them is tapped."""
    recipe = {"probe_type": "linear", "target_layers": ["backbone.encoder.layers.0.self_attn.q_proj"]}
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"probe_config": recipe}))
    options = [str(tmp_path / "queries.yml") if option == "queries" else option for option in options]
    heads = () if "--embeddings" in options else ("--labels", labels, "--allow-untrained")
    output = tmp_path / "bundle"
    code, _, err = export(
        *options, "--model", model, *heads, "--format", "onnx", "--quantize", "int8", "--output", output
    )
    assert code == 0, err
    with open_bundle(output) as engine:
        assert engine.backend.format == "onnx-int8"
        assert np.isfinite(engine.infer(noise(1).numpy())["embedding"]).all()
    assert serve(["verify", str(output)]) == 0


def read_record(bundle):
    return json.loads((bundle / "verification.json").read_text())["checks"]


@pytest.mark.parametrize(
    ("fault", "figures"),
    [
        (None, (1.0, 1.0, 1.0)),
        ("far from the mean", (0.9998, 0.95, 1.0)),
        ("other decisions", (1.0, 1.0, 0.9)),
        ("not a number", None),
    ],
)
def test_the_gates_refuse_with_the_figures(fault, figures):
    random = np.random.default_rng(0)
    common, own = 30 * random.normal(size=(1, 400)), random.normal(size=(20, 400))
    logits = random.normal(size=(20, 5))
    embeddings = found = common + own
    answered = logits.copy()
    if fault == "far from the mean":
        found = embeddings + 0.33 * random.normal(size=(20, 400))
    elif fault == "other decisions":
        answered[3:5] *= -1
    elif fault == "not a number":
        found = np.full_like(embeddings, np.nan)
    clips = np.zeros((20, 8), np.float32)
    agreement = int8.measure_agreement(
        Answers(embeddings, logits), Answers(found, answered), clips, manifest("sigmoid")
    )
    if figures is not None:
        measured = agreement.cosine, agreement.centred_cosine, agreement.decisions
        assert measured == pytest.approx(figures, abs=0.01)
    if fault is None:
        int8.check_gates(agreement)
        return
    with pytest.raises(ExportError, match=r"centred cosine .* \(gate 0.99\).*: this model can't be served in int8"):
        int8.check_gates(agreement)


def test_decisions_of_a_softmax_are_the_best_label():
    logits = np.array([[1.0, 2.0], [3.0, 1.0]])
    embeddings = np.eye(2)
    other = np.array([[6.0, 7.0], [3.0, 6.0]])
    agreement = int8.measure_agreement(
        Answers(embeddings, logits), Answers(embeddings, other), np.zeros((2, 8), np.float32), manifest("softmax")
    )
    assert agreement.decisions == 0.5


@pytest.mark.parametrize(
    ("differing", "compared", "passes"),
    [
        ([], 96, True),  # all of 24 and of 48 could be by chance
        ([3], 192, True),
        ([3, 30, 50], 192, True),
        ([3, 30, 50, 100], 192, False),
        ([0, 1, 2, 3], 24, False),  # more clips can't mend it
    ],
)
def test_few_decisions_are_judged_with_their_interval(differing, compared, passes):
    """Of a softmax a clip is one decision: one of 24 that differs is no reason to refuse, and none is no proof."""
    random = np.random.default_rng(0)
    embeddings, logits = random.normal(size=(192, 40)), random.normal(size=(192, 5))
    answered = logits.copy()
    answered[differing] *= -1
    clips = np.zeros((192, 8), np.float32)
    agreement = int8.measure_agreement(
        Answers(embeddings, logits), Answers(embeddings, answered), clips[:24], manifest("softmax"), clips[24:]
    )
    assert (agreement.clips, agreement.decided) == (compared, compared)
    assert agreement.decisions == 1 - len(differing) / compared
    if passes:
        int8.check_gates(agreement)
    else:
        with pytest.raises(ExportError, match=r"same decisions 9\d.\d% \(gate 98%\) of|same decisions 83.3%"):
            int8.check_gates(agreement)


def test_the_interval_of_a_share():
    """Against figures of Newcombe (1998), table I: https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857"""
    for right, count, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))):
        np.testing.assert_allclose(int8._interval(right / count, count), expected, atol=1e-4)


class Terminal(io.StringIO):
    """Standard error that somebody looks at."""

    def isatty(self):
        return True


def test_a_model_below_a_gate_is_refused_and_float32_is_left(tmp_path, export, model, labels, monkeypatch):
    monkeypatch.setattr(int8, "CENTRED_COSINE", 1.1)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    code, out, _ = export(
        "--probe", "linear_last", "--model", model, "--labels", labels, *INT8, "--output", tmp_path / "bundle"
    )
    assert code == 4
    assert "int8" not in out.replace("round to int8", "")
    # The long steps have their bars where somebody looks.
    for shown in ("round to int8:", " 0/7 ", "compare:", " 0/24 ", "can't be served in int8"):
        assert shown in terminal.getvalue()
    assert f"{tmp_path / 'bundle'} was written without an int8 graph" in terminal.getvalue()
    bundle = read_bundle(tmp_path / "bundle")
    assert (bundle.manifest.quantisation, bundle.path("model_int8.onnx")) == (None, None)
    assert not list((tmp_path / "bundle").glob("*int8*"))
    assert serve(["verify", str(tmp_path / "bundle")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "EFFNET"], "EfficientNet has no int8 graph: on CPUs that have only AVX2"),
        (["--model", "BEATS", "--format", "torchscript"], "export --format onnx as well"),
        (["--model", "BEATS", "--offline", "--input-dim", "32"], "--quantize is for audio"),
    ],
)
def test_refuses_what_has_no_int8_graph(tmp_path, export, model, effnet_model, labels, arguments, message):
    paths = {"EFFNET": effnet_model, "BEATS": model}
    given = [paths.get(argument, argument) for argument in arguments]
    code, _, err = export(
        "--probe", "linear_last", "--labels", labels, "--allow-untrained", "--quantize", "int8", *given,
        "--output", tmp_path / "bundle",
    )  # fmt: skip
    assert code == 4
    assert message in err


# Recordings to calibrate on


def write_recording(path, seconds, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    soundfile.write(path, wave, rate)


def test_recordings_are_searched_for_and_split(tmp_path):
    write_recording(tmp_path / "a.wav", 20.0)
    write_recording(tmp_path / "deeper" / "b.FLAC", 300.0, seed=1, rate=8000)
    (tmp_path / "notes.txt").write_text("no audio")
    clips = int8.find_clips(RATE, RATE, tmp_path)
    assert clips.calibration.shape == (24, RATE)
    assert clips.held_out.shape == (24, RATE)
    assert clips.calibration.dtype == clips.held_out.dtype == np.float32
    heard = {clip.tobytes() for clip in clips.calibration}
    assert not any(clip.tobytes() in heard for clip in clips.held_out)
    assert clips.source == "212 clips of the recordings"


def test_few_recordings_are_filled_up_with_sounds(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        int8.find_clips(RATE, RATE, tmp_path / "none")
    with pytest.raises(InputError, match="holds no recording that can be used"):
        int8.find_clips(RATE, RATE, tmp_path)
    write_recording(tmp_path / "a.wav", 3.0)
    clips = int8.find_clips(RATE, RATE, tmp_path)
    assert (clips.calibration.shape, clips.held_out.shape) == ((24, RATE), (24, RATE))
    assert clips.source == "3 clips of the recordings, and built-in sounds"
    spare = list(clips.spare)
    assert len(spare) == 192 - 24
    everything = [clip.tobytes() for clip in (*clips.calibration, *clips.held_out, *spare)]
    assert len(set(everything)) == len(everything)


def test_a_recording_that_is_none_is_named_and_left_out(tmp_path):
    write_recording(tmp_path / "a.wav", 20.0)
    whole = (tmp_path / "a.wav").read_bytes()
    for name, content in {
        "._a.wav": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X",
        "empty.wav": b"",
        "header.wav": whole[:30],
        "notes.mp3": b"no audio",
        "deeper/._b.flac": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    said = []
    clips = int8.find_clips(RATE, RATE, tmp_path, said.append)
    assert clips.source == "20 clips of the recordings"
    assert said[0].startswith("2 hidden files were left out")
    for line, name in zip(said[1:], ("empty.wav", "header.wav", "notes.mp3"), strict=True):
        assert line.startswith(f"left out {tmp_path / name} ")


def test_a_calibration_without_quantisation_is_refused(tmp_path, export):
    code, _, err = export("--probe", "linear_last", "--calibration", tmp_path)
    assert code == 2
    assert "--calibration is for --quantize int8" in err


def test_built_in_sounds_have_the_clips_length_at_any_rate():
    for samples, rate in ((8000, 16000), (96000, 32000), (4000, 8000)):
        clips = int8.find_clips(samples, rate, None)
        assert clips.calibration.shape == (24, samples)
        assert clips.held_out.shape == (24, samples)


def test_recordings_that_are_all_the_same_are_at_fault_and_not_the_model(tmp_path, export, model, labels):
    (tmp_path / "silence").mkdir()
    soundfile.write(tmp_path / "silence" / "a.wav", np.zeros(12 * RATE), RATE)
    code, _, err = export(
        "--probe", "linear_last", "--model", model, "--labels", labels, *INT8,
        "--calibration", tmp_path / "silence", "--output", tmp_path / "bundle",
    )  # fmt: skip
    assert code == 4
    assert "all 6 clips held out have the same embedding" in err
    assert "can't be served" not in err


def test_a_trained_model_calibrated_on_real_recordings(tmp_path, export):
    output = tmp_path / "bundle"
    code, _, err = export(
        "--probe", "linear_last", "--format", "onnx", "--quantize", "int8", "--calibration", shared("audio"),
        "--output", output,
    )  # fmt: skip
    assert (code, err) == (0, "")
    quantisation = read_bundle(output).manifest.quantisation
    assert quantisation is not None
    assert "clips of the recordings" in quantisation.calibration
    assert quantisation.agreement.centred_cosine > 0.999
    assert quantisation.agreement.decisions > 0.99  # one of 240 differs on some processors
