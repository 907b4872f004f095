"""The linear head."""

from typing import Any, ClassVar

from torch import Tensor, nn

from avex_serve.models.probes.base import Probe


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
