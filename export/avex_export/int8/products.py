"""Products in integers, and how those of a graph are turned into them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avex_export.graph import AudioGraph
from avex_export.int8.rounding import compensated, nearest, steps
from avex_export.progress import counter
from avex_serve.models.base_model import ModelBase
from avex_serve.models.beats import BEATsModel
from avex_serve.models.eat import EATModel
from avex_serve.models.probes import Probe

# How much of the activations' range is moved into the weights: one is chosen for each product. 0.5 is SmoothQuant's.
_STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
# Rows of each clip on which the choice is made.
_ROWS = 32
# Channels that are nearly zero, of activations or weights, are smoothed no further than this.
_LEAST = 1e-5


class Int8Linear(nn.Module):
    """A linear map (B, T, K) → (B, T, N) of 8-bit activations, rounded at run time, with 7-bit weights.

    The range of the activations is that of a whole call: batches of one clip, as the service runs them, are rounded
    as the calibration did it. In a graph it is four standard operators, which onnxruntime fuses into one.
    """

    smoothing: Tensor  # (K,) factors of the activations; the weights are divided by them
    weight: Tensor  # (K, N) int8
    step: Tensor  # (N,) of the weights
    bias: Tensor  # (N,)

    def __init__(self, smoothing: Tensor, integers: Tensor, step: Tensor, bias: Tensor) -> None:
        """Take smoothing (K,), integers (N, K), step (N,) and bias (N,)."""
        super().__init__()
        self.register_buffer("smoothing", smoothing)
        self.register_buffer("weight", integers.T.contiguous().to(torch.int8))
        self.register_buffer("step", step)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, K) → (B, T, N)."""
        x = x * self.smoothing
        if not torch.compiler.is_exporting():
            return quantised(x, *x.flatten(1).aminmax(dim=1)) @ (self.weight * self.step) + self.bias
        levels, step, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, (), ()),
        )
        shape = (*x.shape[:-1], self.weight.shape[1])
        sums = torch.onnx.ops.symbolic("MatMulInteger", (levels, self.weight, zero), dtype=torch.int32, shape=shape)
        return sums.float() * (step * self.step) + self.bias


def quantised(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Activations (B, T, K) at 256 levels between the ends (B,) of each clip, as DynamicQuantizeLinear has them."""
    low, high = low.clamp(max=0.0)[:, None, None], high.clamp(min=0.0)[:, None, None]
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


class _Undecided(nn.Module):
    """In place of a linear map: at its first call, which hears all clips, it becomes an `Int8Linear`."""

    def __init__(self, linear: nn.Linear, mean: Tensor) -> None:
        """Take the linear map and the mean (N,) of what it answers in float32."""
        super().__init__()
        self.linear, self.mean = linear, mean
        self.decided: Int8Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, K) → (B, T, N)."""
        if self.decided is None:
            self.decided = _decide(self.linear, x, self.mean)
        return self.decided(x)


@torch.no_grad()
def quantise(graph: AudioGraph, clips: Tensor) -> int:
    """Turn the products of a rewritten graph's transformer into integers, in place, one after the other.

    Each is rounded on what it hears behind those that were rounded before it, and its bias takes up the mean of all
    their errors. Products of one token a clip, behind the pooling, stay: they cost nothing. So does BEATs' small one
    for each head of each token, where it isn't merged with the large ones.

    Args:
        graph: rewritten by `avex_export.passes`, on BEATs or EAT.
        clips: (B, S) what to listen to; all are heard at once.

    Returns:
        How many products there are in integers.
    """
    means: dict[str, Tensor] = {}
    probe = graph.probes[0]
    assert isinstance(probe, Probe)
    model = probe.base_model
    assert model is not None
    linears = _linears(model)

    def listen(name: str) -> RemovableHandle:
        def hear(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim == 3 and output.shape[1] > 1:
                means[name] = output.flatten(0, 1).mean(dim=0)

        return linears[name].register_forward_hook(hear)

    handles = [listen(name) for name in linears]
    graph.combine(clips)
    for handle in handles:
        handle.remove()
    undecided = {name: _Undecided(linears[name], mean) for name, mean in means.items()}
    with counter(len(undecided), "round to int8") as count:
        for name, product in undecided.items():
            product.register_forward_hook(lambda *_: count())
            _put(model, name, product)
        graph.combine(clips)
    for name, product in undecided.items():
        assert product.decided is not None
        _put(model, name, product.decided)
    return len(undecided)


def _linears(model: ModelBase) -> dict[str, nn.Linear]:
    if isinstance(model, BEATsModel):
        blocks: Sequence[nn.Module] = list(model.backbone.encoder.layers)
        prefix = "backbone.encoder.layers"
    else:
        assert isinstance(model, EATModel)
        blocks, prefix = list(model.backbone.model.blocks), "backbone.model.blocks"
    return {
        f"{prefix}.{i}.{name}": part
        for i, block in enumerate(blocks)
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear)
    }


def _put(model: ModelBase, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _decide(linear: nn.Linear, x: Tensor, mean: Tensor) -> Int8Linear:
    smoothing = _smoothing(linear, x)
    weight = linear.weight / smoothing
    smooth = x * smoothing
    inputs = quantised(smooth, *smooth.flatten(1).aminmax(dim=1)).flatten(0, 1)
    step = steps(weight)
    integers = compensated(weight, step, inputs)
    return Int8Linear(smoothing, integers, step, mean - (integers * step[:, None]) @ inputs.mean(dim=0))


def _smoothing(linear: nn.Linear, x: Tensor) -> Tensor:
    """Factors (K,) that level out the channels of x, at the expense of the weights, as far as it pays.

    Source: Xiao et al., "SmoothQuant" (arXiv 2211.10438), the strength searched for each product.
    """
    low, high = x.aminmax(dim=1)  # (B, K) each
    reach = torch.maximum(high, -low).amax(dim=0).clamp(min=_LEAST)
    largest = linear.weight.abs().amax(dim=0).clamp(min=_LEAST)
    candidates = [torch.ones_like(reach)]
    for strength in _STRENGTHS:
        log = (1 - strength) * largest.log() - strength * reach.log()
        candidates.append((log - log.mean()).exp())
    rows = x[:, torch.linspace(0, x.shape[1] - 1, _ROWS).long()]
    expected = rows @ linear.weight.T

    def error(smoothing: Tensor) -> float:
        weight = linear.weight / smoothing
        step = steps(weight)
        ends = (low * smoothing).amin(dim=1), (high * smoothing).amax(dim=1)
        found = quantised(rows * smoothing, *ends) @ (nearest(weight, step) * step[:, None]).T
        return float((found - expected).square().sum())

    return min(candidates, key=error)
