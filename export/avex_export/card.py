"""The model card: the README.md of a bundle."""

import json
from collections.abc import Mapping
from typing import Any

from avex_export.graph import Assembly
from avex_export.int8 import gates
from avex_export.verify import Verification
from avex_serve.bundle import Agreement

# More labels than this are in labels.json alone.
_LISTED = 100

_AUDIO_CALLS = """\
    AVEX_BUNDLE=. bentoml serve avex_serve.service:AvexService
    curl -F audio=@recording.wav http://localhost:3000/predict
    curl --data-binary @recording.wav http://localhost:3000/embed

Without a server: `avex-serve predict . recording.wav`. Over gRPC, with Triton's client:

```python
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient("localhost:3001")
audio = triton.InferInput("{input}", [1], "BYTES")
audio.set_data_from_numpy(np.array([Path("recording.wav").read_bytes()], dtype=np.object_))
scores = client.infer("{name}", [audio]).as_numpy("scores")  # (windows, {labels})
```"""

_OPENSOUNDSCAPE = """\
`model.onnx` opens in OpenSoundscape (`pip install 'opensoundscape[onnx]'`):

```python
from opensoundscape import ONNXModel

model = ONNXModel("model.onnx")
model.add_channel_dim = False  # the graph takes (clips, samples)
scores = model.predict(["recording.wav"], activation_layer={activation})
embeddings = model.embed(["recording.wav"])
```"""

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
scores = client.infer("{name}", [tensor]).as_numpy("scores")  # (embeddings, {labels})
```"""


def model_card(assembly: Assembly, verification: Verification, fields: Mapping[str, Any]) -> str:
    """Markdown: what the bundle is, how to serve and call it, and how well its formats agree.

    Args:
        assembly: what was exported.
        verification: how well it went.
        fields: of the manifest.
    """
    probe = assembly.probe
    kind = type(probe).__name__.removesuffix("Probe").lower()
    layers = ", ".join(f"`{layer}`" for layer in probe.layers)
    untrained = "" if assembly.trained else "\n**The head is not trained: its weights are random.**\n"
    return f"""# {assembly.name}

A {kind} probe on the backbone `{assembly.model}`{", layers " if layers else ""}{layers}.
{untrained}
{_takes(assembly)} Answers {len(assembly.labels)} labels with {fields["activation"]} scores.

Licence of the weights: {assembly.licence}. The backbone's licence holds for every bundle made of it.

## Labels

{_labels(assembly.labels)}

## Use it

{_calls(assembly, fields)}

## Verification

Each format was compared with the module that it was exported from, on the inputs in `verification.npz`. The same on
your machine, without torch: `avex-serve verify .`

```
{verification.table()}

{verification.machine.lines()}
```
{_int8(fields.get("quantisation"))}"""


def _int8(quantisation: Mapping[str, Any] | None) -> str:
    if quantisation is None:
        return ""
    return f"""
On a CPU the graph in 8-bit integers is served, unless `AVEX_PRECISION=float32` is set. It was calibrated on
{quantisation["calibration"]}; {gates.text(Agreement(**quantisation["agreement"]))}.
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


def _labels(labels: tuple[str, ...]) -> str:
    listed = ", ".join(labels[:_LISTED])
    return (
        listed if len(labels) <= _LISTED else f"The first {_LISTED} of {len(labels)}; all in `labels.json`: {listed}"
    )


def _calls(assembly: Assembly, fields: Mapping[str, Any]) -> str:
    spec = fields["inputs"][0]
    known = {"name": assembly.name, "labels": len(assembly.labels), "input": spec["name"]}
    if assembly.clip_samples is None:
        return _EMBEDDING_CALLS.format(**known, example=tuple(2 if size == -1 else size for size in spec["shape"]))
    activation = None if fields["activation"] == "none" else json.dumps(fields["activation"])
    calls = _AUDIO_CALLS if assembly.masked else f"{_AUDIO_CALLS}\n\n{_OPENSOUNDSCAPE}"  # which has no masks
    return calls.format(**known, activation=activation)
