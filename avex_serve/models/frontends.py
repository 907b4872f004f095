"""Front ends: modules with constant buffers that compute log-mel features of waveforms, and padding masks."""

import contextlib
import math
from typing import Literal

import torch
from torch import Tensor, nn

from avex_serve.configs import AudioConfig
from avex_serve.models.layers import is_tracing

# Added to a mel energy before the logarithm, and to the range that a clip is divided by (avex 1.4, AudioProcessor).
_LOG_OFFSET, _RANGE_OFFSET = 1e-6, 1e-8
# Kaldi floors the mel energies here before the logarithm (float32 epsilon).
_FLOOR = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """Kaldi's log-mel filter bank, batched.

    Per frame: subtract its mean, pre-emphasise (the first sample is its own predecessor), multiply by the window,
    power spectrum, triangular mel filters, logarithm. No padding, no dither, no energy coefficient.
    Source: Kaldi, feat/feature-window.cc and feat/mel-computations.cc; defaults as avex 1.4 uses them for BEATs.

    Attributes:
        power: computes the power spectrum from frames and window. It is a separate module because an exported graph
            computes the spectrum differently.
        fixed_samples: length of the waveforms if all have the same, which makes a graph simpler; else None.
    """

    window: Tensor  # (win_length,)
    mel_fb: Tensor  # (n_fft // 2 + 1, num_mel_bins)

    def __init__(
        self,
        *,
        num_mel_bins: int,
        sample_frequency: float,
        frame_length: float,
        frame_shift: float,
        window: Literal["povey", "hanning"] = "povey",
        in_state: bool = True,
    ) -> None:
        """Build the constant buffers.

        Args:
            num_mel_bins: filters between 20 Hz and half the sample frequency.
            sample_frequency: Hz, which determines window, hop and filters in samples.
            frame_length: ms.
            frame_shift: ms.
            window: Kaldi's ``hanning`` is a symmetric Hann window, ``povey`` that to the power 0.85
                (feature-window.cc).
            in_state: whether window and filters are in the state dict, as in BEATs' checkpoints.
        """
        super().__init__()
        self.win_length = int(sample_frequency * frame_length / 1000)
        self.hop_length = int(sample_frequency * frame_shift / 1000)
        self.n_fft = 1 << (self.win_length - 1).bit_length()
        self.power: nn.Module = FramePower(self.n_fft, preemphasis=0.97)
        self.fixed_samples: int | None = None
        mel = kaldi_mel_filters(self.n_fft, num_mel_bins, sample_frequency, low=20.0)
        hann = torch.hann_window(self.win_length, periodic=False)
        # Some of avex's checkpoints hold these two under these names.
        self.register_buffer("window", hann if window == "hanning" else hann.pow(0.85), persistent=in_state)
        self.register_buffer("mel_fb", mel, persistent=in_state)

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform of that many samples."""
        if not is_tracing() and samples < self.win_length:
            return 0
        return 1 + (samples - self.win_length) // self.hop_length

    def unpadded_frames(self, padding_mask: Tensor) -> Tensor:
        """(B,) int64: number of frames that each clip has alone, from a mask (B, S), True where padded."""
        beyond_first = valid_lengths(padding_mask) - self.win_length
        return 1 + beyond_first.div(self.hop_length, rounding_mode="floor")

    def forward(self, wave: Tensor) -> Tensor:
        """Log-mel features (B, frames, num_mel_bins), float32, of waveforms (B, S).

        Kaldi's own waveforms are in the range of 16-bit integers, which matters only for the floor.
        """
        with full_precision(wave):
            power = self.power(self._frame(precise(wave, self.window)), self.window)  # (B, F, n_fft // 2 + 1)
            return (power @ self.mel_fb).clamp(min=_FLOOR).log()

    def _frame(self, wave: Tensor) -> Tensor:
        samples = wave.shape[-1] if self.fixed_samples is None else self.fixed_samples
        return cut_frames(wave, self.frames(samples), self.win_length, self.hop_length)


class FramePower(nn.Module):
    """Kaldi's power spectrum of a frame: subtract its mean, pre-emphasise, multiply by the window, FFT.

    The log-mel of a nearly empty band is rounding noise of the transform, so only avex's algorithm gives avex's
    numbers there.
    """

    def __init__(self, n_fft: int, preemphasis: float) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.preemphasis = preemphasis

    def forward(self, frames: Tensor, window: Tensor) -> Tensor:
        """(B, F, win_length) → (B, F, n_fft // 2 + 1)."""
        return torch.fft.rfft(self.prepare(frames, window), n=self.n_fft).abs().pow(2.0)

    def prepare(self, frames: Tensor, window: Tensor) -> Tensor:
        """The input of the transform, (…, win_length) → (…, win_length)."""
        return self.emphasise(frames) * window

    def emphasise(self, frames: Tensor) -> Tensor:
        """Subtract the mean of frames (…, win_length) and attenuate their low frequencies."""
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        return frames - self.preemphasis * previous


class EATFrontEnd(nn.Module):
    """EAT's features: Kaldi's filter bank on a centred waveform, padded or cut to one length, then normalised.

    Features of shorter clips are padded with zeros *before* they are normalised, so padding becomes
    ``-mean / (2 std)``. Longer clips are cut at their end. The waveform isn't scaled to 16-bit integers.
    Source: avex 1.4, which follows EAT (Chen et al., arXiv 2401.03497).
    """

    def __init__(self, *, frames: int, mel_bins: int, mean: float, std: float) -> None:
        """Build the filter bank for features (frames, mel_bins): log-mel minus `mean`, divided by twice `std`."""
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
        """Samples that fill all frames. The rest of a longer clip is ignored."""
        return self.fbank.win_length + (self.frames - 1) * self.fbank.hop_length

    def forward(self, wave: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalised log-mel features (B, frames, mel_bins), float32, of waveforms (B, S) in [-1, 1] at 16 kHz.

        With a padding mask (B, S), True where padded, each clip gets the features that it has alone. Raises
        AssertionError, as avex does, for less than one window.
        """
        if not is_tracing() and wave.shape[-1] < self.fbank.win_length:
            raise AssertionError(
                f"{wave.shape[-1]} samples are too few: one frame takes {self.fbank.win_length}; pad the clip"
            )
        wave = precise(wave, self.fbank.window)
        # The filter bank subtracts each frame's mean again. This step only reproduces avex's rounding, which
        # determines nearly empty bands.
        if padding_mask is None:
            wave = wave - wave.mean(dim=-1, keepdim=True)
        else:
            samples = valid_lengths(padding_mask)[:, None]
            wave = wave - wave.masked_fill(padding_mask, 0).sum(dim=-1, keepdim=True) / samples.clamp(min=1)
        features = self.fbank(wave[:, : self.longest_samples])
        # Pad by the largest possible lack, then cut: in a traced graph the number of frames is not a number.
        features = nn.functional.pad(features, (0, 0, 0, self.frames - 1))[:, : self.frames]
        if padding_mask is not None:
            features = features.masked_fill(self.padded_frames(padding_mask)[..., None], 0)
        return (features - self.mean) / (2 * self.std)

    def padded_frames(self, padding_mask: Tensor) -> Tensor:
        """(B, frames) bool: the frames that the clips alone wouldn't have, from a mask (B, S), True where padded."""
        return beyond(self.fbank.unpadded_frames(padding_mask), self.frames)


class AudioProcessor:
    """Applies an `AudioConfig` to waveforms. The names of its attributes are avex's; errors as in `Spectrogram`."""

    def __init__(self, cfg: AudioConfig) -> None:
        self.cfg = cfg
        self.sr = cfg.sample_rate
        self.n_fft = cfg.n_fft
        self.hop_length = cfg.hop_length or cfg.n_fft // 4
        self.win_length = cfg.win_length or cfg.n_fft
        self.window_type = cfg.window
        self.n_mels = cfg.n_mels
        self.representation = cfg.representation
        self.normalize = cfg.normalize
        self.target_length_seconds = cfg.target_length_seconds
        self.window_selection = cfg.window_selection
        self.center = cfg.center
        self.spectrogram = None if cfg.representation == "raw" else Spectrogram(cfg)

    def __call__(self, wave: Tensor) -> Tensor:
        """(B, S) → (B, S) if raw, else (B, F, frames); (S,) counts as (1, S)."""
        wave = wave[None] if wave.ndim == 1 else wave
        return wave if self.spectrogram is None else self.spectrogram(wave)


class Spectrogram(nn.Module):
    """Spectrogram of a clip, with or without mel filters, scaled to [0, 1], batched.

    Power of the short-time Fourier transform, optionally triangular mel filters, logarithm. Then the clip's minimum
    and maximum become 0 and 1. Digital silence is 0 everywhere. Source: avex 1.4 (AudioProcessor), with the filters
    of torchaudio's MelScale and its defaults.

    Attributes:
        power: computes the power spectrum of windowed frames; see `KaldiFbank`.
        fixed_samples: see `KaldiFbank`.
        settings: everything that determines the features, as text.
    """

    window: Tensor  # (n_fft,)
    filters: Tensor | None  # (n_fft // 2 + 1, F), or None without

    def __init__(self, config: AudioConfig) -> None:
        """Build the constant buffers. Raises ValueError for raw audio, or a window longer than the transform."""
        super().__init__()
        if config.representation == "raw":
            raise ValueError(
                "audio_config.representation is 'raw', which is not a spectrogram; set 'mel_spectrogram'"
            )
        self.n_fft = config.n_fft
        self.hop_length = config.hop_length or config.n_fft // 4
        win_length = config.win_length or config.n_fft
        if win_length > self.n_fft:
            raise ValueError(
                f"audio_config has n_fft {self.n_fft} and win_length {win_length}; expected at most n_fft"
            )
        self.center = config.center
        self.reflected = self.n_fft // 2 if self.center else 0  # samples at each end
        self.normalize = config.normalize
        mel = config.representation == "mel_spectrogram"
        bins = f"{config.n_mels} mel bins" if mel else "all bins"
        self.settings = (
            f"{bins} at {config.sample_rate} Hz, n_fft {self.n_fft}, hop {self.hop_length}, {config.window} window "
            f"of {win_length}, center {self.center}, normalize {self.normalize}"
        )
        self.power: nn.Module = Power()
        self.fixed_samples: int | None = None
        window = {"hann": torch.hann_window, "hamming": torch.hamming_window}[config.window](win_length)
        left = (self.n_fft - win_length) // 2  # a shorter window is centred, as in torch.stft
        window = nn.functional.pad(window, (left, self.n_fft - win_length - left))
        filters = htk_mel_filters(self.n_fft, config.n_mels, config.sample_rate) if mel else None
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @property
    def shortest_samples(self) -> int:
        """Samples that make one frame: one more than are reflected at an end, or one window."""
        return self.reflected + 1 if self.center else self.n_fft

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform of that many samples."""
        return 1 + (samples + 2 * self.reflected - self.n_fft) // self.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Features (B, F, frames) of waveforms (B, S) in [-1, 1], in float32."""
        with full_precision(wave):
            power = self.power(self._frame(precise(wave, self.window)) * self.window)  # (B, frames, n_fft // 2 + 1)
            features = (power if self.filters is None else power @ self.filters).transpose(1, 2)  # (B, F, frames)
        if not self.normalize:
            return features
        features = (features + _LOG_OFFSET).log()
        low, high = features.amin(dim=(1, 2), keepdim=True), features.amax(dim=(1, 2), keepdim=True)
        return (features - low) / (high - low + _RANGE_OFFSET)

    def _frame(self, wave: Tensor) -> Tensor:
        samples = wave.shape[-1] if self.fixed_samples is None else self.fixed_samples
        if self.reflected:
            wave = nn.functional.pad(wave, (self.reflected, self.reflected), mode="reflect")
        return cut_frames(wave, self.frames(samples), self.n_fft, self.hop_length)


class Power(nn.Module):
    """Power spectrum of windowed frames, by FFT."""

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, n_fft) → (B, F, n_fft // 2 + 1)."""
        return torch.fft.rfft(frames).abs().pow(2.0)


def full_precision(wave: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, which would change the features. Without autocast no context is added to a graph."""
    kind = wave.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def precise(wave: Tensor, like: Tensor) -> Tensor:
    """The waveform in float32, or in float64 if the module was converted to that; `like` is one of its buffers."""
    return wave.to(torch.promote_types(like.dtype, torch.float32))


def cut_frames(wave: Tensor, count: int, length: int, hop: int) -> Tensor:
    """The first `count` frames (B, count, length) of a waveform (B, S), a hop apart.

    A frame is a few hops in a row, so reshaping and concatenating is enough. `unfold` exports as a gather over every
    sample.
    """
    hops = -(-length // hop)
    wave = nn.functional.pad(wave, (0, hops * hop - length))  # the last hop may be incomplete
    pieces = [wave[:, i * hop : (i + count) * hop].reshape(-1, count, hop) for i in range(hops)]
    return torch.cat(pieces, dim=-1)[..., :length]


def kaldi_mel_filters(n_fft: int, n_mels: int, sample_rate: float, low: float) -> Tensor:
    """Kaldi's triangular mel filters (n_fft // 2 + 1, n_mels) from `low` Hz to half the sample rate.

    The triangles are straight on the mel scale 1127 ln(1 + f/700), not on the frequency axis, and the Nyquist
    bin belongs to none (mel-computations.cc). Computed in float32 as in avex: with narrow filters computed in
    float64, features differ by up to 5e-5.
    """
    bins = torch.arange(n_fft // 2) * (sample_rate / n_fft)  # Hz
    lowest, highest = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (low, sample_rate / 2))
    step = (highest - lowest) / (n_mels + 1)
    number = torch.arange(n_mels)[:, None]  # (n_mels, 1)
    left, centre, right = (lowest + (number + i) * step for i in (0.0, 1.0, 2.0))
    mel = 1127.0 * (1.0 + bins / 700.0).log()
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return nn.functional.pad(triangles, (0, 1)).T.contiguous()


def htk_mel_filters(n_fft: int, n_mels: int, sample_rate: int) -> Tensor:
    """HTK's triangular mel filters (n_fft // 2 + 1, n_mels) from 0 Hz to half the sample rate.

    Each peaks at 1. Corners are evenly spaced on the mel scale 2595 log10(1 + f/700) (The HTK Book, section 5.4),
    the triangles are straight on the frequency axis, as in torchaudio. Computed in float32 as there: with filters
    computed in float64, features differ from avex's by 1e-5, with these not at all.
    """
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]  # Hz
    mels = torch.linspace(0, 2595.0 * math.log10(1.0 + (sample_rate / 2) / 700.0), n_mels + 2)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)  # Hz
    left, centre, right = (edges[i : i + n_mels] for i in range(3))
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return triangles.clamp(min=0)


# -- padding masks: bool, True where padded; clips are padded at their end ---------------------------------------
# Positions are counted with cumsum: arange would tie a traced graph to its device.


def valid_lengths(padding_mask: Tensor) -> Tensor:
    """(B,) int64: samples of each clip up to the last one that is not padded, from a mask (B, S)."""
    samples = torch.ones_like(padding_mask, dtype=torch.int64).cumsum(dim=1)
    return (samples * ~padding_mask.bool()).amax(dim=1)


def beyond(lengths: Tensor, steps: int) -> Tensor:
    """(B, steps) bool: True for the steps after a length (B,)."""
    positions = torch.ones_like(lengths)[:, None].expand(-1, steps).cumsum(dim=1)  # from 1
    return positions > lengths[:, None]
