"""Aggregation: reduce the time axis of an embedding. Pure functions of batch-first tensors.

The rank of the tensor determines the time axis: axis 1 of a sequence (B, T, D), the last axis of a feature map
(B, C, H, W). A vector (B, D) has no time axis and is returned unchanged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from avex_serve.configs import Aggregation


def time_steps(embedding: Tensor) -> int:
    """Steps along the time axis; 1 for a vector."""
    return 1 if embedding.ndim == 2 else embedding.shape[_time_axis(embedding)]


def aggregate(embedding: Tensor, how: Aggregation, padding: Tensor | None = None) -> Tensor:
    """Reduce the time axis.

    Args:
        embedding: (B, D), (B, T, D) or (B, C, H, W) where W is time.
        how: ``mean``, ``max``, ``cls_token`` (first token; for a feature map the first channel) or ``none``.
        padding: (B, T) bool, True where padded, to leave out of mean and max.

    Returns:
        (B, D), or (B, C * H) for a feature map; for ``none`` the embedding itself.

    Raises:
        ValueError: another rank or aggregation.
    """
    if how == "none" or embedding.ndim == 2:
        return embedding
    if embedding.ndim not in (3, 4):
        raise ValueError(f"embedding of shape {tuple(embedding.shape)}; expected 2, 3 or 4 dimensions")
    if padding is not None and how in ("mean", "max"):
        return _aggregate_valid(embedding, how, padding).flatten(1)
    time = _time_axis(embedding)
    if how == "mean":
        return embedding.mean(dim=time).flatten(1)
    if how == "max":
        return embedding.max(dim=time).values.flatten(1)
    if how == "cls_token":
        return embedding[:, 0].flatten(1)
    raise ValueError(f"aggregation {how!r}; expected mean, max, cls_token or none")


def concatenate(embeddings: Sequence[Tensor], how: Aggregation) -> Tensor | list[Tensor]:
    """Aggregated layers side by side, (B, sum of D); for ``none`` a list, or the tensor of a single layer."""
    reduced = [aggregate(embedding, how) for embedding in embeddings]
    if len(reduced) == 1:
        return reduced[0]
    return reduced if how == "none" else torch.cat(reduced, dim=1)


def _time_axis(embedding: Tensor) -> int:
    return 1 if embedding.ndim == 3 else 3


def _aggregate_valid(embedding: Tensor, how: Aggregation, padding: Tensor) -> Tensor:
    time = _time_axis(embedding)
    padded = padding[..., None] if time == 1 else padding[:, None, None]  # (B, T, 1) or (B, 1, 1, T)
    if how == "max":
        return embedding.masked_fill(padded, -torch.inf).max(dim=time).values
    valid = (~padded).sum(dim=time).clamp(min=1)
    return embedding.masked_fill(padded, 0).sum(dim=time) / valid
