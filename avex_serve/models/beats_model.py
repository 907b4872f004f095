"""BEATs: a transformer over 16 x 16 patches of a log-mel spectrogram.

Architecture: Chen et al., "BEATs: Audio Pre-Training with Acoustic Tokenizers" (arXiv 2212.09058). DeepNorm:
Wang et al. (arXiv 2203.00555). Gated relative position bias: Chi et al., "XLM-E" (arXiv 2106.16138), section 3.
Names and shapes of the parameters are those of avex 1.4, so its checkpoints load strictly.

Tensors are batch first, (B, T, D), with T tokens. Eight tokens make a time step of 160 ms.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from avex_serve.configs import AudioConfig
from avex_serve.models.base_model import ModelBase, refuse_pretrained, require_raw
from avex_serve.models.frontends import KaldiFbank, beyond, precise
from avex_serve.models.layers import BACKBONE, Taps, is_tracing

# Kaldi expects waveforms in the range of 16-bit integers.
_INT16_SCALE = 2**15

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class BEATsConfig(BaseModel):
    """Geometry and flags of BEATs; defaults are those of iter3+ AS2M, self-supervised."""

    model_config = ConfigDict(extra="forbid")

    input_patch_size: int = Field(16, description="frames and mel bins of a patch")
    embed_dim: int = Field(512, description="width of the patch embedding")
    conv_bias: bool = Field(False, description="bias in the patch embedding")

    encoder_layers: int = Field(12, description="transformer blocks")
    encoder_embed_dim: int = Field(768, description="width of the encoder")
    encoder_ffn_embed_dim: int = Field(3072, description="width of the feed-forward layers")
    encoder_attention_heads: int = Field(12, description="attention heads")
    activation_fn: Literal["relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear", "glu"] = Field(
        "gelu", description="activation of the feed-forward layers"
    )

    layer_wise_gradient_decay_ratio: float = Field(1.0, description="factor on the gradients from block to block")
    layer_norm_first: bool = Field(False, description="normalise before each sublayer instead of after it")
    deep_norm: bool = Field(True, description="scale residuals up by (2 * layers) ** 0.25")

    dropout: float = Field(0.1, description="of embeddings, attention output and feed-forward output")
    attention_dropout: float = Field(0.1, description="of attention weights")
    activation_dropout: float = Field(0.0, description="after the feed-forward activation")
    encoder_layerdrop: float = Field(0.05, description="probability to skip a block in training")
    dropout_input: float = Field(0.0, description="of the projected patches")

    conv_pos: int = Field(128, description="kernel of the convolutional position embedding")
    conv_pos_groups: int = Field(16, description="groups of that convolution")

    relative_position_embedding: bool = Field(True, description="bias the attention by relative position")
    num_buckets: int = Field(320, description="buckets of relative positions")
    max_distance: int = Field(800, description="distance in tokens from which all positions share a bucket")
    gru_rel_pos: bool = Field(True, description="gate that bias by the query")

    sample_frequency: float = Field(16000.0, description="Hz that the filter bank assumes")
    num_mel_bins: int = Field(128, description="mel bins")
    frame_length: float = Field(25.0, description="ms")
    frame_shift: float = Field(10.0, description="ms")
    fbank_mean: float = Field(15.41663, description="subtracted from the log-mel features")
    fbank_std: float = Field(6.55582, description="the log-mel features are divided by twice this")

    finetuned_model: bool = Field(False, description="have the AudioSet predictor of a fine-tuned checkpoint")
    predictor_dropout: float = Field(0.0, description="of that predictor, which embeddings don't use")
    predictor_class: int = Field(527, description="classes of that predictor")


# Fields of the fine-tuned checkpoints that differ from the defaults.
_FINE_TUNED = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "finetuned_model": True,
    "layer_wise_gradient_decay_ratio": 0.6,
}

# Fields that an embedding in eval mode doesn't depend on.
_WITHOUT_EFFECT = {
    "layer_wise_gradient_decay_ratio",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "dropout_input",
    "finetuned_model",
    "predictor_dropout",
    "predictor_class",
}


# The parts of a block that can be tapped by name; the empty one is its output.
_BLOCK_PARTS = (
    *(f".self_attn{part}" for part in (".q_proj", ".k_proj", ".v_proj", ".out_proj", "")),
    *(".self_attn_layer_norm", ".fc1", ".fc2", ".final_layer_norm", ""),
)


class GatedLinear(nn.Module):
    """Gated linear unit with a swish gate."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        value, gate = self.linear(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a gated relative position bias."""

    def __init__(self, cfg: BEATsConfig, table: nn.Embedding | None) -> None:
        super().__init__()
        width, self.heads = cfg.encoder_embed_dim, cfg.encoder_attention_heads
        if width % self.heads:
            raise ValueError(f"encoder_embed_dim {width} is not divisible by encoder_attention_heads {self.heads}")
        self.head_dim = width // self.heads
        self.attention_dropout = cfg.attention_dropout
        # All blocks share one table, which is in the state dict of each, as in checkpoints.
        self.relative_attention_bias = table
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.gated = cfg.gru_rel_pos
        if self.gated:
            self.grep_linear = nn.Linear(self.head_dim, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(
        self, x: Tensor, position_bias: Tensor | None, padding: Tensor | None, taps: Taps, name: str
    ) -> Tensor:
        """(B, T, D) → (B, T, D); offers its layers to `taps` under `name`.

        The bias is (1, heads, T, T), before the gate. `padding` is (B, T) bool, True for tokens to ignore.
        """
        projected = {part: getattr(self, part)(x) for part in ("q_proj", "k_proj", "v_proj")}
        for part, output in projected.items():
            taps(f"{name}.{part}", output)
        query, key, value = map(self._split, projected.values())
        bias = None if position_bias is None else self._gate(query) * position_bias  # (B, heads, T, T)
        if padding is not None:
            hidden = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
            hidden = hidden[:, None, None, :]  # (B, 1, 1, T)
            bias = hidden if bias is None else bias + hidden
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.attention_dropout if self.training else 0.0
        )  # (B, heads, T, head_dim)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        taps(f"{name}.out_proj", output)
        taps(name, output)
        return output

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)

    def _gate(self, query: Tensor) -> Tensor | float:
        # Two gates per query, each the sum of four of the eight outputs (XLM-E, equations 6 to 8).
        if not self.gated:
            return 1.0
        gates = self.grep_linear(query).reshape(*query.shape[:3], 2, 4).sum(dim=-1).sigmoid()  # (B, heads, T, 2)
        update, reset = gates.chunk(2, dim=-1)  # (B, heads, T, 1)
        return update * (reset * self.grep_a - 1.0) + 2.0


class Block(nn.Module):
    """A transformer block: attention and feed-forward, each with its residual and its norm."""

    def __init__(self, cfg: BEATsConfig, table: nn.Embedding | None) -> None:
        super().__init__()
        width, hidden = cfg.encoder_embed_dim, cfg.encoder_ffn_embed_dim
        self.norm_first = cfg.layer_norm_first
        self.residual_scale = (2 * cfg.encoder_layers) ** 0.25 if cfg.deep_norm else 1.0
        self.self_attn = SelfAttention(cfg, table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        gated = cfg.activation_fn == "glu"
        self.activation = _ACTIVATIONS["linear" if gated else cfg.activation_fn]
        self.fc1: nn.Module = GatedLinear(width, hidden) if gated else nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.dropout)
        self.activation_dropout = nn.Dropout(cfg.activation_dropout)

    def forward(
        self, x: Tensor, position_bias: Tensor | None, padding: Tensor | None, taps: Taps, name: str
    ) -> Tensor:
        """(B, T, D) → (B, T, D); offers its layers to `taps` under `name`."""
        if self.norm_first:
            normed = self.self_attn_layer_norm(x)
            taps(f"{name}.self_attn_layer_norm", normed)
            x = x + self.dropout(self.self_attn(normed, position_bias, padding, taps, f"{name}.self_attn"))
            normed = self.final_layer_norm(x)
            taps(f"{name}.final_layer_norm", normed)
            x = x + self._feed_forward(normed, taps, name)
        else:
            attended = self.dropout(self.self_attn(x, position_bias, padding, taps, f"{name}.self_attn"))
            x = self.self_attn_layer_norm(self._scaled(x) + attended)
            taps(f"{name}.self_attn_layer_norm", x)
            fed = self._feed_forward(x, taps, name)
            if taps.complete:
                return x
            x = self.final_layer_norm(self._scaled(x) + fed)
            taps(f"{name}.final_layer_norm", x)
        taps(name, x)
        return x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def _feed_forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        hidden = self.fc1(x)
        taps(f"{name}.fc1", hidden)
        fed = self.fc2(self.activation_dropout(self.activation(hidden)))
        taps(f"{name}.fc2", fed)  # before residual and norm, as avex's hook has it
        return self.dropout(fed)


class SamePad(nn.Module):
    """Drops the last step of an even kernel's output, which makes it as long as the input."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.surplus = 1 - kernel_size % 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T + surplus) → (B, D, T)."""
        return x[..., : x.shape[-1] - self.surplus]


class Encoder(nn.Module):
    """Convolutional position embedding and the transformer blocks."""

    def __init__(self, cfg: BEATsConfig) -> None:
        super().__init__()
        width = cfg.encoder_embed_dim
        self.cfg = cfg
        convolution = nn.Conv1d(
            width, width, kernel_size=cfg.conv_pos, padding=cfg.conv_pos // 2, groups=cfg.conv_pos_groups
        )
        nn.init.normal_(convolution.weight, std=math.sqrt(4 / (cfg.conv_pos * width)))
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        self.pos_conv = nn.Sequential(
            parametrizations.weight_norm(convolution, dim=2), SamePad(cfg.conv_pos), nn.GELU()
        )
        table = (
            nn.Embedding(cfg.num_buckets, cfg.encoder_attention_heads) if cfg.relative_position_embedding else None
        )
        self.layers = nn.ModuleList([Block(cfg, table) for _ in range(cfg.encoder_layers)])
        # In an exported copy: from (B, T, D) to the bias of the attention (1, heads, T, T).
        self.baked_position_bias: nn.Module | None = None
        self._initialise(table)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, padding: Tensor | None, taps: Taps, name: str) -> Tensor:
        """(B, T, D) → (B, T, D); stops as soon as `taps` is complete."""
        positions = self.pos_conv(x.transpose(1, 2))  # (B, D, T)
        taps(f"{name}.pos_conv", positions)
        x = x + positions.transpose(1, 2)
        if not self.cfg.layer_norm_first:
            x = self.layer_norm(x)
            taps(f"{name}.layer_norm", x)
        x = self.dropout(x)
        bias = self.position_bias(x) if self.baked_position_bias is None else self.baked_position_bias(x)
        for i, block in enumerate(self.layers):
            layer = f"{name}.layers.{i}"
            x = _shrink_gradient(x, self.cfg.layer_wise_gradient_decay_ratio)
            if not self._dropped(taps, layer):
                x = block(x, bias, padding, taps, layer)
            if taps.complete:
                return x
        if self.cfg.layer_norm_first:
            x = self.layer_norm(x)
            taps(f"{name}.layer_norm", x)
        taps(name, x)
        return x

    def _dropped(self, taps: Taps, layer: str) -> bool:
        # LayerDrop, in training only. A tapped block always runs: its output is needed.
        return (
            self.training
            and not taps.wants(*(f"{layer}{part}" for part in _BLOCK_PARTS))
            and float(torch.rand(())) < self.cfg.encoder_layerdrop
        )

    def position_bias(self, x: Tensor) -> Tensor | None:
        """The bias (1, heads, T, T) of the T positions in x (B, T, D), before the gate; None without one."""
        biases = self.bias_of(relative_distances(x))  # (T, T, heads)
        return None if biases is None else biases.permute(2, 0, 1)[None]

    def bias_of(self, distances: Tensor) -> Tensor | None:
        """The biases (…, heads) of relative positions (…) int64, before the gate; None without any."""
        if not self.layers:
            return None
        block = self.layers[0]
        assert isinstance(block, Block)
        table = block.self_attn.relative_attention_bias
        if table is None:
            return None
        return table(relative_buckets(distances, self.cfg.num_buckets, self.cfg.max_distance))

    def _initialise(self, table: nn.Embedding | None) -> None:
        # BERT's initialisation, and DeepNorm's gains on top (DeepNet, figure 2).
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if table is not None:
            nn.init.normal_(table.weight, std=0.02)
        if not self.cfg.deep_norm:
            return
        beta = (8 * self.cfg.encoder_layers) ** -0.25
        for name, parameter in self.layers.named_parameters():
            if name.endswith((".q_proj.weight", ".k_proj.weight")):
                nn.init.xavier_normal_(parameter)
            elif name.endswith((".v_proj.weight", ".out_proj.weight")) or (".fc" in name and parameter.ndim == 2):
                nn.init.xavier_normal_(parameter, gain=beta)


def relative_distances(x: Tensor) -> Tensor:
    """(B, T, D) → (T, T) int64: the column's position minus the row's."""
    # cumsum instead of arange, which would tie a traced graph to its device.
    position = torch.ones_like(x[0, :, 0], dtype=torch.int64).cumsum(dim=0)
    return position[None, :] - position[:, None]


def relative_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each relative position, as in T5 (Raffel et al., arXiv 1910.10683), bidirectional.

    Half of the buckets are for positions ahead. In each half, the first half has one distance per bucket, and the
    ranges of the others grow logarithmically up to `max_distance`.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, logarithmic) + (distance > 0).long() * half


class BEATs(nn.Module):
    """The backbone: front end, patch embedding and encoder."""

    def __init__(self, cfg: BEATsConfig) -> None:
        super().__init__()
        if cfg.deep_norm and cfg.layer_norm_first:
            raise ValueError("deep_norm and layer_norm_first exclude each other; set one of them to False")
        self.cfg = cfg
        width = cfg.encoder_embed_dim
        self.post_extract_proj = nn.Linear(cfg.embed_dim, width) if cfg.embed_dim != width else None
        self.fbank = KaldiFbank(
            num_mel_bins=cfg.num_mel_bins,
            sample_frequency=cfg.sample_frequency,
            frame_length=cfg.frame_length,
            frame_shift=cfg.frame_shift,
        )
        patch = cfg.input_patch_size
        self.patch_embedding = nn.Conv2d(1, cfg.embed_dim, kernel_size=patch, stride=patch, bias=cfg.conv_bias)
        self.dropout_input = nn.Dropout(cfg.dropout_input)
        self.encoder = Encoder(cfg)
        self.layer_norm = nn.LayerNorm(cfg.embed_dim)
        # Fine-tuned checkpoints have it. Embeddings don't pass through it.
        self.predictor = nn.Linear(width, cfg.predictor_class) if cfg.finetuned_model else None

    @property
    def shortest_samples(self) -> int:
        """Samples of one patch, the shortest clip that the backbone accepts."""
        return self.fbank.win_length + (self.cfg.input_patch_size - 1) * self.fbank.hop_length

    def preprocess(self, wave: Tensor) -> Tensor:
        """Normalised log-mel features (B, frames, mel bins) of a waveform (B, S) in [-1, 1], in float32."""
        features = self.fbank(precise(wave, self.fbank.window) * _INT16_SCALE)
        return (features - self.cfg.fbank_mean) / (2 * self.cfg.fbank_std)

    def forward(self, wave: Tensor, padding: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Token features (B, T, D) of waveforms (B, S) in [-1, 1].

        `padding` is (B, T) bool, True for padded tokens. The pass offers its layers to `taps`, and stops as soon as
        that is complete. Raises RuntimeError for fewer samples than one patch has.
        """
        if not is_tracing() and wave.shape[-1] < self.shortest_samples:
            raise RuntimeError(
                f"{wave.shape[-1]} samples are too few: one patch takes {self.shortest_samples}; pad the clip"
            )
        name, taps = BACKBONE, Taps([BACKBONE]) if taps is None else taps
        patches = self.patch_embedding(self.preprocess(wave)[:, None])  # (B, E, time, frequency)
        taps(f"{name}.patch_embedding", patches)
        normed = self.layer_norm(patches.flatten(2).transpose(1, 2))  # (B, T, E): all frequencies of a time step
        projected = normed if self.post_extract_proj is None else self.post_extract_proj(normed)
        x = self.dropout_input(projected)
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        taps(f"{name}.dropout_input", x)
        # avex zeroes padded tokens in place, so its hooks hold zeros there too. In training, dropout creates a new
        # tensor, and the hooks hold the one before it.
        held = projected if self.training and self.dropout_input.p > 0 else x
        taps(f"{name}.layer_norm", held if self.post_extract_proj is None else normed)
        taps(f"{name}.post_extract_proj", held)
        if not taps.complete:
            x = self.encoder(x, padding, taps, f"{name}.encoder")
        taps(name, x)
        return x

    def token_mask(self, padding_mask: Tensor, samples: int) -> Tensor:
        """The mask (B, S) converted to tokens (B, T) by avex's rule: a token is padded if all of its samples are.

        First to frames (S // frames samples each), then to tokens (frames // tokens each), without remainders.
        Raises ValueError for a mask of another length than the waveform.
        """
        if not is_tracing() and (padding_mask.ndim != 2 or padding_mask.shape[1] != samples):
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}; expected (batch, {samples})")
        frames = _all_of_groups(padding_mask.bool(), self.fbank.frames(samples))
        return _all_of_groups(frames, self.tokens(samples))

    def tokens(self, samples: int) -> int:
        """Number of tokens of a waveform of that many samples."""
        patch = self.cfg.input_patch_size
        return (self.fbank.frames(samples) // patch) * (self.cfg.num_mel_bins // patch)


class BEATsModel(ModelBase):
    """BEATs as a model: waveform to token features, or to logits if it has a classifier.

    Discoverable layers: ``backbone.post_extract_proj`` and ``backbone.encoder.layers.{i}.fc2``. `tappable_layers`
    has the names of all others: the parts of each block (its output is ``backbone.encoder.layers.{i}``), of the
    encoder and of the patch embedding; ``backbone`` and ``backbone.encoder`` are the output.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        device: str = "cpu",
        audio_config: AudioConfig | None = None,
        return_features_only: bool = False,
        use_naturelm: bool = False,
        fine_tuned: bool = False,
        init_config: dict[str, Any] | None = None,
    ) -> None:
        """Build it with random weights.

        Args:
            num_classes: of the classifier; None: no classifier.
            pretrained: must be False: weights come from `load_model`.
            device: where to put it.
            audio_config: must have the raw representation.
            return_features_only: have no classifier.
            use_naturelm: clamp the waveform to [-1, 1] first.
            fine_tuned: without `init_config`, use the configuration of the fine-tuned checkpoints, with a predictor.
            init_config: fields of `BEATsConfig`.

        Raises:
            ValueError: an unsuitable audio_config or init_config.
        """
        super().__init__(device=device, audio_config=audio_config)
        refuse_pretrained(pretrained)
        require_raw(audio_config, "BEATs")
        if init_config is None:
            init_config = _FINE_TUNED if fine_tuned else {"dropout_input": 0.1, "finetuned_model": use_naturelm}
        cfg = BEATsConfig(**init_config)
        self.use_naturelm = use_naturelm
        self.backbone = BEATs(cfg)
        features_only = return_features_only or num_classes is None
        self.classifier = None if features_only else nn.Linear(cfg.encoder_embed_dim, num_classes or 0)
        self.to(device)

    @property
    def embedding_settings(self) -> str:
        """See `ModelBase.embedding_settings`."""
        clamped = "clamped" if self.use_naturelm else "as it is"
        return f"{self.backbone.cfg.model_dump_json(exclude=_WITHOUT_EFFECT)} of the waveform {clamped}\n"

    @property
    def shortest_samples(self) -> int:
        """See `ModelBase.shortest_samples`: one patch."""
        return self.backbone.shortest_samples

    def get_model_layers(self) -> list[str]:
        """See `ModelBase.get_model_layers`."""
        first = [] if self.backbone.post_extract_proj is None else ["backbone.post_extract_proj"]
        return first + [f"{block}.fc2" for block in self._blocks()]

    def tappable_layers(self) -> list[str]:
        """See `ModelBase.tappable_layers`."""
        first = ["post_extract_proj"] if self.backbone.post_extract_proj is not None else []
        parts = ["patch_embedding", "layer_norm", *first, "dropout_input", "encoder.pos_conv", "encoder.layer_norm"]
        blocks = [f"{block}{part}" for block in self._blocks() for part in _BLOCK_PARTS]
        return [*(f"backbone.{part}" for part in parts), *blocks, "backbone.encoder", BACKBONE]

    def taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """See `ModelBase.taps`."""
        taps = Taps(layers)
        wave = self.process_audio(wave)
        padding = None
        if padding_mask is not None:
            padding = self.backbone.token_mask(padding_mask, wave.shape[-1])  # also checks the mask
            padding = self.token_mask(padding_mask, padding.shape[1]) if as_if_alone else padding
        self.backbone(wave, padding, taps)
        return taps.found

    def token_mask(self, padding_mask: Tensor, tokens: int) -> Tensor:
        """See `ModelBase.token_mask`. A clip shorter than one patch keeps its first time step."""
        cfg = self.backbone.cfg
        frames = self.backbone.fbank.unpadded_frames(padding_mask)
        steps = frames.div(cfg.input_patch_size, rounding_mode="floor").clamp(min=1)
        return beyond(steps * (cfg.num_mel_bins // cfg.input_patch_size), tokens)

    def process_audio(self, x: Tensor) -> Tensor:
        """See `ModelBase.process_audio`; with `use_naturelm` the waveform is clamped to [-1, 1]."""
        wave = self._waveform(x)
        return wave.clamp(-1.0, 1.0) if self.use_naturelm else wave

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Token features (B, T, D), or logits (B, classes) from their mean over the unpadded tokens.

        Args:
            x: (B, S) in [-1, 1] at the model's sample rate.
            padding_mask: (B, S) bool, True where padded.

        Raises:
            ValueError: a mask of another length than the waveform.
            RuntimeError: fewer samples than one patch has.
        """
        wave = self.process_audio(x)
        padding = None if padding_mask is None else self.backbone.token_mask(padding_mask, wave.shape[-1])
        features = self.backbone(wave, padding)
        if self.classifier is None:
            return features
        if padding is None:
            return self.classifier(features.mean(dim=1))
        valid = (~padding).sum(dim=1, keepdim=True).clamp(min=1)
        return self.classifier(features.masked_fill(padding[..., None], 0).sum(dim=1) / valid)

    def _blocks(self) -> list[str]:
        return [f"backbone.encoder.layers.{i}" for i in range(len(self.backbone.encoder.layers))]


def _all_of_groups(mask: Tensor, groups: int) -> Tensor:
    size = mask.shape[1] // groups
    return mask[:, : groups * size].reshape(-1, groups, size).all(dim=-1)


def _shrink_gradient(x: Tensor, ratio: float) -> Tensor:
    # The value stays exactly x; only the gradient is scaled.
    if ratio == 1.0 or not x.requires_grad:
        return x
    held = x.detach()
    return held + ratio * (x - held)


Model = BEATsModel  # avex's name
