"""EAT: a vision transformer over 16 x 16 patches of a log-mel spectrogram, with a class token.

Architecture: Chen et al., "EAT: Self-Supervised Pre-Training with Efficient Audio Transformer" (arXiv 2401.03497).
Its blocks are those of data2vec 2.0 (Baevski et al., arXiv 2212.07525), normalised after each residual. Names and
shapes of the parameters are those of avex 1.4, so its checkpoints load strictly.

Tensors are batch first, (B, T, D), with T tokens: first the class token, then eight tokens per time step of 160 ms.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from avex_serve.configs import AudioConfig
from avex_serve.models.base_model import ModelBase, require_raw
from avex_serve.models.frontends import EATFrontEnd
from avex_serve.models.layers import BACKBONE, Taps

logger = logging.getLogger(__name__)

# Frames and mel bins of a patch, mel bins, and the time steps with positions in checkpoints. Source: EAT.
_PATCH = 16
_MEL_BINS = 128
_TIME_STEPS = 768
_BANDS = _MEL_BINS // _PATCH  # patches per time step

_EPS = 1e-6  # of every layer norm. Source: EAT

# avex 1.4 computes with these two, although its YAML files name others. Heads trained with avex expect them.
_NORM_MEAN = -4.268
_NORM_STD = 4.569

# The parts of a block that can be tapped, in the order in which they are computed.
_ATTENTION = (".attn.qkv", ".attn.proj", ".attn")
_BLOCK_PARTS = (*_ATTENTION, ".norm1", ".mlp.fc1", ".mlp.act", ".mlp.fc2", ".mlp", ".norm2", "")
_FIRST_PARTS = ("local_encoder.proj", "local_encoder", "pre_norm")


class EATConfig(BaseModel):
    """Geometry of EAT; defaults are those of the base size."""

    model_config = ConfigDict(extra="forbid")

    embed_dim: int = Field(768, gt=0, multiple_of=4, description="width")
    depth: int = Field(12, gt=0, description="transformer blocks")
    num_heads: int = Field(12, gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the feed-forward layers, relative to embed_dim")
    target_length: int = Field(
        1024,
        ge=_PATCH,
        le=_PATCH * _TIME_STEPS,
        multiple_of=_PATCH,
        description="frames of 10 ms that a clip is padded or cut to",
    )

    @property
    def patches(self) -> int:
        """Number of patches of a clip."""
        return self.target_length // _PATCH * _BANDS


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        if cfg.embed_dim % cfg.num_heads:
            raise ValueError(f"embed_dim {cfg.embed_dim} is not divisible by num_heads {cfg.num_heads}")
        self.heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, T, D) → (B, T, D); offers its layers to `taps` under `name`."""
        qkv = self.qkv(x)  # (B, T, 3 * D)
        taps(f"{name}.qkv", qkv)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, T, head_dim)
        projected = self.proj(attended.transpose(1, 2).flatten(2))
        taps(f"{name}.proj", projected)  # before the residual, as avex's hook has it
        taps(name, projected)
        return projected


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        hidden = int(cfg.embed_dim * cfg.mlp_ratio)
        self.fc1 = nn.Linear(cfg.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, cfg.embed_dim)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, T, D) → (B, T, D); offers its layers to `taps` under `name`."""
        hidden = self.fc1(x)
        taps(f"{name}.fc1", hidden)
        hidden = F.gelu(hidden)
        taps(f"{name}.act", hidden)
        x = self.fc2(hidden)
        taps(f"{name}.fc2", x)
        taps(name, x)
        return x


class Block(nn.Module):
    """A transformer block: attention and feed-forward, each followed by its residual and its norm."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.embed_dim, eps=_EPS)
        self.attn = SelfAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.embed_dim, eps=_EPS)
        self.mlp = FeedForward(cfg)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, T, D) → (B, T, D); offers its layers to `taps` under `name` and stops as soon as that is complete."""
        x = x + self.attn(x, taps, f"{name}.attn")
        if taps.complete:
            return x
        x = self.norm1(x)
        taps(f"{name}.norm1", x)
        x = self.norm2(x + self.mlp(x, taps, f"{name}.mlp"))
        taps(f"{name}.norm2", x)
        taps(name, x)
        return x


class PatchEmbedding(nn.Module):
    """Embeds each patch of a spectrogram by one linear map."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, cfg.embed_dim, kernel_size=_PATCH, stride=_PATCH)

    def forward(self, spectrogram: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, frames, mel bins) → (B, patches, D): all frequencies of a time step, then the next step.

        Offers its layers to `taps` under `name`.
        """
        projected = self.proj(spectrogram[:, None])  # (B, D, time steps, bands)
        taps(f"{name}.proj", projected)
        patches = projected.flatten(2).transpose(1, 2)
        taps(name, patches)
        return patches


class FixedPositions(nn.Module):
    """The positions of the patches. They aren't learned, but are among the parameters, as in checkpoints."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(sincos_positions(_TIME_STEPS, _BANDS, cfg.embed_dim), requires_grad=False)

    def forward(self, patches: int) -> Tensor:
        """(1, patches, D)."""
        return self.positions[:, :patches]


class EAT(nn.Module):
    """The transformer, from spectrogram to tokens."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        self.patches = cfg.patches
        self.extra_tokens = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))
        self.local_encoder = PatchEmbedding(cfg)
        self.fixed_positional_encoder = FixedPositions(cfg)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        self.pre_norm = nn.LayerNorm(cfg.embed_dim, eps=_EPS)
        self._initialise()

    def forward(self, spectrogram: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, frames, mel bins) → (B, T, D); offers its layers to `taps` and stops as soon as that is complete."""
        patches = self.local_encoder(spectrogram, taps, f"{name}.local_encoder")
        x = patches + self.fixed_positional_encoder(self.patches)
        # The class token has no position.
        x = torch.cat([self.extra_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pre_norm(x)
        taps(f"{name}.pre_norm", x)
        for i, block in enumerate(self.blocks):
            if taps.complete:
                return x
            x = block(x, taps, f"{name}.blocks.{i}")
        return x

    def _initialise(self) -> None:
        # As in ViT and data2vec 2.0: a narrow normal distribution, no biases.
        nn.init.normal_(self.extra_tokens, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """The ``backbone`` of checkpoints: the transformer, under the name ``model``."""

    def __init__(self, cfg: EATConfig) -> None:
        super().__init__()
        self.model = EAT(cfg)

    def forward(self, spectrogram: Tensor, taps: Taps | None = None) -> Tensor:
        """(B, frames, mel bins) → (B, T, D); offers its layers to `taps` and stops as soon as that is complete."""
        taps = Taps([BACKBONE]) if taps is None else taps
        x = self.model(spectrogram, taps, f"{BACKBONE}.model")
        taps(f"{BACKBONE}.model", x)
        taps(BACKBONE, x)
        return x


def sincos_positions(steps: int, bands: int, width: int) -> Tensor:
    """Fixed 2-D positions (1, steps * bands, width), all bands of a time step side by side.

    The first half of the channels encodes the band, the second half the time step. In each half, sines come before
    cosines, at frequencies from 1 down to 1e-4. Source: EAT, after He et al., "Masked
    Autoencoders" (arXiv 2111.06377).
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    step, band = torch.meshgrid(
        torch.arange(steps, dtype=torch.float64), torch.arange(bands, dtype=torch.float64), indexing="ij"
    )
    angles = [position.reshape(-1, 1) * frequency for position in (band, step)]  # (steps * bands, width // 4) each
    parts = [function(angle) for angle in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1)[None].float()


class EATModel(ModelBase):
    """EAT as a model: waveform to token features, or to logits if it has a classifier.

    Every clip is padded or cut to 10.24 s and has 513 tokens. As in avex, a padding mask doesn't change the tokens.

    Discoverable layers: ``backbone.model.blocks.{i}.attn.proj``. `tappable_layers` has the names of all others: the
    parts of each block (its output is ``backbone.model.blocks.{i}``) and of the patch embedding; ``backbone`` and
    ``backbone.model`` are the output.
    """

    fills_clips: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        device: str = "cpu",
        audio_config: AudioConfig | None = None,
        return_features_only: bool = False,
        init_config: dict[str, Any] | None = None,
        eat_cfg: dict[str, Any] | None = None,
        eat_norm_mean: float = _NORM_MEAN,
        eat_norm_std: float = _NORM_STD,
    ) -> None:
        """Build it with random weights.

        Args:
            num_classes: of the classifier; None: no classifier.
            device: where to put it.
            audio_config: must have the raw representation.
            return_features_only: have no classifier.
            init_config: fields of `EATConfig`.
            eat_cfg: the same, under avex's name.
            eat_norm_mean: see `ModelSpec`.
            eat_norm_std: see `ModelSpec`.

        Raises:
            ValueError: an unsuitable audio_config or geometry.
        """
        super().__init__(device=device, audio_config=audio_config)
        require_raw(audio_config, "EAT")
        if init_config and eat_cfg and init_config != eat_cfg:
            raise ValueError(f"init_config {init_config} and eat_cfg {eat_cfg} differ; give the geometry once")
        if (eat_norm_mean, eat_norm_std) != (_NORM_MEAN, _NORM_STD):
            logger.warning(
                "EAT is normalised with %s and %s from the spec. avex ignores these fields and computes with %s and "
                "%s: leave them out for heads that were trained with avex",
                *(eat_norm_mean, eat_norm_std, _NORM_MEAN, _NORM_STD),
            )
        self.cfg = cfg = EATConfig(**(init_config or eat_cfg or {}))
        self.front_end = EATFrontEnd(
            frames=cfg.target_length, mel_bins=_MEL_BINS, mean=eat_norm_mean, std=eat_norm_std
        )
        self.backbone = Backbone(cfg)
        features_only = return_features_only or num_classes is None
        self.classifier = None if features_only else nn.Linear(cfg.embed_dim, num_classes or 0)
        self.to(device)

    @property
    def embedding_settings(self) -> str:
        """See `ModelBase.embedding_settings`."""
        return f"{self.cfg.model_dump_json()} normalised by {self.front_end.mean} {self.front_end.std}\n"

    @property
    def clip_samples(self) -> int:
        """Samples of a clip, from the audio configuration; without a length there, the most that EAT uses."""
        if self.audio_config is None or self.audio_config.target_length_seconds is None:
            return self.front_end.longest_samples
        return super().clip_samples

    @property
    def shortest_samples(self) -> int:
        """See `ModelBase.shortest_samples`: one frame."""
        return self.front_end.fbank.win_length

    def get_model_layers(self) -> list[str]:
        """See `ModelBase.get_model_layers`."""
        return [f"{block}.attn.proj" for block in self._blocks()]

    def tappable_layers(self) -> list[str]:
        """See `ModelBase.tappable_layers`."""
        parts = [f"{block}{part}" for block in self._blocks() for part in _BLOCK_PARTS]
        first = [f"backbone.model.{part}" for part in _FIRST_PARTS]
        return [*first, *parts, "backbone.model", BACKBONE]

    def taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """See `ModelBase.taps`; the mask has no effect unless `as_if_alone`."""
        taps = Taps(layers)
        wave = self._waveform(wave)
        self.backbone(self.front_end(wave, padding_mask if as_if_alone else None), taps)
        return taps.found

    def token_mask(self, padding_mask: Tensor, tokens: int) -> Tensor:
        """See `ModelBase.token_mask`. A token is padded if all of its frames are padding or beyond the clip.

        The class token is never padded.
        """
        padded = self.front_end.padded_frames(padding_mask)  # (B, frames)
        padded = padded.reshape(padded.shape[0], -1, _PATCH).all(dim=-1)  # (B, time steps)
        return F.pad(padded.repeat_interleave(_BANDS, dim=1), (1, 0), value=False)

    def process_audio(self, x: Tensor) -> Tensor:
        """Normalised log-mel features (B, frames, mel bins) of waveforms (B, S) or (S,); errors as in `forward`."""
        return self.front_end(self._waveform(x))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Token features (B, T, D), or logits (B, classes) from the class token.

        Args:
            x: (B, S) in [-1, 1] at 16 kHz.
            padding_mask: has no effect, as in avex.

        Raises:
            ValueError: no audio.
            AssertionError: less than one frame.
        """
        features = self.backbone(self.process_audio(x))
        return features if self.classifier is None else self.classifier(features[:, 0])

    def _blocks(self) -> list[str]:
        return [f"backbone.model.blocks.{i}" for i in range(len(self.backbone.model.blocks))]


EATHFModel = EATModel  # avex's names
Model = EATModel
