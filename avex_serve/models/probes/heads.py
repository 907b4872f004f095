"""The five heads. Parameters have avex's names and shapes, so heads trained there load strictly."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from avex_serve.models.probes.base import Probe
from avex_serve.models.tracing import is_tracing

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "swish": nn.SiLU,
}
_DEFAULT_POSITIONS = 1000  # steps that positions are made for if max_sequence_length is not set


class LinearProbe(Probe):
    """One linear layer."""

    options: ClassVar[dict[str, Any]] = {}
    takes_sequence = False

    def build_head(self, width: int) -> None:
        """See `Probe.build_head`."""
        self.classifier = nn.Linear(width, self.num_classes)

    def classify(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """See `Probe.classify`."""
        return self.classifier(features)


class MLPProbe(Probe):
    """Linear layers with activations and dropout between them."""

    options: ClassVar[dict[str, Any]] = {"hidden_dims": (512, 256), "dropout_rate": 0.1, "activation": "relu"}
    takes_sequence = False
    hidden_dims: list[int]
    dropout_rate: float
    activation: str

    def build_head(self, width: int) -> None:
        """See `Probe.build_head`."""
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"Unsupported activation: {self.activation}; expected one of {sorted(_ACTIVATIONS)}")
        parts: list[nn.Module] = []
        for hidden in self.hidden_dims:
            parts += [nn.Linear(width, hidden), _ACTIVATIONS[self.activation]()]
            if self.dropout_rate > 0:
                parts.append(nn.Dropout(self.dropout_rate))
            width = hidden
        self.mlp = nn.Sequential(*parts, nn.Linear(width, self.num_classes))

    def classify(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """See `Probe.classify`."""
        return self.mlp(features)


class SequenceProbe(Probe):
    """Shared by the heads that read a sequence: positions, and the mean over time before the classifier."""

    takes_sequence = True
    dropout_rate: float
    max_sequence_length: int | None
    use_positional_encoding: bool
    pos_encoding: Tensor | None

    def build_head(self, width: int) -> None:
        """See `Probe.build_head`."""
        self.dropout = nn.Dropout(self.dropout_rate) if self.dropout_rate > 0 else None
        classifier_width = self.build_encoder(width)
        if self.use_positional_encoding:
            self._build_positions(self.max_sequence_length or _DEFAULT_POSITIONS, width)
        else:
            self.pos_encoding = None
        self.classifier = nn.Linear(classifier_width, self.num_classes)

    def build_encoder(self, width: int) -> int:
        """Build what reads the sequence; return the width of what it puts out."""
        raise NotImplementedError

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, width) → (B, T, encoder width)."""
        raise NotImplementedError

    def classify(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """See `Probe.classify`."""
        if self.pos_encoding is not None:
            steps, longest = features.shape[1], self.pos_encoding.shape[1]
            if not is_tracing() and steps > longest > 1:  # a single position is added to every step, as in avex
                raise RuntimeError(
                    f"a sequence of {steps} steps is longer than the {longest} positions; raise max_sequence_length"
                )
            features = features + self.pos_encoding[:, :steps]
        return self.classifier(self.drop(self.pool(self.encode(features, padding), padding)))

    def drop(self, features: Tensor) -> Tensor:
        """The features after dropout, if there is any."""
        return features if self.dropout is None else self.dropout(features)

    def _build_positions(self, steps: int, width: int) -> None:
        self.pos_encoding = nn.Parameter(torch.randn(1, steps, width))


class LSTMProbe(SequenceProbe):
    """A recurrent network. Like avex's, it reads padded steps too, unless the probe excludes padding."""

    options: ClassVar[dict[str, Any]] = {
        "lstm_hidden_size": 256,
        "num_layers": 2,
        "bidirectional": False,
        "dropout_rate": 0.1,
        "max_sequence_length": None,
        "use_positional_encoding": False,
    }
    lstm_hidden_size: int
    num_layers: int
    bidirectional: bool
    zero_state: Tensor

    def build_encoder(self, width: int) -> int:
        """See `SequenceProbe.build_encoder`."""
        hidden = max((self.max_sequence_length or 4) // 4, self.lstm_hidden_size)  # as in avex
        self.lstm = nn.LSTM(
            width,
            hidden,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout_rate if self.num_layers > 1 else 0.0,
            batch_first=True,
        )
        # The zero state as a buffer: one that is made on the fly would tie a traced graph to its device.
        directions = 2 if self.bidirectional else 1
        self.register_buffer("zero_state", torch.zeros(self.num_layers * directions, 1, hidden), persistent=False)
        return hidden * directions

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """See `SequenceProbe.encode`."""
        if padding is None or not self.exclude_padding:
            zero = self.zero_state.expand(-1, features.shape[0], -1).contiguous()
            return self.lstm(features.contiguous(), (zero, zero))[0]
        lengths = (~padding).sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(features, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=features.shape[1])[0]


class AttentionProbe(SequenceProbe):
    """Self-attention layers, each with its residual and its norm. Its width is the embedding's."""

    options: ClassVar[dict[str, Any]] = {
        "num_heads": 8,
        "attention_dim": 512,
        "num_layers": 2,
        "dropout_rate": 0.1,
        "max_sequence_length": None,
        "use_positional_encoding": False,
    }
    without_effect = frozenset({"attention_dim"})
    num_heads: int
    num_layers: int

    def build_encoder(self, width: int) -> int:
        """See `SequenceProbe.build_encoder`."""
        if width % self.num_heads:
            # The type and the first words are torch's and avex's own.
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

    def _build_positions(self, steps: int, width: int) -> None:
        # Vaswani et al., "Attention is all you need" (arXiv 1706.03762), section 3.5.
        if width % 2 and width > 1:
            raise RuntimeError(
                f"sine positions need an even width, the embedding has {width}; use use_positional_encoding=False"
            )
        position = torch.arange(steps, dtype=torch.float32)[:, None]
        frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
        table = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1)
        self.register_buffer(
            "pos_encoding", table.flatten(1)[None, :, :width]
        )  # (1, steps, width): sines at even places


class TransformerProbe(SequenceProbe):
    """A transformer encoder, post-norm; `attention_dim` is the width of its feed-forward layers."""

    options: ClassVar[dict[str, Any]] = {
        "num_heads": 12,
        "attention_dim": 768,
        "num_layers": 4,
        "dropout_rate": 0.1,
        "max_sequence_length": None,
        "use_positional_encoding": False,
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
        # torch's fast path, which nested tensors belong to, wants an even number of heads.
        even = self.num_heads % 2 == 0
        self.transformer = nn.TransformerEncoder(layer, num_layers=self.num_layers, enable_nested_tensor=even)
        return width

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """See `SequenceProbe.encode`."""
        return self.transformer(features, src_key_padding_mask=padding)
