"""Front ends of all backbones: power spectra as products with constant matrices, and smaller products.

No runtime has a fast FFT. The matrices are computed in float64. In nearly empty bands a product is more exact than
an FFT in float32.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from avex_export.architectures.base import Pass, Rewrite, Target
from avex_serve.models.frontends import FramePower, KaldiFbank, Spectrogram


def front_ends(model: nn.Module) -> list[KaldiFbank | Spectrogram]:
    """The modules of a backbone that compute features from waveforms."""
    return [part for part in model.modules() if isinstance(part, KaldiFbank | Spectrogram)]


def use_products(part: KaldiFbank | Spectrogram, *, folded: bool = False) -> None:
    """Replace, in place, the FFT by products; if folded, by the smaller ones of the passes below."""
    if isinstance(part, KaldiFbank):
        assert isinstance(part.power, FramePower)
        part.power = ProductFramePower(part.power, part.window, folded=folded)
    elif folded:
        part.power = FoldedPower(part.n_fft)
        order = torch.tensor(folded_bins(part.n_fft))
        # Filters take the order of the transform. Without filters, the identity puts the bins in order.
        part.filters = (torch.eye(len(order)) if part.filters is None else part.filters)[order]
    else:
        part.power = Transform(*dft_matrices(part.n_fft, part.n_fft))


def _fold(target: Target, kind: type[nn.Module]) -> bool:
    # A transform of odd length has no fold. Kaldi's length is a power of two.
    parts = [part for part in front_ends(target.model) if isinstance(part, kind) and part.n_fft % 2 == 0]
    for part in parts:
        use_products(part, folded=True)
    return bool(parts)


FRONT_END = Pass("front-end", "fold the window of Kaldi's frames into the DFT's matrix")
FOURIER = Pass("fourier", "fold the real DFT of a spectrogram four ways by its symmetries")
FRONT_ENDS: Mapping[Pass, Rewrite] = {
    FRONT_END: lambda target: _fold(target, KaldiFbank),
    FOURIER: lambda target: _fold(target, Spectrogram),
}


class ProductFramePower(FramePower):
    """Kaldi's power spectrum of a frame, with the transform as a product and, if folded, the window in its matrices.

    Mean and pre-emphasis are linear too, but are never folded. They remove a recorder's offset or wind, which may be
    thousands of times larger than the signal, and a product would keep the rounding noise of these.
    """

    def __init__(self, power: FramePower, window: Tensor, *, folded: bool) -> None:
        super().__init__(power.n_fft, power.preemphasis)
        self.folded = folded
        column = window.double()[:, None] if folded else 1.0
        self.transform = Transform(*(column * matrix for matrix in dft_matrices(len(window), power.n_fft)))

    def forward(self, frames: Tensor, window: Tensor) -> Tensor:
        """(B, F, win_length) → (B, F, n_fft // 2 + 1)."""
        return self.transform(self.emphasise(frames) if self.folded else self.prepare(frames, window))


class Transform(nn.Module):
    """Squared magnitude of a linear transform with two matrices, of cosines and of sines, (N, F) each."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, cosines: Tensor, sines: Tensor) -> None:
        super().__init__()
        self.register_buffer("cosines", cosines.float())
        self.register_buffer("sines", sines.float())

    def forward(self, frames: Tensor) -> Tensor:
        """(…, N) → (…, F)."""
        return (frames @ self.cosines).square() + (frames @ self.sines).square()


class FoldedPower(nn.Module):
    """Power spectrum of windowed frames of even length, by four products that take a quarter of the work.

    Samples n and n_fft - n have equal cosines and opposite sines, so sums and differences of the two need half the
    rows. Frequencies k and n_fft / 2 - k differ only in the sign of every other row, so separate products of even
    and odd rows need half the columns. Each matrix is (about n_fft / 4, n_fft // 4 + 1).
    """

    cos_even: Tensor
    cos_odd: Tensor
    sin_even: Tensor
    sin_odd: Tensor

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        self.nyquist = half = n_fft // 2
        sample = torch.arange(half + 1, dtype=torch.float64)[:, None]
        angle = 2 * math.pi * sample * torch.arange(half // 2 + 1, dtype=torch.float64) / n_fft
        cos, sin = angle.cos().float(), angle.sin().float()
        sin[-1] = 0  # sin(pi k), which is not exactly 0 in floating point
        for name, rows in {
            "cos_even": cos[::2],
            "cos_odd": cos[1::2],
            "sin_even": sin[::2],
            "sin_odd": sin[1::2],
        }.items():
            self.register_buffer(name, rows.contiguous())

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, n_fft) → (B, F, n_fft // 2 + 1), frequencies in the order of `folded_bins`."""
        half = self.nyquist
        first = frames[..., : half + 1]  # samples 0 to half
        mirrored = nn.functional.pad(frames[..., half + 1 :].flip(-1), (1, 1))  # sample n_fft - n at place n
        even, odd = first + mirrored, first - mirrored  # the inputs of cosines and of sines
        cosines = even[..., ::2] @ self.cos_even, even[..., 1::2] @ self.cos_odd
        sines = odd[..., 1::2] @ self.sin_odd, odd[..., ::2] @ self.sin_even
        low = (cosines[0] + cosines[1]).square() + (sines[0] + sines[1]).square()  # (B, F, n_fft // 4 + 1)
        high = (cosines[0] - cosines[1]).square() + (sines[0] - sines[1]).square()
        return torch.cat([low, high[..., : half - half // 2]], dim=-1)


def folded_bins(n_fft: int) -> list[int]:
    """Frequencies in the order of `FoldedPower`: up to a quarter of n_fft, then from half of it down."""
    half = n_fft // 2
    return [*range(half // 2 + 1), *range(half, half // 2, -1)]


def dft_matrices(length: int, n_fft: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, n_fft // 2 + 1) float64: the real DFT of `length` samples, zero-padded to n_fft."""
    sample = torch.arange(length, dtype=torch.float64)[:, None]
    angle = 2 * math.pi * sample * torch.arange(n_fft // 2 + 1, dtype=torch.float64) / n_fft
    return torch.cos(angle), torch.sin(angle)
