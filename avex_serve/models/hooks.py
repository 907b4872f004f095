"""Forward passes: frozen ones, and ones that listen to a module's layers without changing the module.

Hooks live here and nowhere else. They are registered and removed within one call, and what they hear goes into that
call's own dictionary; so nothing stays on a module that several probes share. The one exception is `keep_listening`,
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
    """Run a module in eval mode and without gradients; its modes are restored, each part's own."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def tap_by_hooks(
    module: nn.Module,
    wave: Tensor,
    layers: Sequence[str],
    padding_mask: Tensor | None = None,
    batch_axes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Outputs of submodules in one forward pass, batch first.

    A tuple or list counts as its first element, a mapping as its ``x``, both as in avex. A submodule that runs
    several times counts as its last run. An output that the model changes in place afterwards is seen changed.

    Args:
        module: called as ``module(wave)``, or ``module(wave, padding_mask)`` if there is a mask or none may be left
            out.
        wave: (B, S).
        layers: names of submodules, or ``backbone`` for the output of a module that has no part of that name.
        padding_mask: (B, S) bool, True where padded.
        batch_axes: axis of the batch by layer, from `measure_batch_axes`; None: found from the sizes.

    Raises:
        ValueError: a layer that the pass doesn't reach, or whose output is no tensor with a batch axis.
    """
    found = _listen(module, wave, layers, padding_mask)
    if batch_axes is None:
        batch_axes = _batch_axes(module, wave, found)
    return {name: output.transpose(0, 1) if batch_axes[name] else output for name, output in found.items()}


def measure_batch_axes(module: nn.Module, wave: Tensor, layers: Sequence[str]) -> dict[str, int]:
    """The axis, 0 or 1, that grows with the batch in each layer's output.

    Sizes alone can't tell when a batch has as many clips as the layer has time steps.

    Args:
        module: see `tap_by_hooks`.
        wave: (1, S), of the length that matters.
        layers: see `tap_by_hooks`.

    Raises:
        ValueError: see `tap_by_hooks`.
    """
    with frozen(module):
        one, two = (_listen(module, wave.expand(rows, *wave.shape[1:]), layers, None) for rows in (1, 2))
    return {name: _only_change(name, one[name].shape, two[name].shape) for name in layers}


def keep_listening(module: nn.Module, name: str, outputs: dict[str, Tensor]) -> RemovableHandle:
    """Put the output of a submodule into `outputs` at every pass, until the handle is removed.

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
    """Samples of the waveforms (B, S) that reach these parts in a pass of the module; None where none does."""
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


def _listen(
    module: nn.Module, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None
) -> dict[str, Tensor]:
    parts = dict(module.named_modules())
    heard: dict[str, Any] = {}
    handles = [
        parts[name].register_forward_hook(_hearing(name, heard))
        for name in layers
        if name != BACKBONE or name in parts
    ]
    try:
        output = module(wave, padding_mask) if padding_mask is not None or _wants_mask(module) else module(wave)
    finally:
        for handle in handles:
            handle.remove()
    if BACKBONE not in parts:
        heard[BACKBONE] = output
    unheard = [name for name in layers if name not in heard]
    if unheard:
        raise ValueError(
            f"a forward pass of {type(module).__name__} doesn't reach {', '.join(unheard)}; choose layers that it "
            "runs, see list_model_layers()"
        )
    return {name: _tensor(name, heard[name]) for name in layers}


def _wants_mask(module: nn.Module) -> bool:
    # A forward pass written for avex may have no default for its mask.
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1


def _hearing(name: str, heard: dict[str, Any]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        heard[name] = output

    return hook


def _tensor(name: str, output: Any) -> Tensor:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    elif isinstance(output, Mapping):
        output = output.get("x")
    if not isinstance(output, Tensor) or output.ndim < 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"layer {name} gives {shape}; expected a tensor with batch and features, so tap another")
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
            f"layer {name} gives {tuple(output.shape)} for a batch of {rows}; expected it on axis 0 or 1"
        )
    return axes[0]


def _only_change(name: str, one: Sequence[int], two: Sequence[int]) -> int:
    changed = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if changed not in ([0], [1]):
        raise ValueError(
            f"layer {name} gives {tuple(one)} for one clip, {tuple(two)} for two; expected the batch on axis 0 or 1"
        )
    return changed[0]
