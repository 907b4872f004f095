"""The MLP head."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from avex_serve.models.probes.base import Probe

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "swish": nn.SiLU,
}


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
