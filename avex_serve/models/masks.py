"""Padding masks: bool, True where padded. Clips are padded at their end."""

import torch
from torch import Tensor


def valid_lengths(padding_mask: Tensor) -> Tensor:
    """(B,) int64: samples of each clip, up to the last one that is not padded, of a mask (B, S)."""
    samples = torch.arange(1, padding_mask.shape[1] + 1, device=padding_mask.device)
    return (samples * ~padding_mask.bool()).amax(dim=1)


def beyond(lengths: Tensor, steps: int) -> Tensor:
    """(B, steps) bool: True for the steps that come after a length (B,)."""
    return torch.arange(steps, device=lengths.device) >= lengths[:, None]
