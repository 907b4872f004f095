"""What is exported: a probe with its weights, and the module that becomes a graph."""

import copy
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from avex_export.passes import Clips, rewrite
from avex_export.passes.half import halve
from avex_serve.errors import ExportError
from avex_serve.models.probes import Probe


@dataclass(frozen=True)
class Assembly:
    """A probe with its weights, ready to become a graph."""

    name: str
    probe: Probe
    labels: tuple[str, ...]
    trained: bool
    model: str
    checkpoint: str | None  # of the backbone, as the manifest says it
    licence: str
    embedding_fingerprint: str | None
    clip_samples: int | None  # None: the input is embeddings
    sample_rate: int | None
    half: bool = False  # whether the TorchScript graph is in float16
    shortest_samples: int | None = None  # of a clip, where the graph takes clips of any length from there on
    masked: bool = False  # whether the graph takes a padding mask beside the clips


class AudioGraph(nn.Module):
    """Waveform (B, S) → logits (B, C) and pooled embedding (B, D): front end, aggregation and head in one.

    Attributes:
        any_length: whether clips may have any length.
    """

    outputs = ("logits", "embedding")

    def __init__(self, probe: Probe, any_length: bool = False) -> None:
        super().__init__()
        self.probe, self.any_length = probe, any_length
        self.passes: tuple[str, ...] = ()  # those that were applied

    def forward(self, waveform: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, S) and, if clips are padded, (B, S) bool with True where they are → (B, C), (B, D)."""
        features, padding = self.probe.combine(waveform, padding_mask)
        return self.probe.classify(features, padding), self.probe.pool(features, padding)


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
    """The graph as the probe itself computes it: what every format is compared to."""
    return _graph(assembly, assembly.probe).eval()


def export_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """A copy of the graph, rewritten by all passes but those left out; see `avex_export.passes`."""
    probe = copy.deepcopy(assembly.probe).eval()
    graph = _graph(assembly, probe)
    if assembly.clip_samples is not None:
        clips = Clips(assembly.clip_samples, assembly.shortest_samples is not None, assembly.masked)
        graph.passes = tuple(rewrite(probe, clips, without))
    return graph.eval().requires_grad_(False)


def _graph(assembly: Assembly, probe: Probe) -> Graph:
    if assembly.clip_samples is None:
        return EmbeddingGraph(probe)
    return AudioGraph(probe, any_length=assembly.shortest_samples is not None)


def half_graph(assembly: Assembly, without: Collection[str] = ()) -> Graph:
    """A copy of the graph as `export_graph` makes it, in float16 but for its front end.

    Raises:
        ExportError: a head alone, or a backbone whose front end is not known.
    """
    graph = export_graph(assembly, without)
    try:
        halve(graph.probe)
    except ValueError as error:
        raise ExportError(f"--half: {error}") from None
    return graph
