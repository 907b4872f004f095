"""Forward passes of a module: frozen, traced, and with outputs of its submodules captured by hooks.

Only this module registers hooks. They are removed within the same call, and what they capture goes into a dictionary
of that call. So no state stays on a module that several probes share. The one exception is `capture_until_removed`,
for models written for avex that handle hooks themselves.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avex_serve.models.layers import BACKBONE


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
    found = _capture(module, wave, layers, padding_mask)
    if batch_axes is None:
        batch_axes = _batch_axes(module, wave, found)
    return {name: output.transpose(0, 1) if batch_axes[name] else output for name, output in found.items()}


def measure_batch_axes(module: nn.Module, wave: Tensor, layers: Sequence[str]) -> dict[str, int]:
    """The axis, 0 or 1, that grows with the batch in each layer's output.

    Sizes alone are ambiguous when a batch has as many clips as the layer has time steps.

    Args:
        module: see `tap_by_hooks`.
        wave: (1, S), of the length that matters.
        layers: see `tap_by_hooks`.

    Raises:
        ValueError: see `tap_by_hooks`.
    """
    with frozen(module):
        one, two = (_capture(module, wave.expand(rows, *wave.shape[1:]), layers, None) for rows in (1, 2))
    return {name: _only_change(name, one[name].shape, two[name].shape) for name in layers}


def capture_until_removed(module: nn.Module, name: str, outputs: dict[str, Tensor]) -> RemovableHandle:
    """Put the output of a submodule into `outputs` at every pass, until the returned handle is removed.

    Raises:
        ValueError: no submodule of that name.
    """
    part = dict(module.named_modules()).get(name)
    if part is None:
        raise ValueError(f"Layer '{name}' not found in model")

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


def _capture(
    module: nn.Module, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None
) -> dict[str, Tensor]:
    parts = dict(module.named_modules())
    captured: dict[str, Any] = {}
    handles = [
        parts[name].register_forward_hook(_capturing(name, captured))
        for name in layers
        if name != BACKBONE or name in parts
    ]
    try:
        output = module(wave, padding_mask) if padding_mask is not None or _requires_mask(module) else module(wave)
    finally:
        for handle in handles:
            handle.remove()
    if BACKBONE not in parts:
        captured[BACKBONE] = output
    missing = [name for name in layers if name not in captured]
    if missing:
        raise ValueError(
            f"a forward pass of {type(module).__name__} doesn't reach {', '.join(missing)}; choose layers that it "
            "runs, see list_model_layers()"
        )
    return {name: _tensor(name, captured[name]) for name in layers}


def _requires_mask(module: nn.Module) -> bool:
    # A forward pass written for avex may have no default for its mask.
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1


def _capturing(name: str, captured: dict[str, Any]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        captured[name] = output

    return hook


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
    return {name: _axis_of_size(name, output, rows) for name, output in found.items()}


def _axis_of_size(name: str, output: Tensor, rows: int) -> int:
    axes = [axis for axis in (0, 1) if output.shape[axis] == rows and (axis == 0 or output.ndim > 2)]
    if not axes:
        raise ValueError(
            f"the output of layer {name} is {tuple(output.shape)} for a batch of {rows}; expected the batch on axis "
            "0 or 1"
        )
    return axes[0]


def _only_change(name: str, one: Sequence[int], two: Sequence[int]) -> int:
    changed = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if changed not in ([0], [1]):
        raise ValueError(
            f"the output of layer {name} is {tuple(one)} for one clip and {tuple(two)} for two; expected the batch "
            "on axis 0 or 1"
        )
    return changed[0]
