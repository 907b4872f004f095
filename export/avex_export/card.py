"""The model card: the README.md of a bundle."""

import json

from avex_export.cases import example_inputs
from avex_export.graph import Assembly, Head
from avex_export.int8 import gates
from avex_export.verify import Verification
from avex_serve.bundles.manifest import LABELS, Manifest, Quantisation
from avex_serve.configs import ProbeType

_KINDS: dict[ProbeType, str] = {
    "linear": "a linear",
    "mlp": "an MLP",
    "lstm": "an LSTM",
    "attention": "an attention",
    "transformer": "a transformer",
}
# More labels than this are in labels.json alone.
_LISTED = 100

_AUDIO_CALLS = """\
    AVEX_BUNDLE=. bentoml serve avex_serve.service:AvexService
    curl -F audio=@recording.wav {predict}
{every}    curl --data-binary @recording.wav http://localhost:3000/embed

Without a server: `avex-serve predict . recording.wav`. Over gRPC, with Triton's client:

```python
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient("localhost:3001")
audio = triton.InferInput("{input}", [1], "BYTES")
audio.set_data_from_numpy(np.array([Path("recording.wav").read_bytes()], dtype=np.object_))
scores = client.infer("{name}", [audio]).as_numpy("{scores}")  # (windows, {labels})
```"""

_OPENSOUNDSCAPE = """\
`model.onnx` opens in OpenSoundscape (`pip install 'opensoundscape[onnx]'`){first}:

```python
from opensoundscape import ONNXModel

model = ONNXModel("model.onnx")
model.add_channel_dim = False  # the graph takes (clips, samples)
scores = model.predict(["recording.wav"], activation_layer={activation})
embeddings = model.embed(["recording.wav"])
```

`model.onnx.data`, if there is one, has to lie beside it."""

_FILLED = """
It fills up the last clip of a recording with zeros, which the service hears at its own length: there they differ."""

_ALL_PROBES = "    curl -F audio=@recording.wav http://localhost:3000/predict_all\n"

_EMBED_CALLS = """\
    AVEX_BUNDLE=. bentoml serve avex_serve.service:AvexService
    curl --data-binary @recording.wav http://localhost:3000/embed"""

_EMBEDDING_CALLS = """\
    AVEX_BUNDLE=. bentoml serve avex_serve.service:AvexService
    curl -H 'Content-Type: application/json' -d '{{"embeddings": [[…]]}}' http://localhost:3000/classify

Over gRPC, with Triton's client:

```python
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient("localhost:3001")
embeddings = np.zeros({example}, np.float32)
tensor = triton.InferInput("{input}", list(embeddings.shape), "FP32")
tensor.set_data_from_numpy(embeddings)
scores = client.infer("{name}", [tensor]).as_numpy("{scores}")  # (embeddings, {labels})
```"""

_PT2_CALLS = """\
`model.pt2` is a program of torch.export, to be compiled for where it will run; as it is, torch runs it. It is not
served: a bundle to serve needs `--format onnx` or `torchscript`.

```python
import torch

program = torch.export.load("model.pt2").module()
outputs = program({inputs})  # {outputs}
```"""


def model_card(assembly: Assembly, verification: Verification, manifest: Manifest) -> str:
    """Markdown: what the bundle is, how to serve and call it, and how well its formats agree.

    Args:
        assembly: what was exported.
        verification: how well it went.
        manifest: of the bundle; its files need not be listed yet.
    """
    untrained = ", ".join(head.name for head in assembly.heads if not head.trained)
    formats = {check.format for check in verification.checks}
    onnx, served = "onnx" in formats, formats != {"pt2"}
    warning = f"\n**A head that is not trained, its weights are random: {untrained}.**\n" if untrained else ""
    return f"""# {assembly.name}

{_what(assembly)}
{warning}
{_takes(assembly)} {_answers(manifest)}

Licence of the weights: {assembly.licence}. The backbone's licence holds for every bundle made of it.
{_labels(assembly)}
## Use it

{_calls(manifest, onnx) if served else _pt2_calls(assembly, manifest)}

## Verification

Each format was compared with the module that it was exported from, on the inputs in `verification.npz`.
{_again(onnx) if served else "The module's answers to them are there too."}

```
{verification.table()}

{verification.machine.lines()}
```
{_int8(manifest.quantisation)}"""


def _what(assembly: Assembly) -> str:
    if assembly.headless:
        outputs = [output.name for output in assembly.outputs]
        read = [assembly.heads[output.head] for output in assembly.outputs]
        lines = [f"- `{o}`{_layers(head)}, {_pooled(head)}" for o, head in zip(outputs, read, strict=True)]
        return "\n".join(
            [f"Embeddings of the backbone `{assembly.model}`, for heads that are served alone:\n", *lines]
        )
    if len(assembly.heads) == 1:
        (head,) = assembly.heads
        kind = _kind(head)
        return f"{kind[0].upper()}{kind[1:]} probe on the backbone `{assembly.model}`{_layers(head)}."
    lines = [f"- `{head.name}`, {_kind(head)} probe{_layers(head)}" for head in assembly.heads]
    return "\n".join([f"Probes on the backbone `{assembly.model}`, which is run once for all of them:\n", *lines])


def _kind(head: Head) -> str:
    assert head.probe.config is not None
    return _KINDS[head.probe.config.probe_type]


def _pooled(head: Head) -> str:
    how = head.probe.aggregation
    return "as sequences" if how == "none" else f"aggregated by {how}"


def _layers(head: Head) -> str:
    layers = ", ".join(f"`{layer}`" for layer in head.probe.layers)
    return f", layers {layers}" if layers else ""


def _answers(manifest: Manifest) -> str:
    if not manifest.probes:
        return "Answers embeddings alone."
    if len(manifest.probes) == 1:
        (probe,) = manifest.probes
        return f"Answers {probe.classes} labels with {probe.activation} scores."
    told = ", ".join(
        f"`{probe.name}` {probe.classes} labels with {probe.activation} scores" for probe in manifest.probes
    )
    return f"Answers: {told}."


def _int8(quantisation: Quantisation | None) -> str:
    if quantisation is None:
        return ""
    return f"""
On a CPU the graph in 8-bit integers is served, unless `AVEX_PRECISION=float32` is set. It was calibrated on
{quantisation.calibration}; {gates.text(quantisation.agreement)}.
"""


def _takes(assembly: Assembly) -> str:
    if assembly.clip_samples is None or assembly.sample_rate is None:
        return "Takes embeddings that the client brings."
    rate, seconds = assembly.sample_rate, assembly.clip_samples / assembly.sample_rate
    lines = [f"Hears {seconds:g} s at once, at {rate} Hz; recordings of other rates are resampled."]
    if assembly.shortest_samples is not None:
        lines.append(
            f"The graph takes clips of any length from {assembly.shortest_samples} samples "
            f"({assembly.shortest_samples / rate:g} s) on, so the last window of a recording is heard at its length."
        )
    if assembly.masked:
        lines.append(
            "Beside the clips the graph takes `padding_mask`, true where a clip is padded; the last window of a "
            "recording is masked where it was filled up."
        )
    return " ".join(lines)


def _labels(assembly: Assembly) -> str:
    if assembly.headless:
        return ""
    if len(assembly.heads) == 1:
        return f"\n## Labels\n\n{_listed(assembly.heads[0].labels, LABELS)}\n"
    lists = [f"`{head.name}`: {_listed(head.labels, f'{head.name}.{LABELS}')}\n" for head in assembly.heads]
    return "\n".join(["\n## Labels\n", *lists])


def _listed(labels: tuple[str, ...], file: str) -> str:
    listed = ", ".join(labels[:_LISTED])
    return listed if len(labels) <= _LISTED else f"The first {_LISTED} of {len(labels)}; all in `{file}`: {listed}"


def _calls(manifest: Manifest, onnx: bool) -> str:
    spec = manifest.inputs[0]
    if not manifest.probes:
        return _EMBED_CALLS
    probe = manifest.probes[0]
    known = {"name": manifest.name, "labels": probe.classes, "input": spec.name, "scores": probe.scores}
    if manifest.kind == "embedding":
        return _EMBEDDING_CALLS.format(**known, example=tuple(2 if size == -1 else size for size in spec.shape))
    activation = None if probe.activation == "none" else json.dumps(probe.activation)
    predict = "http://localhost:3000/predict"
    if len(manifest.probes) > 1:
        predict = f"'{predict}?probe={probe.name}'"
    every = "" if len(manifest.probes) == 1 else _ALL_PROBES
    opens = f"\n\n{_OPENSOUNDSCAPE}" if onnx and not manifest.masked else ""
    filled = f"\n{_FILLED}" if opens and spec.shape[1] == -1 else ""
    calls = f"{_AUDIO_CALLS}{opens}{filled}"
    first = "" if len(manifest.probes) == 1 else f", which hears the first probe alone, `{probe.name}`"
    return calls.format(**known, activation=activation, predict=predict, every=every, first=first)


def _again(onnx: bool) -> str:
    return f"The same on your machine{', without torch' if onnx else ''}: `avex-serve verify .`"


def _pt2_calls(assembly: Assembly, manifest: Manifest) -> str:
    inputs = [f"torch.zeros({tuple(each.shape)}, dtype={each.dtype})" for each in example_inputs(assembly, 2)]
    return _PT2_CALLS.format(inputs=", ".join(inputs), outputs=", ".join(spec.name for spec in manifest.outputs))
