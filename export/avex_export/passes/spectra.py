"""Power spectra as products with constant matrices, which runtimes are fast at, and how the products get smaller.

The matrices are made in float64. A product is more exact than an FFT in float32 where a band is nearly empty.
"""

import math

import torch
from torch import Tensor, nn

from avex_export.passes.target import Target
from avex_serve.models.frontends import FramePower, KaldiFbank, Spectrogram


def fold_front_end(target: Target) -> bool:
    """See `FoldedFramePower`."""
    parts = [part for part in target.model.modules() if isinstance(part, KaldiFbank)]
    for part in parts:
        assert isinstance(part.power, FramePower)
        part.power = FoldedFramePower(part.power, part.window)
    return bool(parts)


def fold_fourier_transform(target: Target) -> bool:
    """See `FoldedPower`; a transform of odd length has no fold."""
    parts = [part for part in target.model.modules() if isinstance(part, Spectrogram) and part.n_fft % 2 == 0]
    for part in parts:
        fold_spectrogram(part)
    return bool(parts)


def fold_spectrogram(part: Spectrogram) -> None:
    """Fold, in place, a transform of even length."""
    part.power = FoldedPower(part.n_fft)
    order = torch.tensor(folded_bins(part.n_fft))
    # Filters are put into the order of the transform; without any, the transform is put into theirs.
    filters = torch.eye(len(order)) if part.filters is None else part.filters
    part.filters = filters[order]


class ProductFramePower(FramePower):
    """Kaldi's power spectrum of a frame, step by step, and the transform as a product."""

    def __init__(self, fbank: KaldiFbank) -> None:
        power = fbank.power
        assert isinstance(power, FramePower)
        super().__init__(power.n_fft, power.preemphasis)
        self.transform = Transform(*dft_matrices(fbank.win_length, power.n_fft))

    def forward(self, frames: Tensor, window: Tensor) -> Tensor:
        """(B, F, win_length) → (B, F, n_fft // 2 + 1)."""
        return self.transform(self.prepare(frames, window))


class FoldedFramePower(FramePower):
    """Kaldi's power spectrum of a frame with the window in the transform.

    Mean and pre-emphasis are linear in the samples too, but what they take away, a recorder's offset or wind, may be
    thousands of times as large as what it lies over, and would leave its rounding noise behind in the product.
    """

    def __init__(self, power: FramePower, window: Tensor) -> None:
        super().__init__(power.n_fft, power.preemphasis)
        column = window.double()[:, None]
        self.transform = Transform(*(column * matrix for matrix in dft_matrices(len(window), power.n_fft)))

    def forward(self, frames: Tensor, window: Tensor) -> Tensor:
        """(B, F, win_length) → (B, F, n_fft // 2 + 1); the window is in the matrix."""
        return self.transform(self.emphasise(frames))


class ProductPower(nn.Module):
    """Power spectrum of windowed frames by the transform's matrices."""

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        self.transform = Transform(*dft_matrices(n_fft, n_fft))

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, n_fft) → (B, F, n_fft // 2 + 1)."""
        return self.transform(frames)


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

    Cosines are the same for samples n and n_fft - n, sines opposite: so sums and differences of the two take half
    the rows. At frequency n_fft / 2 - k they are those at k, with the sign of every other row turned: so even and
    odd rows apart take half the columns. Each matrix is (about n_fft / 4, n_fft // 4 + 1).
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
        sin[-1] = 0  # sample half belongs to no sine; sin(pi k) is not quite 0 in floating point
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
        mirrored = nn.functional.pad(frames[..., half + 1 :].flip(-1), (1, 1))  # sample n_fft - n beside sample n
        even, odd = first + mirrored, first - mirrored  # what cosines and sines see
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
