"""What is exported: probes with their weights, and the modules that become graphs."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from avex_export.architectures.base import Target
from avex_export.passes import halve, rewrite
from avex_serve.bundles.manifest import Activation, AudioSpec
from avex_serve.models.probes import Probe
from avex_serve.models.probes.base import Combined

MASK = "padding_mask"  # name of an input
Kind = Literal["logits", "pooled", "features"]  # (B, C); (B, D); the head's input, (B, D) or (B, T, D)


@dataclass(frozen=True)
class Head:
    """A probe with its weights."""

    name: str
    probe: Probe
    labels: tuple[str, ...]
    activation: Activation  # turns its logits into scores
    trained: bool
    input_fingerprint: str | None  # of the embedding that is the head's input; None: unknown
    pooled_fingerprint: str | None  # of that embedding after its mean over time


@dataclass(frozen=True)
class Output:
    """An output of the graph: its name, the index of its head, and what it is."""

    name: str
    head: int
    what: Kind


@dataclass(frozen=True)
class Assembly:
    """Probes on one backbone, ready to become a graph."""

    heads: tuple[Head, ...]
    model: str
    checkpoint: str | None  # of the backbone, for the manifest
    licence: str
    audio: AudioSpec | None  # None: the input is embeddings
    headless: bool = False  # whether the graph returns the heads' inputs and no logits
    takes_padding_mask: bool = False

    @property
    def probe(self) -> Probe:
        """The first probe; all share their backbone and input."""
        return self.heads[0].probe

    @property
    def probes(self) -> tuple[Probe, ...]:
        """All probes."""
        return tuple(head.probe for head in self.heads)

    @property
    def trained(self) -> bool:
        """Whether every head was trained."""
        return all(head.trained for head in self.heads)

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs of the graph."""
        if self.audio is None:
            return ["embedding"]
        return ["waveform", MASK] if self.takes_padding_mask else ["waveform"]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs of the graph: the logits of each head, then the embeddings, each once."""
        heads = range(len(self.heads))
        logits = [] if self.headless else [self._output(i, "logits") for i in heads]
        embeddings = [] if self.audio is None else [self.embedding_of(i) for i in heads]
        return tuple(dict.fromkeys([*logits, *embeddings]))

    def embedding_of(self, head: int) -> Output:
        """The embedding of a head. Heads with the same embedding share it, under the name of the first of them."""
        digests = [each.input_fingerprint if self.headless else each.pooled_fingerprint for each in self.heads]
        first = head if digests[head] is None else digests.index(digests[head])
        what: Kind = "features" if self.headless else "pooled"
        is_shared = digests[0] is not None and len(set(digests)) == 1
        return Output("embedding", first, what) if is_shared else self._output(first, what)

    def _output(self, head: int, what: Kind) -> Output:
        name = "logits" if what == "logits" else "embedding"
        return Output(name if len(self.heads) == 1 else f"{self.heads[head].name}.{name}", head, what)


class Graph(nn.Module):
    """Waveform (B, S) → the outputs: front end, backbone, aggregation and heads, with a pass for each probe.

    An optional mask (B, S) bool is True where clips are padded.
    """

    def __init__(self, probes: Sequence[Probe], outputs: Sequence[Output]) -> None:
        super().__init__()
        self.probes = nn.ModuleList(probes)
        self.answers = tuple(outputs)
        self.outputs = tuple(output.name for output in outputs)
        self.passes: tuple[str, ...] = ()  # names of the passes that were applied
        self.any_length = False  # whether the time axis of the input is dynamic

    def forward(self, waveform: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, S) → one tensor for each output, see `Kind`."""
        combined = self.combine(waveform, padding_mask)
        return tuple(self._answer(output, *combined[output.head]) for output in self.answers)

    def combine(self, waveform: Tensor, padding_mask: Tensor | None = None) -> list[Combined]:
        """The input of each head."""
        return [self._probe(i).combine(waveform, padding_mask) for i in range(len(self.probes))]

    def _probe(self, index: int) -> Probe:
        probe = self.probes[index]
        assert isinstance(probe, Probe)
        return probe

    def _answer(self, output: Output, features: Tensor, padding: Tensor | None) -> Tensor:
        probe = self._probe(output.head)
        if output.what == "logits":
            return probe.classify(features, padding)
        return features if output.what == "features" else probe.pool(features, padding)


class OnePassGraph(Graph):
    """The same for rewritten copies of the probes, with one pass of their backbone for all heads."""

    def __init__(self, target: Target, outputs: Sequence[Output]) -> None:
        super().__init__(target.probes, outputs)
        self.target = target

    def combine(self, waveform: Tensor, padding_mask: Tensor | None = None) -> list[Combined]:
        """See `Graph.combine`. With a mask, all probes must exclude padding, or none."""
        model, probes = self.target.model, self.target.probes
        as_if_alone = padding_mask is not None and probes[0].exclude_padding
        tapped = model.pooled_taps(waveform, self.target.layers, padding_mask, as_if_alone=as_if_alone)
        if padding_mask is None and model.fills_clips:
            # The clips are whole, but the backbone pads them.
            padding_mask = torch.zeros_like(waveform, dtype=torch.bool)
        return [probe.combine_taps(tapped, padding_mask if probe.exclude_padding else None) for probe in probes]


class EmbeddingGraph(Graph):
    """Embedding (B, D) or (B, T, D) → logits (B, C)."""

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, D) or (B, T, D) → (B, C). The name of the argument is the name of the input in TorchScript and PT2."""
        return super().forward(embedding)


def eager_graph(assembly: Assembly) -> Graph:
    """The graph that the probes themselves compute; every format is compared to it."""
    kind = EmbeddingGraph if assembly.audio is None else Graph
    return kind(assembly.probes, assembly.outputs).eval()


def export_graph(assembly: Assembly, without: Collection[str] = (), *, half: bool = False) -> Graph:
    """A copy of the graph, rewritten by all passes except `without`; see `avex_export.passes`.

    Args:
        assembly: what is exported.
        without: names of passes.
        half: convert all but the front end to float16. ExportError if no front end of the backbone is known.
    """
    probes = copy.deepcopy(assembly.probes)
    audio, masked = assembly.audio, assembly.takes_padding_mask
    if audio is None:
        graph: Graph = EmbeddingGraph(probes, assembly.outputs)
        graph.any_length = probes[0].takes_sequence
    else:
        any_length = audio.shortest_samples is not None
        target = Target(tuple(probe.eval() for probe in probes), audio.window_samples, any_length, masked)
        passes = rewrite(target, without)
        if half:
            halve(target)
        # One pass can't serve all probes if the backbone extracts embeddings for one probe at a time, or if the
        # probes use the mask in different ways.
        differ = masked and len({probe.exclude_padding for probe in probes}) > 1
        separate = target.model.has_own_extraction() or differ
        graph = Graph(probes, assembly.outputs) if separate else OnePassGraph(target, assembly.outputs)
        graph.passes, graph.any_length = tuple(passes), any_length
    return graph.eval().requires_grad_(False)
