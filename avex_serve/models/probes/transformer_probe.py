"""The transformer head."""

from typing import Any, ClassVar

from torch import Tensor, nn

from avex_serve.models.probes.base import SequenceProbe


class TransformerProbe(SequenceProbe):
    """A transformer encoder, post-norm; `attention_dim` is the width of its feed-forward layers."""

    options: ClassVar[dict[str, Any]] = {
        **SequenceProbe.options,
        "num_heads": 12,
        "attention_dim": 768,
        "num_layers": 4,
    }
    num_heads: int
    attention_dim: int
    num_layers: int

    def build_encoder(self, width: int) -> int:
        """See `SequenceProbe.build_encoder`."""
        # As in avex: the largest number of heads that divides the width.
        self.num_heads = max(heads for heads in range(1, self.num_heads + 1) if width % heads == 0)
        layer = nn.TransformerEncoderLayer(
            width, self.num_heads, dim_feedforward=self.attention_dim, dropout=self.dropout_rate, batch_first=True
        )
        # torch's fast path, which uses nested tensors, needs an even number of heads.
        even = self.num_heads % 2 == 0
        self.transformer = nn.TransformerEncoder(layer, num_layers=self.num_layers, enable_nested_tensor=even)
        return width

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """See `SequenceProbe.encode`."""
        return self.transformer(features, src_key_padding_mask=padding)
