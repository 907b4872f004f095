"""What is exported: probes with their weights, and the module that becomes a graph."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from avex_export.passes import Target, rewrite
from avex_export.passes.half import halve
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
    reads: str | None  # digest of what makes the embedding that the head reads; None: unknown
    pooled: str | None  # the same of the pooled embedding that is answered beside the logits


@dataclass(frozen=True)
class Output:
    """An output of the graph: of which head, and what."""

    name: str
    head: int
    what: Literal["logits", "pooled", "features"]  # (B, C), (B, D), and what the head reads: (B, D) or (B, T, D)


@dataclass(frozen=True)
class Assembly:
    """Probes on one backbone, ready to become a graph."""

    name: str
    heads: tuple[Head, ...]
    model: str
    checkpoint: str | None  # of the backbone, as the manifest says it
    licence: str
    clip_samples: int | None  # None: the input is embeddings
    sample_rate: int | None
    version: str = "1"
    half: bool = False  # whether the TorchScript graph is in float16
    headless: bool = False  # whether only the embeddings that the heads read are answered

    @property
    def probe(self) -> Probe:
        """The first probe; all have their backbone and input in common."""
        return self.heads[0].probe

    @property
    def probes(self) -> tuple[Probe, ...]:
        """All of them."""
        return tuple(head.probe for head in self.heads)

    @property
    def trained(self) -> bool:
        """Whether every head was trained."""
        return all(head.trained for head in self.heads)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the graph answers: the logits of each head, then the embeddings, each once."""
        heads = [] if self.headless else [self._output(i, "logits") for i in range(len(self.heads))]
        return (*heads, *dict.fromkeys(self.embedding_of(i) for i in range(len(self.heads)) if self._embeds))

    def embedding_of(self, head: int) -> Output:
        """The embedding of that head, which may be another's too; audio only."""
        digests = [each.reads if self.headless else each.pooled for each in self.heads]
        # Heads that read the same are given the same output, by the name of the first of them.
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
    """Waveform (B, S) → the outputs; front end, aggregation and heads in one, each probe by itself."""

    def __init__(self, probes: Sequence[Probe], outputs: Sequence[Output]) -> None:
        super().__init__()
        self.probes = nn.ModuleList(probes)
        self.answers = tuple(outputs)
        self.passes: tuple[str, ...] = ()  # those that were applied

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(output.name for output in self.answers)

    def forward(self, waveform: Tensor) -> tuple[Tensor, ...]:
        """(B, S) → one tensor an output, see `Output`."""
        combined = self.combine(waveform)
        return tuple(self._answer(output, *combined[output.head]) for output in self.answers)

    def combine(self, waveform: Tensor) -> list[Combined]:
        """What each head reads."""
        return [self._probe(i).combine(waveform) for i in range(len(self.probes))]

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
    """The same of copies of the probes, with one pass of their backbone for all heads."""

    def __init__(self, target: Target, outputs: Sequence[Output]) -> None:
        super().__init__(target.probes, outputs)
        self.target = target

    def combine(self, waveform: Tensor) -> list[Combined]:
        """See `AudioGraph.combine`."""
        model, probes = self.target.model, self.target.probes
        tapped = model.pooled_taps(waveform, self.target.layers)
        # Nothing is padded but what the backbone adds to fill its clips up.
        nothing = torch.zeros_like(waveform, dtype=torch.bool) if model.fills_clips else None
        return [probe.combine_taps(tapped, nothing if probe.exclude_padding else None) for probe in probes]


class EmbeddingGraph(nn.Module):
    """Embedding (B, D) or (B, T, D) → logits (B, C)."""

    outputs = ("logits",)

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.passes: tuple[str, ...] = ()

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """(B, D) or (B, T, D) → (B, C)."""
        return (self.probe(embedding),)


Graph = AudioGraph | EmbeddingGraph


def eager_graph(assembly: Assembly) -> Graph:
    """The graph as the probes themselves compute it: what every format is compared to."""
    if assembly.clip_samples is None:
        return EmbeddingGraph(assembly.probe).eval()
    return AudioGraph(assembly.probes, assembly.outputs).eval()


def export_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """A copy of the graph, rewritten by all passes but those left out; see `avex_export.passes`."""
    probes = copy.deepcopy(assembly.probes)
    graph: Graph
    if assembly.clip_samples is None:
        graph = EmbeddingGraph(probes[0])
    else:
        target = Target(tuple(probe.eval() for probe in probes), assembly.clip_samples)
        passes = rewrite(target, without)
        # A backbone that extracts embeddings in its own way, for one probe at a time, is asked by the probe.
        own_way = target.model.has_own_extraction()
        graph = AudioGraph(probes, assembly.outputs) if own_way else OnePassGraph(target, assembly.outputs)
        graph.passes = tuple(passes)
    return graph.eval().requires_grad_(False)


def half_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """A copy of the graph as `export_graph` makes it, in float16 but for its front end.

    Raises:
        ExportError: a head alone, or a backbone whose front end is not known.
    """
    graph = export_graph(assembly, without)
    try:
        halve([*graph.probes] if isinstance(graph, AudioGraph) else [graph.probe])
    except ValueError as error:
        raise ExportError(f"--half: {error}") from None
    return graph
