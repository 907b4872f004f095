"""The manifest of a bundle, the folder that passes from the exporter to the service.

    manifest.json          what this is: see `Manifest`
    labels.json            {label: index}, avex's flat format; NAME.labels.json for each of several probes
    trained_on.txt         optional: SHA-256 of each recording that trained the head; likewise
    model.onnx             the graph for onnxruntime; large weights are in model.onnx.data
    model_int8.onnx        optional: the same graph with its matrix products in 8-bit integers; likewise
    model.torchscript.pt   the same graph for torch
    model.pt2              optional: the same graph as written by torch.export, to be compiled
    verification.json      errors of each format against the eager module, and the machine that measured them
    verification.npz       inputs with the eager module's answers, to verify the bundle anywhere; see
                           `avex_serve.evidence.cases`
    README.md              the model card

The manifest lists every file but itself, with its digest.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, field

from avex_serve.calibration.scales import Activation as Activation
from avex_serve.calibration.scales import Calibration, Interval
from avex_serve.errors import BundleError

SCHEMA_VERSION: Final = 3  # since 3: calibrations, evaluations and training recordings of heads
READABLE: Final = (2, 3)  # schema versions
MANIFEST = "manifest.json"
LABELS = "labels.json"
TRAINED_ON = "trained_on.txt"
PROBE = "probe.yml"  # of a saved probe, from which a bundle is made
ONNX = "model.onnx"
ONNX_INT8 = "model_int8.onnx"
TORCHSCRIPT = "model.torchscript.pt"
PT2 = "model.pt2"
DATA_SUFFIX = ".data"  # of the file next to a graph that holds its weights if they are too large for it
VERIFICATION = "verification.json"
EVIDENCE = "verification.npz"
CARD = "README.md"

# Names are part of URLs (/v2/models/{name}) and in metric labels.
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# Files are directly in the bundle's folder: a manifest can't point outside it. Some are named after a probe.
FILE_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z"
FileName = Annotated[str, Meta(pattern=FILE_NAME_PATTERN)]
Positive = Annotated[int, Meta(gt=0)]


class _Misfit(BundleError, ValueError):
    """Fields that don't fit together; a ValueError too, which msgspec reports as part of the file that it reads."""


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown fields are refused."""


class TensorSpec(_Strict, frozen=True, kw_only=True):
    """Name, type and shape of an input or output; -1 marks a dynamic dimension."""

    name: str
    dtype: Literal["float32", "bool"] = "float32"
    shape: Annotated[tuple[int, ...], Meta(min_length=1)]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it describes an array of that shape, or tensors of that shape in another manifest."""
        return len(shape) == len(self.shape) and all(
            size in (-1, given) for size, given in zip(self.shape, shape, strict=True)
        )


class AudioSpec(_Strict, frozen=True, kw_only=True):
    """The audio that the graph takes."""

    sample_rate: Positive  # Hz
    window_samples: Positive  # of one window at that rate
    # Of a clip, if the graph takes clips of any length; None: every clip has the length of a window.
    shortest_samples: Positive | None = None
    resampler: Literal["soxr_hq"] = "soxr_hq"  # the embeddings depend on it


class EvaluationInfo(_Strict, frozen=True, kw_only=True):
    """The headline of a head's evaluation on recordings that did not train it."""

    average_precision: float  # mean over labels
    interval: Interval | None = None  # of 95 % over recordings
    windows: Positive
    recordings: Positive
    split: str  # "split column", "hold-out" or "cross-validation"


class ProbeInfo(_Strict, frozen=True, kw_only=True):
    """One trained head of the bundle."""

    name: Name
    config: dict[str, Any]  # the ProbeConfig fields that were set
    trained: bool  # False: random weights, for trying the software
    activation: Activation  # turns its logits into scores
    labels: FileName = LABELS  # the file that names its classes
    classes: Positive  # how many labels, the width of its logits
    logits: str = "logits"  # name of the output
    embedding: str | None = None  # for kind audio: name of the output with its input, pooled over time
    # Digest of everything that determines the head's input: backbone, layers, aggregation …; None: unknown.
    input_fingerprint: Sha256 | None = field(default=None, name="reads")
    calibration: Calibration | None = None  # of its labels, in their order
    evaluation: EvaluationInfo | None = None
    trained_on: FileName | None = None  # file with the digests of the recordings that trained it; None: not known

    @property
    def scores(self) -> str:
        """Name of the output with its scores."""
        return self.logits.removesuffix("logits") + "scores"

    @property
    def probabilities(self) -> str:
        """Name of the output with the probabilities of its labels, if it is calibrated."""
        return self.logits.removesuffix("logits") + "probabilities"


class EmbeddingInfo(_Strict, frozen=True, kw_only=True):
    """An output that is an embedding."""

    output: str  # its name
    layers: tuple[str, ...]  # of the backbone, from which it is computed
    fingerprint: Sha256 | None = None  # digest of everything that determines it; None: unknown


class Agreement(_Strict, frozen=True, kw_only=True):
    """How closely a graph of lower precision agrees with float32 on clips that it was not calibrated on."""

    clips: Positive
    cosine: float  # of the embeddings, mean over the clips
    centred_cosine: float  # the same after subtracting float32's mean embedding
    lowest_centred_cosine: float  # of any clip
    decisions: float | None = None  # share of equal decisions; None: no head
    decided: Positive | None = None  # how many decisions were compared; None: not known, or no head


class Quantisation(_Strict, frozen=True, kw_only=True):
    """A graph of lower precision in addition to the float32 one."""

    kind: Literal["int8"]
    file: FileName
    weight_bits: Literal[7]  # so that no CPU's 16-bit sums overflow
    products: Positive  # matrix products in integers
    calibration: str  # the clips that it was calibrated and judged on
    agreement: Agreement


class Manifest(_Strict, frozen=True, kw_only=True):
    """What a bundle is; the content of ``manifest.json``."""

    schema_version: Literal[2, 3] = SCHEMA_VERSION
    name: Name
    version: Name = "1"
    kind: Literal["audio", "embedding"]  # of the input: waveforms or embeddings
    model: str  # the backbone that computes the embedding
    checkpoint: str | None = None  # URI of its weights, with the hub's revision; None: local ones
    probes: tuple[ProbeInfo, ...]  # the heads; none: the bundle returns embeddings only
    embeddings: tuple[EmbeddingInfo, ...] = ()  # for kind audio: which outputs are embeddings
    audio: AudioSpec | None = None  # for kind audio
    # Waveforms or embeddings; a padding mask may follow waveforms.
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=2)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    half: bool = False  # whether the TorchScript graph is in float16, except for its front end
    quantisation: Quantisation | None = None  # None: no graph in integers
    calibrates: Sha256 | None = None  # digest of the bundle that makes the same scores, calibrated otherwise
    licence: str  # of the weights
    tools: dict[str, str]  # versions of the packages that made it
    files: dict[FileName, Sha256]  # every file except the manifest; filled in when the bundle is sealed

    def __post_init__(self) -> None:
        """Raise BundleError for fields that don't fit together."""
        if (self.audio is None) != (self.kind == "embedding"):
            raise _Misfit(f"kind {self.kind!r} and audio {self.audio!r} don't fit together")
        if not self.probes and not self.embeddings:
            raise _Misfit("neither probes nor embeddings: the bundle would return nothing")
        for kind, named in (("probes", self.probes), ("outputs", self.outputs)):
            names = [each.name for each in named]
            if len(set(names)) < len(names):
                raise _Misfit(f"{kind} of the same name: {names}")
        for probe in self.probes:
            width = self.output(probe.logits).shape[-1]
            if width != probe.classes:
                raise _Misfit(f"probe {probe.name}: {probe.classes} labels for logits of width {width}")
            if (probe.embedding is None) != (self.kind == "embedding"):
                raise _Misfit(f"kind {self.kind!r} and embedding {probe.embedding!r} don't fit together")
            if probe.calibration is not None and len(probe.calibration.labels) != probe.classes:
                raise _Misfit(
                    f"probe {probe.name}: a calibration of {len(probe.calibration.labels)} labels, not of the "
                    f"{probe.classes} that it has"
                )
            if self.files and probe.trained_on is not None and probe.trained_on not in self.files:
                raise _Misfit(f"probe {probe.name}: {probe.trained_on} is not among the files")
        embeddings = {info.output for info in self.embeddings}
        if lost := {probe.embedding for probe in self.probes} - embeddings - {None}:
            raise _Misfit(f"the outputs {sorted(map(str, lost))} are not among the embeddings")
        for name in embeddings:
            self.output(name)
        if self.files and self.quantisation is not None and self.quantisation.file not in self.files:
            raise _Misfit(f"the {self.quantisation.kind} graph {self.quantisation.file} is not among the files")
        self._check_inputs()

    def _check_inputs(self) -> None:
        audio, (first, *others) = self.audio, self.inputs
        if audio is not None:
            expected = (-1, audio.window_samples if audio.shortest_samples is None else -1)
            if first.shape != expected:
                raise _Misfit(
                    f"input of shape {first.shape}, not {expected}, for windows of {audio.window_samples} samples"
                )
            if (audio.shortest_samples or 0) > audio.window_samples:
                raise _Misfit(f"a window is shorter than the shortest clip: {audio}")
        if [spec.dtype for spec in self.inputs] != ["float32", "bool"][: len(self.inputs)]:
            raise _Misfit(f"inputs of types {[spec.dtype for spec in self.inputs]}; a second one is a bool mask")
        if any(audio is None or spec.shape != first.shape for spec in others):
            raise _Misfit(f"a padding mask is for waveforms and has their shape, {first.shape}")

    @property
    def takes_padding_mask(self) -> bool:
        """Whether the graph takes a padding mask along with the waveforms."""
        return len(self.inputs) > 1

    @property
    def trained(self) -> bool:
        """Whether every head of the bundle was trained."""
        return all(probe.trained for probe in self.probes)

    def output(self, name: str) -> TensorSpec:
        """The output of that name; BundleError if there is none."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        raise _Misfit(f"no output {name!r} among {[spec.name for spec in self.outputs]}")
