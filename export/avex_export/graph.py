"""What is exported: probes with their weights, and the modules that become graphs."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from avex_export.passes import Target, halve, rewrite
from avex_serve.errors import ExportError
from avex_serve.models.probes import Probe
from avex_serve.models.probes.base import Combined


@dataclass(frozen=True)
class Head:
    """A probe with its weights."""

    name: str
    probe: Probe
    labels: tuple[str, ...]
    trained: bool
    reads: str | None  # fingerprint of the embedding that is the head's input; None: unknown
    pooled: str | None  # fingerprint of the pooled embedding that the graph returns with the logits


@dataclass(frozen=True)
class Output:
    """An output of the graph: which head it belongs to, and what it is."""

    name: str
    head: int
    what: Literal["logits", "pooled", "features"]  # (B, C); (B, D); the head's input, (B, D) or (B, T, D)


@dataclass(frozen=True)
class Assembly:
    """Probes on one backbone, ready to become a graph."""

    name: str
    heads: tuple[Head, ...]
    model: str
    checkpoint: str | None  # of the backbone, for the manifest
    licence: str
    clip_samples: int | None  # None: the input is embeddings
    sample_rate: int | None
    version: str = "1"
    half: bool = False  # whether the TorchScript graph is in float16
    headless: bool = False  # whether the graph returns the heads' inputs and no logits
    shortest_samples: int | None = None  # of a clip, if the graph takes that and any longer one
    masked: bool = False  # whether the graph takes a padding mask

    @property
    def probe(self) -> Probe:
        """The first probe; all share their backbone and input."""
        return self.heads[0].probe

    @property
    def probes(self) -> tuple[Probe, ...]:
        """All probes."""
        return tuple(head.probe for head in self.heads)

    @property
    def any_length(self) -> bool:
        """Whether clips may have any length."""
        return self.shortest_samples is not None

    @property
    def trained(self) -> bool:
        """Whether every head was trained."""
        return all(head.trained for head in self.heads)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs of the graph: the logits of each head, then the embeddings, each once."""
        heads = [] if self.headless else [self._output(i, "logits") for i in range(len(self.heads))]
        return (*heads, *dict.fromkeys(self.embedding_of(i) for i in range(len(self.heads)) if self._embeds))

    def embedding_of(self, head: int) -> Output:
        """The embedding of a head; heads may share it. Audio only."""
        digests = [each.reads if self.headless else each.pooled for each in self.heads]
        # Heads with the same embedding share an output, which has the name of the first of them.
        first = head if digests[head] is None else digests.index(digests[head])
        what: Literal["features", "pooled"] = "features" if self.headless else "pooled"
        alone = digests[0] is not None and len(set(digests)) == 1
        return Output("embedding", first, what) if alone else self._output(first, what)

    @property
    def _embeds(self) -> bool:
        return self.clip_samples is not None

    def _output(self, head: int, what: Literal["logits", "pooled", "features"]) -> Output:
        name = "logits" if what == "logits" else "embedding"
        return Output(name if len(self.heads) == 1 else f"{self.heads[head].name}.{name}", head, what)


class AudioGraph(nn.Module):
    """Waveform (B, S) → the outputs: front end, backbone, aggregation and heads, with a pass for each probe.

    An optional mask (B, S) bool is True where clips are padded.
    """

    def __init__(self, probes: Sequence[Probe], outputs: Sequence[Output]) -> None:
        super().__init__()
        self.probes = nn.ModuleList(probes)
        self.answers = tuple(outputs)
        self.passes: tuple[str, ...] = ()  # names of the passes that were applied
        self.any_length = False  # whether clips may have any length

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(output.name for output in self.answers)

    def forward(self, waveform: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, S) → one tensor an output, see `Output`."""
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


class OnePassGraph(AudioGraph):
    """The same for rewritten copies of the probes, with one pass of their backbone for all heads."""

    def __init__(self, target: Target, outputs: Sequence[Output]) -> None:
        super().__init__(target.probes, outputs)
        self.target = target

    def combine(self, waveform: Tensor, padding_mask: Tensor | None = None) -> list[Combined]:
        """See `AudioGraph.combine`. With a mask, all probes must exclude padding, or none."""
        model, probes = self.target.model, self.target.probes
        as_if_alone = padding_mask is not None and probes[0].exclude_padding
        tapped = model.pooled_taps(waveform, self.target.layers, padding_mask, as_if_alone=as_if_alone)
        if padding_mask is None and model.fills_clips:
            # The clips are whole, but the backbone pads them.
            padding_mask = torch.zeros_like(waveform, dtype=torch.bool)
        return [probe.combine_taps(tapped, padding_mask if probe.exclude_padding else None) for probe in probes]


class EmbeddingGraph(nn.Module):
    """Embedding (B, D) or (B, T, D) → logits (B, C); sequences may have any length."""

    outputs = ("logits",)

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe, self.any_length = probe, probe.takes_sequence
        self.passes: tuple[str, ...] = ()

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """(B, D) or (B, T, D) → (B, C)."""
        return (self.probe(embedding),)


Graph = AudioGraph | EmbeddingGraph


def eager_graph(assembly: Assembly) -> Graph:
    """The graph that the probes themselves compute; every format is compared to it."""
    if assembly.clip_samples is None:
        return EmbeddingGraph(assembly.probe).eval()
    return AudioGraph(assembly.probes, assembly.outputs).eval()


def export_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """A copy of the graph, rewritten by all passes except `without`; see `avex_export.passes`."""
    probes = copy.deepcopy(assembly.probes)
    graph: Graph
    if assembly.clip_samples is None:
        graph = EmbeddingGraph(probes[0])
    else:
        copies = tuple(probe.eval() for probe in probes)
        target = Target(copies, assembly.clip_samples, assembly.any_length, assembly.masked)
        passes = rewrite(target, without)
        # One pass can't serve all probes if the backbone extracts embeddings for one probe at a time, or if the
        # probes use the mask in different ways.
        own_way = target.model.has_own_extraction() or (
            assembly.masked and len({probe.exclude_padding for probe in probes}) > 1
        )
        graph = AudioGraph(probes, assembly.outputs) if own_way else OnePassGraph(target, assembly.outputs)
        graph.passes, graph.any_length = tuple(passes), assembly.any_length
    return graph.eval().requires_grad_(False)


def half_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """`export_graph` in float16, except for its front end.

    Raises:
        ExportError: a head alone, or a backbone whose front end is not known.
    """
    graph = export_graph(assembly, without)
    try:
        halve([*graph.probes] if isinstance(graph, AudioGraph) else [graph.probe])
    except ValueError as error:
        raise ExportError(f"--half: {error}") from None
    return graph
