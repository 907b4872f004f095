"""The attention head."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from avex_serve.models.probes.base import SequenceProbe


class AttentionProbe(SequenceProbe):
    """Self-attention layers as wide as the embedding, each with a residual and a norm."""

    options: ClassVar[dict[str, Any]] = {
        **SequenceProbe.options,
        "num_heads": 8,
        "attention_dim": 512,
        "num_layers": 2,
    }
    without_effect = frozenset({"attention_dim"})
    num_heads: int
    num_layers: int

    def build_encoder(self, width: int) -> int:
        """See `SequenceProbe.build_encoder`."""
        if width % self.num_heads:
            # torch and avex raise this type, with the same first words.
            raise AssertionError(
                f"embed_dim must be divisible by num_heads: the embedding has width {width}, num_heads is "
                f"{self.num_heads}; choose a divisor (an aggregated embedding is a sequence of width 1)"
            )
        self.attention_layers = nn.ModuleList(
            nn.MultiheadAttention(width, self.num_heads, dropout=self.dropout_rate, batch_first=True)
            for _ in range(self.num_layers)
        )
        self.layer_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(self.num_layers))
        return width

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """See `SequenceProbe.encode`."""
        for attention, norm in zip(self.attention_layers, self.layer_norms, strict=True):
            attended, _ = attention(features, features, features, key_padding_mask=padding, need_weights=False)
            features = self.drop(norm(features + attended))
        return features

    def build_positions(self, steps: int, width: int) -> None:
        """Fixed sines and cosines: Vaswani et al., "Attention is all you need" (arXiv 1706.03762), section 3.5."""
        if width % 2 and width > 1:
            raise RuntimeError(
                f"sine positions need an even width, the embedding has {width}; use use_positional_encoding=False"
            )
        position = torch.arange(steps, dtype=torch.float32)[:, None]
        frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
        table = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1)
        table = table.flatten(1)[None, :, :width]  # (1, steps, width), sines at even indices
        self.register_buffer("pos_encoding", table)
