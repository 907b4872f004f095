"""Whether a graph is being traced: there, sizes are no numbers, and checks of them were done before."""

import torch


def is_tracing() -> bool:
    """Whether torch.jit.trace is looking on."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
