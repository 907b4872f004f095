"""Padding masks: bool, True where padded. Clips are padded at their end.

Positions are counted with cumsum and not made by arange, which would tie a traced graph to its device.
"""

import torch
from torch import Tensor


def valid_lengths(padding_mask: Tensor) -> Tensor:
    """(B,) int64: samples of each clip, up to the last one that is not padded, of a mask (B, S)."""
    samples = torch.ones_like(padding_mask, dtype=torch.int64).cumsum(dim=1)
    return (samples * ~padding_mask.bool()).amax(dim=1)


def beyond(lengths: Tensor, steps: int) -> Tensor:
    """(B, steps) bool: True for the steps that come after a length (B,)."""
    positions = torch.ones_like(lengths)[:, None].expand(-1, steps).cumsum(dim=1)  # from 1
    return positions > lengths[:, None]
