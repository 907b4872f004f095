"""The manifest of a bundle: what is known of the folder that passes from the exporter to the service, in types.

    manifest.json          what this is: see `Manifest`
    labels.json            {label: index}, avex's flat format; of several probes NAME.labels.json each
    model.onnx             the graph for onnxruntime; its weights, if they are large, in model.onnx.data
    model_int8.onnx        the same graph with its products in 8-bit integers, if asked for; likewise
    model.torchscript.pt   the same graph for torch
    model.pt2              the same as torch.export writes it, to be compiled; if asked for
    verification.json      errors of each format against the eager module, and on what they were found
    verification.npz       inputs with the eager module's answers, to verify the bundle anywhere; see
                           `avex_serve.evidence.cases`
    README.md              the model card

The manifest lists every file but itself, with its digest.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

SCHEMA_VERSION: Final = 2
MANIFEST = "manifest.json"
LABELS = "labels.json"
ONNX = "model.onnx"
ONNX_INT8 = "model_int8.onnx"
TORCHSCRIPT = "model.torchscript.pt"
PT2 = "model.pt2"
DATA_SUFFIX = ".data"  # of a file beside a graph, with weights that are too many for it
VERIFICATION = "verification.json"
EVIDENCE = "verification.npz"
CARD = "README.md"

# Names stand in URLs (/v2/models/{name}) and in metric labels.
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# A file of the bundle lies in the folder itself: a manifest can't point outside it. Some are called after a probe.
FILE_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z"
FileName = Annotated[str, Meta(pattern=FILE_NAME_PATTERN)]
Activation = Literal["sigmoid", "softmax", "none"]
Positive = Annotated[int, Meta(gt=0)]


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """What comes from a file is refused if it holds more than this."""


class TensorSpec(_Strict, frozen=True, kw_only=True):
    """Name, type and shape of an input or output; -1 marks a dynamic dimension."""

    name: str
    dtype: Literal["float32", "bool"] = "float32"
    shape: Annotated[tuple[int, ...], Meta(min_length=1)]


class AudioSpec(_Strict, frozen=True, kw_only=True):
    """What the graph expects of audio."""

    sample_rate: Positive  # Hz
    window_samples: Positive  # of one window at that rate
    # Of a clip, where the graph takes clips of any length; None: all are of a window's.
    shortest_samples: Positive | None = None
    resampler: Literal["soxr_hq"] = "soxr_hq"  # the embeddings depend on it


class ProbeInfo(_Strict, frozen=True, kw_only=True):
    """One trained head of the bundle."""

    name: Name
    config: dict[str, Any]  # the ProbeConfig fields that were set
    trained: bool  # False: random weights, for trying the software
    activation: Activation  # turns its logits into scores
    labels: FileName = LABELS  # the file that names its classes
    classes: Positive  # how many labels, the width of its logits
    logits: str = "logits"  # name of the output
    embedding: str | None = None  # for kind audio: name of the output with the embedding that it reads, pooled
    reads: Sha256 | None = (
        None  # digest of what makes the embedding that it reads: backbone, layers …; None: unknown
    )

    @property
    def scores(self) -> str:
        """The name under which its scores are answered beside its logits."""
        return self.logits.removesuffix("logits") + "scores"


class EmbeddingInfo(_Strict, frozen=True, kw_only=True):
    """An output that is an embedding."""

    output: str  # its name
    layers: tuple[str, ...]  # of the backbone, of which it is made
    fingerprint: Sha256 | None = None  # digest of what makes it; None: unknown


class Agreement(_Strict, frozen=True, kw_only=True):
    """How far a graph of less precision agrees with float32 on clips that it was not calibrated on."""

    clips: Positive
    cosine: float  # of the embeddings, mean over the clips
    centred_cosine: float  # the same of the embeddings less float32's mean embedding
    lowest_centred_cosine: float  # of a clip
    decisions: float | None = None  # share of those that are the same; None: there is no head


class Quantisation(_Strict, frozen=True, kw_only=True):
    """A graph of less precision beside the float32 one."""

    kind: Literal["int8"]
    file: FileName
    weight_bits: Literal[7]  # so that no CPU's 16-bit sums overflow
    products: Positive  # how many are in integers
    calibration: str  # on what it was calibrated and judged
    agreement: Agreement


class Manifest(_Strict, frozen=True, kw_only=True):
    """What a bundle is; the content of ``manifest.json``."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: Name
    version: Name = "1"
    kind: Literal["audio", "embedding"]  # what the input is: waveforms or embeddings
    model: str  # the backbone that makes the embedding
    checkpoint: str | None = None  # URI of its weights, with the hub's revision; None: local ones
    probes: tuple[ProbeInfo, ...]  # the heads; none: the bundle answers embeddings alone
    embeddings: tuple[EmbeddingInfo, ...] = ()  # for kind audio: which outputs are embeddings
    audio: AudioSpec | None = None  # for kind audio
    # Waveforms or embeddings; for waveforms a padding mask may follow.
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=2)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    half: bool = False  # whether the TorchScript graph is in float16, but for its front end
    quantisation: Quantisation | None = None  # None: there is no graph but in float32
    licence: str  # of the weights
    tools: dict[str, str]  # versions that made it
    files: dict[FileName, Sha256]  # every file of the bundle but the manifest

    def __post_init__(self) -> None:
        """Raise ValueError for fields that don't go together."""
        if (self.audio is None) != (self.kind == "embedding"):
            raise ValueError(f"kind {self.kind!r} and audio {self.audio!r} don't go together")
        if not self.probes and not self.embeddings:
            raise ValueError("neither probes nor embeddings: the bundle would answer nothing")
        names = [probe.name for probe in self.probes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes of the same name: {names}")
        for probe in self.probes:
            width = self.output(probe.logits).shape[-1]
            if width != probe.classes:
                raise ValueError(f"probe {probe.name}: {probe.classes} labels for logits of width {width}")
            if (probe.embedding is None) != (self.kind == "embedding"):
                raise ValueError(f"kind {self.kind!r} and embedding {probe.embedding!r} don't go together")
        embeddings = {info.output for info in self.embeddings}
        if lost := {probe.embedding for probe in self.probes} - embeddings - {None}:
            raise ValueError(f"the outputs {sorted(map(str, lost))} are not among the embeddings")
        for name in embeddings:
            self.output(name)
        if self.files and self.quantisation is not None and self.quantisation.file not in self.files:
            raise ValueError(f"the {self.quantisation.kind} graph {self.quantisation.file} is not among the files")
        self._check_inputs()

    def _check_inputs(self) -> None:
        audio, (first, *others) = self.audio, self.inputs
        if audio is not None:
            expected = (-1, audio.window_samples if audio.shortest_samples is None else -1)
            if first.shape != expected:
                raise ValueError(
                    f"input of shape {first.shape}, not {expected}, for windows of {audio.window_samples} samples"
                )
            if (audio.shortest_samples or 0) > audio.window_samples:
                raise ValueError(f"a window is shorter than the shortest clip: {audio}")
        if [spec.dtype for spec in self.inputs] != ["float32", "bool"][: len(self.inputs)]:
            raise ValueError(f"inputs of types {[spec.dtype for spec in self.inputs]}; a second one is a bool mask")
        if any(audio is None or spec.shape != first.shape for spec in others):
            raise ValueError(f"a padding mask is for waveforms and has their shape, {first.shape}")

    @property
    def masked(self) -> bool:
        """Whether the graph takes a padding mask beside the waveforms."""
        return len(self.inputs) > 1

    @property
    def trained(self) -> bool:
        """Whether every head of the bundle was trained."""
        return all(probe.trained for probe in self.probes)

    def output(self, name: str) -> TensorSpec:
        """The output of that name; ValueError if there is none."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        raise ValueError(f"no output {name!r} among {[spec.name for spec in self.outputs]}")
