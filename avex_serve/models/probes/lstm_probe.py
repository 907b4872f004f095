"""The LSTM head."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from avex_serve.models.probes.base import SequenceProbe


class LSTMProbe(SequenceProbe):
    """A recurrent network. As in avex, it reads padded steps too, unless the probe excludes padding."""

    options: ClassVar[dict[str, Any]] = {
        **SequenceProbe.options,
        "lstm_hidden_size": 256,
        "num_layers": 2,
        "bidirectional": False,
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
        # A buffer, since a zero state created during the pass would tie a traced graph to its device.
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
