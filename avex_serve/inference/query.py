"""What a client asks, besides the recording or the embeddings that it sends."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Query:
    """One question. Each way to ask reads the fields that mean something there."""

    model: str | None = None  # name of the bundle; None: the only one that fits
    version: str | None = None  # of the bundle; None: the newest one
    overlap: float = 0.0  # of neighbouring windows, in seconds
    threshold: float | None = None  # lowest score to report; see `avex_serve.inference.scores.Selection`
    top_k: int | None = None  # most labels to report for a window
    probe: str | None = None  # name of the head; None: the first one of the bundle
    output: str | None = None  # name of the embedding; None: the first one of the bundle
