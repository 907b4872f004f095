"""Which clips a rewritten graph takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clips:
    """The audio that a graph is rewritten for."""

    samples: int  # of a clip; where they have any length, of one that is long enough for everything
    any_length: bool = False
    masked: bool = False  # whether a padding mask comes with them
