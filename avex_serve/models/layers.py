"""Layers by name: what a selector means, and the forward passes that hand out layers.

The architectures here offer their layers to `Taps`. For any other module `tap_by_hooks` captures them. Only this
module registers hooks. It removes them within the same call, so no state stays on a module that several probes
share. The one exception is `capture`, for models written for avex that handle hooks themselves.
"""

import contextlib
import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BACKBONE = "backbone"  # the model's own output


def resolve_layers(selectors: Sequence[str | int], layers: Sequence[str], tappable: Iterable[str]) -> list[str]:
    """Layer names for the selectors that a user wrote, without duplicates, in avex's order.

    A selector is a tappable name, an index into `layers`, ``all`` (appended after the others) or ``last_layer``.

    Raises:
        TypeError: a bool among the selectors.
        ValueError: no selector, an index out of range, or an unknown name.
    """
    if not selectors:
        raise ValueError("target_layers is empty; name at least one layer, such as 'last_layer'")
    named: list[str] = []
    for selector in selectors:
        if isinstance(selector, bool):
            raise TypeError(f"target_layers holds {selector}: a bool is not a layer; use a name or an index")
        if isinstance(selector, int):
            if not -len(layers) <= selector < len(layers):
                raise ValueError(
                    f"Layer index {selector} is out of range for {len(layers)} layers "
                    f"(valid indices: 0..{len(layers) - 1} and negative indices like -1)."
                )
            selector = layers[selector]
        named.append(selector)
    if "all" in named:
        named = [name for name in named if name != "all"] + list(layers)
    named = [last_layer(layers) if name == "last_layer" else name for name in named]
    known = set(tappable)
    for name in named:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(
                f"Layer '{name}' not found in model{hint} See list_model_layers() for the layers of a model."
            )
    return list(dict.fromkeys(named))


def last_layer(layers: Sequence[str]) -> str:
    """The last layer that is not a classification head; if all are heads the last one, as in avex."""
    if not layers:
        raise ValueError("the model has no layers, so there is no last_layer; name a layer")
    others = [name for name in layers if "classifier" not in name.lower() and "head" not in name.lower()]
    return (others or layers)[-1]


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


# -- passes of any module ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode and without gradients. Afterwards each part has its own mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def is_tracing() -> bool:
    """Whether torch.jit.trace records this pass. Sizes are not numbers then, so they can't be checked."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def tap_by_hooks(
    module: nn.Module,
    wave: Tensor,
    layers: Sequence[str],
    padding_mask: Tensor | None = None,
    batch_axes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Outputs of submodules in one forward pass, batch first.

    Of a tuple or list the first element counts, of a mapping the value of ``x``, both as in avex. Of a submodule
    that runs several times the last run counts. If the model changes an output in place later, the change is
    visible.

    Args:
        module: called as ``module(wave)``, or as ``module(wave, padding_mask)`` if there is a mask or the module
            requires one.
        wave: (B, S).
        layers: names of submodules, or ``backbone`` for the output of a module that has no part of that name.
        padding_mask: (B, S) bool, True where padded.
        batch_axes: axis of the batch by layer, from `measure_batch_axes`; None: inferred from the sizes.

    Raises:
        ValueError: a layer that the pass doesn't reach, or whose output is not a tensor with a batch axis.
    """
    found = _captured(module, wave, layers, padding_mask)
    if batch_axes is None:
        batch_axes = _batch_axes(module, wave, found)
    return {name: output.transpose(0, 1) if batch_axes[name] else output for name, output in found.items()}


def measure_batch_axes(module: nn.Module, wave: Tensor, layers: Sequence[str]) -> dict[str, int]:
    """The axis, 0 or 1, that grows with the batch in each layer's output; arguments and errors as in `tap_by_hooks`.

    Sizes alone are ambiguous when a batch has as many clips as the layer has time steps. So this runs the module on
    one clip, `wave` (1, S), and on two.
    """
    with frozen(module):
        one, two = (_captured(module, wave.expand(rows, *wave.shape[1:]), layers, None) for rows in (1, 2))
    axes = {}
    for name in layers:
        first, second = tuple(one[name].shape), tuple(two[name].shape)
        changed = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        if changed not in ([0], [1]):
            raise ValueError(
                f"the output of layer {name} is {first} for one clip and {second} for two; expected the batch on "
                "axis 0 or 1"
            )
        axes[name] = changed[0]
    return axes


def capture(part: nn.Module, name: str, outputs: dict[str, Tensor]) -> RemovableHandle:
    """Put the output of a module into `outputs` under a name, at every pass until the returned handle is removed."""

    def hook(part: nn.Module, arguments: Any, output: Any) -> None:
        outputs[name] = _tensor(name, output)

    return part.register_forward_hook(hook)


def input_lengths(module: nn.Module, wave: Tensor, parts: Sequence[nn.Module]) -> list[int | None]:
    """Samples that reach each of these parts in a pass on waveforms (B, S); None for a part that isn't run."""
    found: dict[nn.Module, int] = {}

    def hook(part: nn.Module, arguments: tuple[Tensor]) -> None:
        found[part] = arguments[0].shape[-1]

    handles = [part.register_forward_pre_hook(hook) for part in parts]
    try:
        with frozen(module):
            module(wave)
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(part) for part in parts]


def _captured(
    module: nn.Module, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None
) -> dict[str, Tensor]:
    parts = dict(module.named_modules())
    found: dict[str, Tensor] = {}
    handles = [capture(parts[name], name, found) for name in layers if name != BACKBONE or name in parts]
    try:
        output = module(wave, padding_mask) if padding_mask is not None or _requires_mask(module) else module(wave)
    finally:
        for handle in handles:
            handle.remove()
    if BACKBONE in layers and BACKBONE not in parts:
        found[BACKBONE] = _tensor(BACKBONE, output)
    if missing := [name for name in layers if name not in found]:
        raise ValueError(
            f"a forward pass of {type(module).__name__} doesn't reach {', '.join(missing)}; choose layers that it "
            "runs, see list_model_layers()"
        )
    return {name: found[name] for name in layers}


def _requires_mask(module: nn.Module) -> bool:
    # A forward pass written for avex may have no default for its mask.
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1


def _tensor(name: str, output: Any) -> Tensor:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    elif isinstance(output, Mapping):
        output = output.get("x")
    if not isinstance(output, Tensor) or output.ndim < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the output of layer {name} is {shape}; expected a tensor with batch and features: tap another layer"
        )
    return output


def _batch_axes(module: nn.Module, wave: Tensor, found: Mapping[str, Tensor]) -> dict[str, int]:
    rows = len(wave)
    if any(output.ndim > 2 and rows > 1 and tuple(output.shape[:2]) == (rows, rows) for output in found.values()):
        return measure_batch_axes(module, wave[:1], list(found))
    axes = {}
    for name, output in found.items():
        fitting = [axis for axis in (0, 1) if output.shape[axis] == rows and (axis == 0 or output.ndim > 2)]
        if not fitting:
            raise ValueError(
                f"the output of layer {name} is {tuple(output.shape)} for a batch of {rows}; expected the batch on "
                "axis 0 or 1"
            )
        axes[name] = fitting[0]
    return axes
