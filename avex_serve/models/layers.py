"""Layers by name: what a selector means, and how a forward pass hands out its layers."""

import difflib
from collections.abc import Iterable, Sequence

from torch import Tensor

BACKBONE = "backbone"  # the model's own output


def resolve_layers(selectors: Sequence[str | int], layers: Sequence[str], tappable: Iterable[str]) -> list[str]:
    """Layer names for the selectors that a user wrote, without duplicates, in avex's order.

    Args:
        selectors: names, indices into `layers`, ``all`` (appended after the others), ``last_layer``.
        layers: the model's discoverable layers in order.
        tappable: every name that the model can tap.

    Raises:
        TypeError: a bool among the selectors.
        ValueError: no selector, an index out of range, or an unknown name.
    """
    if not selectors:
        raise ValueError("target_layers is empty; name at least one layer, such as 'last_layer'")
    named: list[str] = []
    for selector in selectors:
        if isinstance(selector, bool):
            raise TypeError(f"target_layers holds {selector}: a bool is no layer; use a name or an index")
        named.append(_at(layers, selector) if isinstance(selector, int) else selector)
    if "all" in named:
        named = [name for name in named if name != "all"] + list(layers)
    named = [last_layer(layers) if name == "last_layer" else name for name in named]
    known = set(tappable)
    for name in named:
        if name not in known:
            raise ValueError(f"Layer '{name}' not found in model{_closest(name, known)}")
    return list(dict.fromkeys(named))


def last_layer(layers: Sequence[str]) -> str:
    """The last layer that is not a classification head; if all are heads the last one, as in avex.

    Raises:
        ValueError: the model has no layers.
    """
    for name in reversed(layers):
        if not any(part in name.lower() for part in ("classifier", "head")):
            return name
    if layers:
        return layers[-1]
    raise ValueError("the model has no layers, so there is no last_layer; name a layer")


def _at(layers: Sequence[str], index: int) -> str:
    if not -len(layers) <= index < len(layers):
        raise ValueError(
            f"Layer index {index} is out of range for {len(layers)} layers "
            f"(valid indices: 0..{len(layers) - 1} and negative indices like -1)."
        )
    return layers[index]


def _closest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} See list_model_layers() for the layers of a model."


class Taps:
    """Collects the outputs of the requested layers during a forward pass.

    A pass hands it down to its modules, and they offer their outputs to it. So shared modules hold no state, and a
    pass can stop as soon as every requested layer is there.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self._missing = set(wanted)
        self.found: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> None:
        """Offer the batch-first output of a layer."""
        if name in self._missing:
            self._missing.remove(name)
            self.found[name] = tensor

    def wants(self, *names: str) -> bool:
        """Whether any of these layers is requested and still missing."""
        return not self._missing.isdisjoint(names)

    @property
    def complete(self) -> bool:
        """Whether every requested layer is there."""
        return not self._missing
