"""Tiny bundles for tests: one or two matrix products, written with onnx alone."""

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from avex_serve.bundles.manifest import MANIFEST, ONNX, Manifest
from avex_serve.bundles.reading import read_bundle, sha256_of
from avex_serve.bundles.sealing import recalibrate, seal_bundle
from avex_serve.calibration.scales import Calibration, LabelCalibration, Scale, Threshold
from avex_serve.evidence.cases import Case, CaseEntry, Record, this_machine, write_evidence
from avex_serve.writing import atomic_directory

SAMPLE_RATE = 16000
WINDOW = 1600  # samples
DIM = 4
LABELS = ("chiffchaff", "robin", "Zaunkönig")
NOISES = ("wind", "rain")
AUDIO = {"sample_rate": SAMPLE_RATE, "window_samples": WINDOW}
Step = tuple[str, str, tuple[int, int]]  # a product: of what, what comes out, shape of the matrix
TO_EMBEDDING = ("waveform", "embedding", (WINDOW, DIM))
PROBE = {"name": "linear", "config": {}, "trained": True, "classes": len(LABELS)}


# What a head of an audio bundle says beside that.
HEAD = {"activation": "sigmoid", "embedding": "embedding"}
EMBEDDING = {"output": "embedding", "layers": ["last"]}
FINGERPRINT = "0123456789abcdef" * 4  # of what makes the embeddings of the bundles that have several heads or none


def make_audio_bundle(
    target: Path,
    name: str = "tiny",
    activation: str = "sigmoid",
    trained: bool = True,
    labels: tuple[str, str, str] = LABELS,
) -> Path:
    """(-1, WINDOW) waveforms → embedding (-1, DIM) → logits (-1, labels)."""
    return _make(
        target,
        [TO_EMBEDDING, ("embedding", "logits", (DIM, len(LABELS)))],
        {"linear": labels},
        name=name,
        kind="audio",
        audio=AUDIO,
        probes=[{**PROBE, **HEAD, "trained": trained, "activation": activation}],
        embeddings=[EMBEDDING],
    )


def make_embedding_bundle(target: Path, name: str = "tiny-offline", reads: str | None = None) -> Path:
    """Embeddings (-1, DIM) → logits (-1, labels)."""
    return _make(
        target,
        [("embedding", "logits", (DIM, len(LABELS)))],
        name=name,
        kind="embedding",
        probes=[{**PROBE, "activation": "softmax", "reads": reads}],
    )


def make_sequence_bundle(target: Path, name: str = "tiny-sequence") -> Path:
    """Embeddings (-1, time, DIM) → logits (-1, labels) of their mean."""
    inputs = [{"name": "embedding", "shape": (-1, -1, DIM)}]
    outputs = [{"name": "logits", "shape": (-1, len(LABELS))}]
    matrix = np.random.default_rng(0).normal(size=(DIM, len(LABELS))).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["embedding", "axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "to_logits"], ["logits"]),
    ]
    return _write(
        target,
        {"linear": LABELS},
        helper.make_graph(
            nodes,
            "sequence",
            *([_value_info(**spec) for spec in specs] for specs in (inputs, outputs)),
            [numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(matrix, "to_logits")],
        ),
        name=name,
        kind="embedding",
        probes=[{**PROBE, "activation": "sigmoid"}],
        inputs=inputs,
        outputs=outputs,
    )


def make_slow_bundle(target: Path, name: str = "slow") -> Path:
    """An audio bundle that takes tens of milliseconds a window, for a product with a large matrix, 300 times."""
    random = np.random.default_rng(0)
    make_audio_bundle(target, name)
    model = onnx.load(str(target / ONNX))
    many = random.normal(size=(WINDOW, WINDOW)).astype(np.float32) / WINDOW
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array([1, 300, 1], np.int64), "times"),
            numpy_helper.from_array(many, "many"),
        ]
    )
    first = model.graph.node[0]
    model.graph.node.remove(first)
    slow = [
        helper.make_node("Unsqueeze", ["waveform", "axis"], ["row"]),
        helper.make_node("Tile", ["row", "times"], ["rows"]),
        helper.make_node("MatMul", ["rows", "many"], ["products"]),
        helper.make_node("ReduceMean", ["products", "axis"], ["mixed"], keepdims=0),
        helper.make_node("MatMul", ["mixed", first.input[1]], list(first.output)),
    ]
    nodes = [*slow, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return replace_file(target, ONNX, model.SerializeToString())


def make_probes_bundle(target: Path, name: str = "tiny-probes") -> Path:
    """Two heads on one embedding, "birds" with the usual labels and "noise" with two of its own."""
    heads = [
        {"name": head, "logits": f"{head}.logits", "labels": f"{head}.labels.json", "reads": FINGERPRINT} | fields
        for head, fields in {
            "birds": {"classes": len(LABELS)},
            "noise": {"classes": len(NOISES), "activation": "softmax"},
        }.items()
    ]
    return _make(
        target,
        [TO_EMBEDDING, *(("embedding", head["logits"], (DIM, head["classes"])) for head in heads)],
        labels={"birds": LABELS, "noise": NOISES},
        name=name,
        kind="audio",
        audio=AUDIO,
        probes=[{**PROBE, **HEAD, **head} for head in heads],
        embeddings=[{**EMBEDDING, "fingerprint": FINGERPRINT}],
    )


def make_backbone_bundle(target: Path, name: str = "tiny-embeddings") -> Path:
    """(-1, WINDOW) waveforms → embedding (-1, DIM), and no head."""
    return _make(
        target,
        [TO_EMBEDDING],
        labels={},
        name=name,
        kind="audio",
        audio=AUDIO,
        probes=[],
        embeddings=[{**EMBEDDING, "fingerprint": FINGERPRINT}],
    )


def make_measuring_bundle(target: Path, name: str = "measuring", shortest: int | None = None) -> Path:
    """Waveforms with a mask, of any length if `shortest` is given, to an embedding that tells what was heard.

    That is: sum and sum of squares of what is not padded, samples that are not padded, samples in all.
    """
    samples = WINDOW if shortest is None else -1
    inputs = [
        {"name": "waveform", "shape": (-1, samples)},
        {"name": "padding_mask", "shape": (-1, samples), "dtype": "bool"},
    ]
    outputs = [{"name": "logits", "shape": (-1, len(LABELS))}, {"name": "embedding", "shape": (-1, DIM)}]
    one, axis = numpy_helper.from_array(np.ones(1, np.float32)), numpy_helper.from_array(np.array([1]), "axis")
    heard = helper.make_node
    nodes = [
        heard("Not", ["padding_mask"], ["kept"]),
        heard("Cast", ["kept"], ["weight"], to=TensorProto.FLOAT),
        heard("Mul", ["waveform", "weight"], ["sound"]),
        heard("Mul", ["sound", "sound"], ["power"]),
        heard("Shape", ["waveform"], ["shape"]),
        heard("ConstantOfShape", ["shape"], ["ones"], value=one),
        *(heard("ReduceSum", [each, "axis"], [f"all_{each}"]) for each in ("sound", "power", "weight", "ones")),
        heard("Concat", [f"all_{each}" for each in ("sound", "power", "weight", "ones")], ["embedding"], axis=1),
        heard("MatMul", ["embedding", "to_logits"], ["logits"]),
    ]
    matrix = np.random.default_rng(0).normal(size=(DIM, len(LABELS))).astype(np.float32) / WINDOW
    return _write(
        target,
        {"linear": LABELS},
        helper.make_graph(
            nodes,
            "measuring",
            *([_value_info(**spec) for spec in specs] for specs in (inputs, outputs)),
            [axis, numpy_helper.from_array(matrix, "to_logits")],
        ),
        name=name,
        kind="audio",
        audio={"sample_rate": SAMPLE_RATE, "window_samples": WINDOW, "shortest_samples": shortest},
        probes=[{**PROBE, **HEAD}],
        embeddings=[EMBEDDING],
        inputs=inputs,
        outputs=outputs,
    )


def make_loudness_bundle(target: Path, rate: int = SAMPLE_RATE, samples: int = WINDOW) -> Path:
    """Waveforms (-1, samples) to logits that say whether they are loud, as the first label alone does."""
    inputs = [{"name": "waveform", "shape": (-1, samples)}]
    outputs = [{"name": "logits", "shape": (-1, len(LABELS))}, {"name": "embedding", "shape": (-1, 1)}]
    constants = {
        "axis": np.array([1]),
        "to_logits": np.array([[100, 0, 0]], np.float32),
        "silence": np.full(len(LABELS), 4, np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["waveform", "waveform"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "to_logits"], ["raised"]),
        helper.make_node("Sub", ["raised", "silence"], ["logits"]),
    ]
    return _write(
        target,
        {"linear": LABELS},
        helper.make_graph(
            nodes,
            "loudness",
            *([_value_info(**spec) for spec in specs] for specs in (inputs, outputs)),
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        name="loudness",
        kind="audio",
        audio={"sample_rate": rate, "window_samples": samples},
        probes=[{**PROBE, **HEAD}],
        embeddings=[EMBEDDING],
        inputs=inputs,
        outputs=outputs,
    )


def _make(target: Path, steps: list[Step], labels: dict | None = None, **fields) -> Path:
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((random.normal(size=shape) / shape[0] ** 0.5).astype(np.float32), f"to_{output}")
        for _, output, shape in steps
    ]
    inputs = [{"name": steps[0][0], "shape": (-1, steps[0][2][0])}]
    outputs = [{"name": output, "shape": (-1, shape[1])} for _, output, shape in [*steps[1:], steps[0]]]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [source, f"to_{output}"], [output]) for source, output, _ in steps],
        "tiny",
        *([_value_info(**spec) for spec in specs] for specs in (inputs, outputs)),
        weights,
    )
    labels = {"linear": LABELS} if labels is None else labels
    return _write(target, labels, graph, inputs=inputs, outputs=outputs, **fields)


def _write(target: Path, labels: dict, graph: onnx.GraphProto, **fields) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with atomic_directory(target, marker=MANIFEST) as folder:
        onnx.save(model, str(folder / ONNX))
        known = {"model": "tiny", "licence": "MIT", "tools": {}, "files": {}}
        seal_bundle(folder, labels, msgspec.convert({**fields, **known}, Manifest))
    return target


def _value_info(name: str, shape: tuple[int, ...], dtype: str = "float32") -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}[dtype]
    sizes = ["time" if size == -1 else size for size in shape[1:]]
    return helper.make_tensor_value_info(name, kind, ["batch", *sizes])


def copy_bundle(source: Path, target: Path, **changes) -> Path:
    """A copy whose manifest has other values in the given fields, unchecked."""
    shutil.copytree(source, target)
    return change_manifest(target, **changes)


def replace_file(bundle: Path, name: str, content: bytes | None) -> Path:
    """Give the bundle other content in a file (None: take it out), with a manifest that agrees."""
    path = bundle / name
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    if content is None:
        path.unlink()
        del files[name]
    else:
        path.write_bytes(content)
        files[name] = sha256_of(path)
    return change_manifest(bundle, files=files)


def weights(bundle: Path) -> list[np.ndarray]:
    """The matrices of the graph, in the order in which the input passes them."""
    return [numpy_helper.to_array(tensor) for tensor in onnx.load(str(bundle / ONNX)).graph.initializer]


def change_manifest(bundle: Path, **changes) -> Path:
    """Give the manifest other values in these fields, unchecked."""
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    return bundle


def with_evidence(bundle: Path, *cases: Case) -> Path:
    """Put cases into a bundle."""
    read = read_bundle(bundle)
    entries = tuple(CaseEntry(name=c.name, sample_rate=c.sample_rate, batches=c.batches) for c in cases)
    known = {"machine": this_machine(), "optimisation": "ORT_ENABLE_ALL", "tolerance": 1e-4, "passed": True}
    write_evidence(bundle, Record(**known, cases=entries, checks=(), skipped=()), cases)
    seal_bundle(bundle, read.labels, read.manifest)
    return bundle


def proven(bundle: Path, off: float = 0.0) -> Path:
    """Put evidence into a bundle of `make_audio_bundle`: noise and the answers by numpy, which may be off."""
    clips = (np.random.default_rng(2).integers(-3000, 3000, (3, WINDOW)) / 32768).astype(np.float32)
    to_embedding, to_logits = (matrix.astype(np.float64) for matrix in weights(bundle))
    embedding = clips.astype(np.float64) @ to_embedding + off
    exact = {"logits": embedding @ to_logits, "embedding": embedding}
    eager = {name: value.astype(np.float32) for name, value in exact.items()}
    return with_evidence(bundle, Case("noise", clips, None, (1, 3), None, eager, exact))


# Slope, offset and lowest logit of a detection for each of LABELS; the last one has no calibration.
SCALES = ((0.5, -0.25, 0.3), (2.0, 0.5, None), None)


def calibration(labels: tuple[str, ...] = LABELS, scales: tuple = SCALES) -> Calibration:
    """A calibration with these numbers."""
    made = []
    for label, given in zip(labels, scales, strict=True):
        if given is None:
            made.append(LabelCalibration(label=label, with_sound=1, without_sound=1, recordings=1, reason="too few"))
            continue
        slope, offset, lowest = given
        scale = Scale(slope=slope, offset=offset, slope_interval=(0.1, 3), offset_interval=(-1, 1))
        counts = {"with_sound": 50, "without_sound": 100, "recordings": 20}
        threshold = None
        if lowest is not None:
            threshold = Threshold(
                logit=lowest, logit_interval=(lowest, lowest), precision=0.9, precision_interval=(0.8, 1)
            )
        made.append(LabelCalibration(label=label, scale=scale, threshold=threshold, **counts))
    return Calibration(target_precision=0.9, source="a test", labels=tuple(made))


def calibrated_copy(source: Path, target: Path, version: str = "2", **calibrations: Calibration) -> Path:
    """A new version of a bundle with these calibrations by probe, by default that of `calibration`."""
    recalibrate(read_bundle(source), target, version, calibrations or {"linear": calibration()})
    return target
