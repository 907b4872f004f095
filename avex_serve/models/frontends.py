"""Front ends: from waveforms to log-mel features, as modules with constant buffers."""

import contextlib
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from avex_serve.configs import AudioConfig
from avex_serve.models.masks import beyond, valid_lengths
from avex_serve.models.tracing import is_tracing

WindowName = Literal["povey", "hanning"]

# Added to a mel energy before the logarithm, and to the range that a clip is divided by (avex 1.4, AudioProcessor).
_LOG_OFFSET, _RANGE_OFFSET = 1e-6, 1e-8
# Kaldi floors the mel energies here before the logarithm (float32 epsilon).
_FLOOR = torch.finfo(torch.float32).eps


class KaldiFbank(nn.Module):
    """Kaldi's log-mel filter bank, batched.

    Per frame: subtract its mean, pre-emphasise (the first sample is its own predecessor), multiply by the window,
    power spectrum, triangular mel filters, logarithm. No padding, no dither, no energy coefficient (so that Kaldi's
    HTK compatibility, which only says where that one stands, makes no difference).
    Source: Kaldi, feat/feature-window.cc and feat/mel-computations.cc; defaults as avex 1.4 uses them for BEATs.

    Attributes:
        power: from frames and window to their power spectrum. It is a module of its own, since an exported graph
            takes the spectrum in another way.
        fixed_samples: length of the waveforms, if all have the same: a graph is simpler where sizes are numbers.
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
        self.power: nn.Module = FramePower(self.n_fft, preemphasis)
        self.fixed_samples: int | None = None
        mel = kaldi_mel_filters(self.n_fft, num_mel_bins, sample_frequency, low_frequency)
        # Some of avex's checkpoints hold these two, under these names.
        self.register_buffer("window", _WINDOWS[window](self.win_length), persistent=in_state)
        self.register_buffer("mel_fb", mel, persistent=in_state)

    def frames(self, samples: int) -> int:
        """How many frames a waveform of that many samples has."""
        if not is_tracing() and samples < self.win_length:
            return 0
        return 1 + (samples - self.win_length) // self.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Log-mel features (B, frames, num_mel_bins), float32, of waveforms (B, S).

        Kaldi's own waveforms are in the range of 16-bit integers, which matters for the floor alone.
        """
        with full_precision(wave):
            power = self.power(self._frame(precise(wave, self.window)), self.window)  # (B, F, n_fft // 2 + 1)
            return (power @ self.mel_fb).clamp(min=_FLOOR).log()

    def _frame(self, wave: Tensor) -> Tensor:
        samples = wave.shape[-1] if self.fixed_samples is None else self.fixed_samples
        return cut_frames(wave, self.frames(samples), self.win_length, self.hop_length)


class FramePower(nn.Module):
    """Kaldi's power spectrum of a frame: without its mean, pre-emphasised, windowed, by FFT.

    The log-mel of a nearly empty band is the rounding noise of the transform, so only the same algorithm gives the
    same numbers as avex there.
    """

    def __init__(self, n_fft: int, preemphasis: float) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.preemphasis = preemphasis

    def forward(self, frames: Tensor, window: Tensor) -> Tensor:
        """(B, F, win_length) → (B, F, n_fft // 2 + 1)."""
        return torch.fft.rfft(self.prepare(frames, window), n=self.n_fft).abs().pow(2.0)

    def prepare(self, frames: Tensor, window: Tensor) -> Tensor:
        """What is transformed: (…, win_length) of the same shape."""
        return self.emphasise(frames) * window

    def emphasise(self, frames: Tensor) -> Tensor:
        """Frames (…, win_length) without their mean, and with less of what is low."""
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        return frames - self.preemphasis * previous


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

    def forward(self, wave: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalised log-mel features (B, frames, mel_bins), float32, of waveforms (B, S) in [-1, 1] at 16 kHz.

        Args:
            wave: the waveforms.
            padding_mask: (B, S) bool, True where padded: to give each clip the features that it has alone.

        Raises:
            AssertionError: less than one window; the type that avex raises.
        """
        if not is_tracing() and wave.shape[-1] < self.fbank.win_length:
            raise AssertionError(
                f"{wave.shape[-1]} samples are too few: one frame takes {self.fbank.win_length}; pad the clip"
            )
        wave = precise(wave, self.fbank.window)
        # Every frame loses its own mean later: this only makes the rounding avex's, as nearly empty bands need it.
        if padding_mask is None:
            wave = wave - wave.mean(dim=-1, keepdim=True)
        else:
            samples = valid_lengths(padding_mask)[:, None]
            wave = wave - wave.masked_fill(padding_mask, 0).sum(dim=-1, keepdim=True) / samples.clamp(min=1)
        features = self.fbank(wave[:, : self.longest_samples])
        # Padded by as much as could lack and then cut: a traced graph can't ask for the number of frames.
        features = nn.functional.pad(features, (0, 0, 0, self.frames - 1))[:, : self.frames]
        if padding_mask is not None:
            features = features.masked_fill(self.padded_frames(padding_mask)[..., None], 0)
        return (features - self.mean) / (2 * self.std)

    def padded_frames(self, padding_mask: Tensor) -> Tensor:
        """Frames (B, frames) bool that the clips alone wouldn't have, of a mask (B, S), True where padded."""
        frames = 1 + (valid_lengths(padding_mask) - self.fbank.win_length).div(
            self.fbank.hop_length, rounding_mode="floor"
        )
        return beyond(frames, self.frames)


class AudioProcessor:
    """What an `AudioConfig` asks for of a waveform, under the name that avex's models have it.

    Attributes:
        cfg: the configuration.
        spectrogram: the module that makes the spectrogram, or None for raw audio.
        sr, n_fft, hop_length, win_length, window_type, n_mels, representation, normalize, target_length_seconds,
        window_selection, center: of the configuration, its defaults filled in.
    """

    def __init__(self, cfg: AudioConfig) -> None:
        """Prepare it; errors as in `Spectrogram`."""
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
        """(B, S) or (S,), which becomes (1, S), to (B, S) if raw, else to (B, F, frames)."""
        wave = wave[None] if wave.ndim == 1 else wave
        return wave if self.spectrogram is None else self.spectrogram(wave)


class Spectrogram(nn.Module):
    """Spectrogram of a clip, with mel filters or without, scaled to [0, 1], batched.

    Power of the short-time Fourier transform, triangular mel filters if asked for, logarithm, then the clip's own
    minimum and maximum become 0 and 1; digital silence is 0 throughout. Source: avex 1.4 (AudioProcessor), which
    takes the filters of torchaudio's MelScale with its defaults.

    Attributes:
        power: from windowed frames to their power spectrum, as `KaldiFbank.power`.
        fixed_samples: see `KaldiFbank`.
        settings: what makes the features, as text.
    """

    window: Tensor  # (n_fft,)
    filters: Tensor | None  # (n_fft // 2 + 1, F), or None without

    def __init__(self, config: AudioConfig) -> None:
        """Build the constant buffers.

        Args:
            config: ``representation``, ``sample_rate``, ``n_fft``, ``hop_length``, ``win_length``, ``window``,
                ``n_mels``, ``normalize`` and ``center`` are what it is made of.

        Raises:
            ValueError: raw audio asked for, or a window longer than the transform.
        """
        super().__init__()
        if config.representation == "raw":
            raise ValueError("audio_config.representation is 'raw', which is no spectrogram; set 'mel_spectrogram'")
        self.n_fft = config.n_fft
        self.hop_length = config.hop_length or config.n_fft // 4
        win_length = config.win_length or config.n_fft
        if win_length > self.n_fft:
            raise ValueError(
                f"audio_config has n_fft {self.n_fft} and win_length {win_length}; expected at most n_fft"
            )
        self.center = config.center
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
        left = (self.n_fft - win_length) // 2  # a shorter window sits in the middle, as in torch.stft
        window = nn.functional.pad(window, (left, self.n_fft - win_length - left))
        filters = htk_mel_filters(self.n_fft, config.n_mels, config.sample_rate) if mel else None
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @property
    def shortest_samples(self) -> int:
        """The least samples that make a frame: more than are reflected at an end, or a window."""
        return self.n_fft // 2 + 1 if self.center else self.n_fft

    def frames(self, samples: int) -> int:
        """How many frames a waveform of that many samples has."""
        reflected = 2 * (self.n_fft // 2) if self.center else 0
        return 1 + (samples + reflected - self.n_fft) // self.hop_length

    def forward(self, wave: Tensor) -> Tensor:
        """Features (B, F, frames) of waveforms (B, S) in [-1, 1], in float32."""
        with full_precision(wave):
            features = self._filtered(self._frame(precise(wave, self.window)) * self.window).transpose(
                1, 2
            )  # (B, F, frames)
        if not self.normalize:
            return features
        features = (features + _LOG_OFFSET).log()
        low, high = features.amin(dim=(1, 2), keepdim=True), features.amax(dim=(1, 2), keepdim=True)
        return (features - low) / (high - low + _RANGE_OFFSET)

    def _frame(self, wave: Tensor) -> Tensor:
        samples = wave.shape[-1] if self.fixed_samples is None else self.fixed_samples
        count, reflected = self.frames(samples), self.n_fft // 2 if self.center else 0
        if reflected:
            wave = nn.functional.pad(wave, (reflected, reflected), mode="reflect")
        return cut_frames(wave, count, self.n_fft, self.hop_length)

    def _filtered(self, frames: Tensor) -> Tensor:
        power = self.power(frames)
        return power if self.filters is None else power @ self.filters


class Power(nn.Module):
    """Power spectrum of windowed frames, by FFT."""

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, n_fft) → (B, F, n_fft // 2 + 1)."""
        return torch.fft.rfft(frames).abs().pow(2.0)


def full_precision(wave: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without autocast, under which features would drift; outside of it no context is needed in a graph."""
    kind = wave.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def precise(wave: Tensor, like: Tensor) -> Tensor:
    """The waveform in float32, or in float64 if the module, of which `like` is a buffer, was brought to that."""
    return wave.to(torch.promote_types(like.dtype, torch.float32))


def cut_frames(wave: Tensor, count: int, length: int, hop: int) -> Tensor:
    """The first `count` frames (B, count, length) of a waveform (B, S), a hop apart.

    A frame is a few hops side by side: reshape and concatenate instead of `unfold`, which exports as a gather over
    every sample.
    """
    hops = -(-length // hop)
    wave = nn.functional.pad(wave, (0, hops * hop - length))  # the last hop of the last frame may begin in it
    pieces = [wave[:, i * hop : (i + count) * hop].reshape(-1, count, hop) for i in range(hops)]
    return torch.cat(pieces, dim=-1)[..., :length]


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
    bin belongs to none (mel-computations.cc). In float32 throughout, as avex makes them: narrow filters made in
    float64 differ by up to 5e-5 in the features.
    """
    bins = torch.arange(n_fft // 2) * (sample_rate / n_fft)  # Hz
    step = (_mel(sample_rate / 2) - _mel(low)) / (n_mels + 1)
    number = torch.arange(n_mels)[:, None]  # (n_mels, 1)
    left, centre, right = (_mel(low) + (number + i) * step for i in (0.0, 1.0, 2.0))
    mel = 1127.0 * (1.0 + bins / 700.0).log()
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    return nn.functional.pad(triangles, (0, 1)).T.contiguous()


def htk_mel_filters(n_fft: int, n_mels: int, sample_rate: int) -> Tensor:
    """HTK's triangular mel filters (n_fft // 2 + 1, n_mels) from 0 Hz to half the sample rate.

    Each peaks at 1. Corners are evenly spaced on the mel scale 2595 log10(1 + f/700) (The HTK Book, section 5.4),
    the triangles are straight on the frequency axis, as in torchaudio. In float32 throughout, as there: with filters
    made in float64, features differ from avex's by 1e-5 instead of not at all.
    """
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]  # Hz
    mels = torch.linspace(0, 2595.0 * math.log10(1.0 + (sample_rate / 2) / 700.0), n_mels + 2)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)  # Hz
    left, centre, right = (edges[i : i + n_mels] for i in range(3))
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return triangles.clamp(min=0)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
