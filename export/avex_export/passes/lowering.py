"""Lowering: what every graph needs, whatever passes are applied to it."""

import torch

from avex_export.passes.clips import Clips
from avex_export.passes.spectra import ProductFramePower, ProductPower
from avex_serve.models.frontends import KaldiFbank, Spectrogram
from avex_serve.models.hooks import input_lengths
from avex_serve.models.probes import Probe


def lower(probe: Probe, clips: Clips) -> None:
    """Fix what a traced graph can't find out, and take spectra as products: no runtime has a fast FFT.

    Args:
        probe: a copy, changed in place.
        clips: that the graph will take; of any length, nothing is fixed that depends on it.
    """
    model = probe.base_model
    assert model is not None
    model.fix_batch_axes(clips.samples, probe.layers)
    parts = [part for part in model.modules() if isinstance(part, KaldiFbank | Spectrogram)]
    lengths = input_lengths(probe, torch.zeros(1, clips.samples), parts)
    for part, length in zip(parts, lengths, strict=True):
        part.fixed_samples = None if clips.any_length else length
        part.power = ProductFramePower(part) if isinstance(part, KaldiFbank) else ProductPower(part.n_fft)
