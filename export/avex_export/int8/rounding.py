"""Rounding the weights of a product to 7-bit integers, so that what it answers changes least."""

import torch
from torch import Tensor

# Weights are -64 to 64. On CPUs with AVX2 but without VNNI, onnxruntime adds two products of 8 bits each in 16 bits:
# with weights of 8 bits they saturate, and silently (255 * 127 * 2 > 2 ** 15; 255 * 64 * 2 is not).
LARGEST = 64
# Added to the diagonal of the second moments, relative to its mean; GPTQ's value.
_DAMPING = 0.01
# Columns that are rounded before the rest hears of their errors, for speed alone; GPTQ's value.
_COLUMNS = 128


def steps(weight: Tensor) -> Tensor:
    """The step between neighbouring integers for each row of a weight (N, K): (N,)."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest, 1.0) / LARGEST


def nearest(weight: Tensor, step: Tensor) -> Tensor:
    """The nearest integers (N, K), as floats, in steps (N,)."""
    return (weight / step[:, None]).round().clamp(-LARGEST, LARGEST)


def compensated(weight: Tensor, step: Tensor, inputs: Tensor) -> Tensor:
    """Integers that answer these inputs as the weight does, rather than being nearest to it.

    The columns are rounded one after the other, those with the strongest inputs first, and the columns that are left
    take up the error of each. Source: Frantar et al., "GPTQ" (arXiv 2210.17323), with its order by activation.

    Args:
        weight: (N, K).
        step: (N,).
        inputs: (R, K) rows as the product will get them.

    Returns:
        (N, K) integers, as floats.
    """
    moments = inputs.T @ inputs / len(inputs)  # (K, K)
    moments.diagonal().add_(_DAMPING * moments.diagonal().mean().clamp(min=1e-12))
    order = moments.diagonal().argsort(descending=True)
    moments = moments[order][:, order]
    # Its rows say how the error of one column is spread over those after it.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    rest = weight.T[order].contiguous()  # (K, N): a column of the weight is a row, which is contiguous
    rounded = torch.empty_like(rest)
    for start in range(0, len(rest), _COLUMNS):
        end = min(start + _COLUMNS, len(rest))
        within, block = spread[start:end, start:end], rest[start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            rounded[start + i] = (block[i] / step).round().clamp(-LARGEST, LARGEST)
            errors[i] = (block[i] - rounded[start + i] * step) / within[i, i]
            block[i + 1 :] -= within[i, i + 1 :, None] * errors[i]
        rest[end:] -= spread[start:end, end:].T @ errors
    integers = torch.empty_like(rounded)
    integers[order] = rounded
    return integers.T.contiguous()
