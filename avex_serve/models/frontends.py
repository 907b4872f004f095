"""Front ends: from waveforms to log-mel features, as modules with constant buffers."""

import contextlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from avex_serve.models.tracing import is_tracing

WindowName = Literal["povey", "hanning"]

# Kaldi floors the mel energies here before the logarithm (float32 epsilon).
_FLOOR = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """Kaldi's log-mel filter bank, batched.

    Per frame: subtract its mean, pre-emphasise (the first sample is its own predecessor), multiply by the window,
    power spectrum, triangular mel filters, logarithm. No padding, no dither, no energy coefficient (so that Kaldi's
    HTK compatibility, which only says where that one stands, makes no difference).
    Source: Kaldi, feat/feature-window.cc and feat/mel-computations.cc; defaults as avex 1.4 uses them for BEATs.

    The power spectrum is taken in one of two ways, `spectrum`:

    - ``fft``: what avex does, to the last bits of its rounding. The log-mel of a nearly empty band *is* rounding
      noise, so only the same algorithm gives the same numbers there.
    - ``matmul``: a product with the DFT matrix, for exported graphs: onnxruntime has a fast matrix product, but
      no fast DFT. It is the more exact of the two.
    """

    window: Tensor  # (win_length,)
    mel_fb: Tensor  # (n_fft // 2 + 1, num_mel_bins)
    dft: Tensor  # (win_length, 2 * (n_fft // 2 + 1)): cosines, then negative sines

    def __init__(
        self,
        *,
        num_mel_bins: int,
        sample_frequency: float,
        frame_length: float,
        frame_shift: float,
        preemphasis: float = 0.97,
        low_frequency: float = 20.0,
        window: WindowName = "povey",
        in_state: bool = True,
    ) -> None:
        """Build the constant buffers.

        Args:
            num_mel_bins: filters between `low_frequency` and half the sample frequency.
            sample_frequency: Hz, which fixes window, hop and filters in samples.
            frame_length: ms.
            frame_shift: ms.
            preemphasis: coefficient.
            low_frequency: Hz.
            window: which window.
            in_state: whether window and filters stand in the state dict, as BEATs' checkpoints have them.
        """
        super().__init__()
        self.win_length = int(sample_frequency * frame_length / 1000)
        self.hop_length = int(sample_frequency * frame_shift / 1000)
        self.n_fft = 1 << (self.win_length - 1).bit_length()
        self.preemphasis = preemphasis
        self.spectrum: Literal["fft", "matmul"] = "fft"
        self.fixed_samples: int | None = None  # of a graph for clips of one length
        mel = kaldi_mel_filters(self.n_fft, num_mel_bins, sample_frequency, low_frequency)
        # Some of avex's checkpoints hold these two, under these names.
        self.register_buffer("window", _WINDOWS[window](self.win_length), persistent=in_state)
        self.register_buffer("mel_fb", mel, persistent=in_state)
        self.register_buffer("dft", dft_matrix(self.win_length, self.n_fft), persistent=False)

    def frames(self, samples: int) -> int:
        """How many frames a waveform of that many samples has."""
        return 0 if samples < self.win_length else 1 + (samples - self.win_length) // self.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Log-mel features (B, frames, num_mel_bins), float32, of waveforms (B, S).

        Kaldi's own waveforms are in the range of 16-bit integers, which matters for the floor alone.
        """
        with _full_precision(wave):
            frames = self._frame(wave.float())  # (B, F, win_length)
            frames = frames - frames.mean(dim=-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
            frames = (frames - self.preemphasis * previous) * self.window
            energies = self._power(frames) @ self.mel_fb  # (B, F, num_mel_bins)
            return energies.clamp(min=_FLOOR).log()

    def specialise(self, samples: int) -> None:
        """Fix the length of the waveforms and take the spectrum as a product, for an exported graph."""
        self.spectrum = "matmul"
        self.fixed_samples = samples

    def _frame(self, wave: Tensor) -> Tensor:
        # A frame is a few hops side by side: reshape and concatenate instead of `unfold`, which exports as a
        # gather over every sample.
        samples = wave.shape[-1] if self.fixed_samples is None else self.fixed_samples
        count, hop = self.frames(samples), self.hop_length
        hops = -(-self.win_length // hop)
        wave = nn.functional.pad(wave, (0, max(0, (count + hops - 1) * hop - samples)))
        pieces = [wave[:, i * hop : (i + count) * hop].reshape(-1, count, hop) for i in range(hops)]
        return torch.cat(pieces, dim=-1)[..., : self.win_length]

    def _power(self, frames: Tensor) -> Tensor:
        if self.spectrum == "fft":
            spectrum = torch.fft.rfft(frames, n=self.n_fft)
            return spectrum.abs().pow(2.0)
        real, imaginary = (frames @ self.dft).chunk(2, dim=-1)  # (B, F, n_fft // 2 + 1) each
        return real * real + imaginary * imaginary


class EATFrontEnd(nn.Module):
    """EAT's features: Kaldi's filter bank on a centred waveform, brought to one length, then normalised.

    Features of shorter clips are padded with zeros *before* they are normalised, so that padding is
    ``-mean / (2 std)``; of longer clips the start is heard. The waveform isn't scaled to 16-bit integers.
    Source: avex 1.4, which follows EAT (Chen et al., arXiv 2401.03497).
    """

    def __init__(self, *, frames: int, mel_bins: int, mean: float, std: float) -> None:
        """Build the filter bank.

        Args:
            frames: of the features.
            mel_bins: of the features.
            mean: subtracted from the log-mel features.
            std: they are divided by twice this.
        """
        super().__init__()
        self.frames, self.mean, self.std = frames, mean, std
        self.fbank = KaldiFbank(
            num_mel_bins=mel_bins,
            sample_frequency=16000.0,
            frame_length=25.0,
            frame_shift=10.0,
            window="hanning",
            in_state=False,
        )

    @property
    def longest_samples(self) -> int:
        """Samples that fill all frames: what it hears of a clip at most."""
        return self.fbank.win_length + (self.frames - 1) * self.fbank.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Normalised log-mel features (B, frames, mel_bins), float32, of waveforms (B, S) in [-1, 1] at 16 kHz.

        Raises:
            AssertionError: less than one window; the type that avex raises.
        """
        if not is_tracing() and wave.shape[-1] < self.fbank.win_length:
            raise AssertionError(
                f"{wave.shape[-1]} samples are too few: one frame takes {self.fbank.win_length}; pad the clip"
            )
        wave = wave.float()
        # Every frame loses its own mean later: this only makes the rounding avex's, as nearly empty bands need it.
        wave = wave - wave.mean(dim=-1, keepdim=True)
        features = self.fbank(wave[:, : self.longest_samples])
        # Padded by as much as could lack and then cut: a traced graph can't ask for the number of frames.
        features = nn.functional.pad(features, (0, 0, 0, self.frames - 1))[:, : self.frames]
        return (features - self.mean) / (2 * self.std)

    def specialise(self, samples: int) -> None:
        """Fix the length of the clips, for an exported graph."""
        self.fbank.specialise(min(samples, self.longest_samples))

    def valid_frames(self, padding_mask: Tensor) -> Tensor:
        """Frames (B, frames) bool that hear at least one sample which is not padding.

        Args:
            padding_mask: (B, S) bool, True where padded.
        """
        valid = (~padding_mask[:, : self.longest_samples].bool()).float()[:, None]  # (B, 1, S)
        heard = nn.functional.max_pool1d(valid, self.fbank.win_length, self.fbank.hop_length)[:, 0]
        return nn.functional.pad(heard, (0, self.frames - heard.shape[1])) > 0


def povey_window(length: int) -> Tensor:
    """Kaldi's Povey window (length,): a symmetric Hann window to the power 0.85 (feature-window.cc)."""
    return hanning_window(length).pow(0.85)


def hanning_window(length: int) -> Tensor:
    """The symmetric Hann window (length,), which Kaldi calls hanning (feature-window.cc)."""
    return torch.hann_window(length, periodic=False)


_WINDOWS: dict[WindowName, Callable[[int], Tensor]] = {"povey": povey_window, "hanning": hanning_window}


def kaldi_mel_filters(n_fft: int, n_mels: int, sample_rate: float, low: float) -> Tensor:
    """Kaldi's triangular mel filters (n_fft // 2 + 1, n_mels) from `low` Hz to half the sample rate.

    The triangles are straight on the mel scale 1127 ln(1 + f/700), not on the frequency axis, and the Nyquist
    bin belongs to none (mel-computations.cc).
    """
    bins = torch.arange(n_fft // 2, dtype=torch.float64) * (sample_rate / n_fft)  # Hz
    edges = torch.linspace(_mel(low), _mel(sample_rate / 2), n_mels + 2, dtype=torch.float64)
    left, centre, right = (edges[i : i + n_mels, None] for i in range(3))  # (n_mels, 1)
    mel = 1127.0 * torch.log1p(bins / 700.0)
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return nn.functional.pad(triangles, (0, 1)).T.to(torch.float32).contiguous()


def dft_matrix(length: int, n_fft: int) -> Tensor:
    """(length, 2 * (n_fft // 2 + 1)) float32: the real DFT of `length` samples, zero-padded to n_fft."""
    sample = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[None, :]
    angle = 2 * math.pi * sample * frequency / n_fft
    return torch.cat([torch.cos(angle), -torch.sin(angle)], dim=1).to(torch.float32)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)


def _full_precision(wave: Tensor) -> contextlib.AbstractContextManager[object]:
    # Under autocast the features would drift; outside of it no context is needed in the graph.
    kind = wave.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
