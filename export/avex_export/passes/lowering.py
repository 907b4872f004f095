"""Lowering: what every graph needs, whatever passes are applied to it."""

import torch

from avex_export.passes.spectra import ProductFramePower, ProductPower
from avex_export.passes.target import Target
from avex_serve.models.frontends import KaldiFbank, Spectrogram
from avex_serve.models.hooks import input_lengths


def lower(target: Target) -> None:
    """Fix what a traced graph can't find out, and take spectra as products: no runtime has a fast FFT."""
    model = target.model
    model.fix_batch_axes(target.samples, target.layers)
    parts = [part for part in model.modules() if isinstance(part, KaldiFbank | Spectrogram)]
    # What the first probe needs, all do: they have the front end in common.
    lengths = input_lengths(target.probes[0], torch.zeros(1, target.samples), parts)
    for part, length in zip(parts, lengths, strict=True):
        part.fixed_samples = length
        part.power = ProductFramePower(part) if isinstance(part, KaldiFbank) else ProductPower(part.n_fft)
