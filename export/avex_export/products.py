"""Products in integers: the linear maps of a graph are replaced by `Int8Linear`, one after the other."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from avex_export.architectures import architecture_of
from avex_export.graph import Graph
from avex_serve.models.probes import Probe

# Shares of the activations' range that move into the weights; each product uses the best. SmoothQuant's is 0.5.
_STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
# Rows of each clip on which the best is chosen.
_ROWS = 32
# Lowest range of a channel of activations or weights, so that none is divided by zero.
_LEAST = 1e-5
# Weights are -64 to 64. On CPUs with AVX2 but without VNNI, onnxruntime adds two products of 8 bits each in 16 bits.
# With weights of 8 bits they saturate, and silently (255 * 127 * 2 > 2 ** 15; 255 * 64 * 2 is not).
_LARGEST = 64
# Added to the diagonal of the second moments, relative to its mean; GPTQ's value.
_DAMPING = 0.01
# Columns that are rounded before their errors reach the rest, only for speed; GPTQ's value.
_COLUMNS = 128


class Int8Linear(nn.Module):
    """A linear map (B, T, K) → (B, T, N) of 8-bit activations, rounded at run time, with 7-bit weights.

    A graph measures the range of the activations over the whole batch. The service therefore runs batches of one
    clip, as in the calibration. In a graph this module is four standard operators, which onnxruntime fuses into one.
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
    """Activations (B, T, K) at 256 levels between the ends (B,) of each clip, as in DynamicQuantizeLinear."""
    low, high = low.clamp(max=0.0)[:, None, None], high.clamp(min=0.0)[:, None, None]
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


class _Calibrating(nn.Module):
    """Takes the place of a linear map. Its first call gets all clips and makes the `Int8Linear` from them."""

    def __init__(self, linear: nn.Linear, mean: Tensor, advance: Callable[[], object]) -> None:
        """Take the linear map, the mean (N,) of its output in float32, and what to call after the calibration."""
        super().__init__()
        self.linear, self.mean, self.advance = linear, mean, advance
        self.made: Int8Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, K) → (B, T, N)."""
        if self.made is None:
            self.made = _calibrated(self.linear, x, self.mean)
            self.advance()
        return self.made(x)


@torch.no_grad()
def quantise(graph: Graph, clips: Tensor) -> int:
    """Turn the products of a rewritten graph's transformer into integers, in place, one after the other.

    Each is rounded on the inputs that the products rounded before it compute, and its bias corrects the mean of all
    their errors. Products of one token a clip, after the pooling, stay in float32, since they take little time. So
    does BEATs' small product for each head of each token, where it isn't merged with the large ones.

    Args:
        graph: rewritten by `avex_export.passes`, on an architecture with `Architecture.blocks`.
        clips: (B, S) to calibrate on, in one batch.

    Returns:
        The number of products in integers.
    """
    probe = graph.probes[0]
    assert isinstance(probe, Probe)
    model = probe.base_model
    assert model is not None
    path = architecture_of(model).blocks
    assert path is not None
    parts = model.get_submodule(path).named_modules(prefix=path)
    linears = {name: part for name, part in parts if isinstance(part, nn.Linear)}
    means = _means(graph, clips, linears)
    with tqdm(total=len(means), desc="round to int8", leave=False, disable=None) as shown:
        calibrating = {name: _Calibrating(linears[name], mean, shown.update) for name, mean in means.items()}
        for name, product in calibrating.items():
            model.set_submodule(name, product)
        graph.combine(clips)
    for name, product in calibrating.items():
        assert product.made is not None
        model.set_submodule(name, product.made)
    return len(calibrating)


def _means(graph: Graph, clips: Tensor, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """The mean output (N,) of each linear map that processes several tokens of a clip."""
    means: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 3 and output.shape[1] > 1:
            means[name] = output.flatten(0, 1).mean(dim=0)

    handles = [linear.register_forward_hook(partial(record, name)) for name, linear in linears.items()]
    graph.combine(clips)
    for handle in handles:
        handle.remove()
    return means


def _calibrated(linear: nn.Linear, x: Tensor, mean: Tensor) -> Int8Linear:
    smoothing = _smoothing(linear, x)
    weight = linear.weight / smoothing
    smooth = x * smoothing
    inputs = quantised(smooth, *smooth.flatten(1).aminmax(dim=1)).flatten(0, 1)
    step = steps(weight)
    integers = compensated(weight, step, inputs)
    return Int8Linear(smoothing, integers, step, mean - (integers * step[:, None]) @ inputs.mean(dim=0))


def _smoothing(linear: nn.Linear, x: Tensor) -> Tensor:
    """Factors (K,) that make the channels of x more equal and the weights less equal; those with the least error.

    Source: Xiao et al., "SmoothQuant" (arXiv 2211.10438), here with the best of several strengths for each product.
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


def steps(weight: Tensor) -> Tensor:
    """The step between neighbouring integers for each row of a weight (N, K): (N,)."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest, 1.0) / _LARGEST


def nearest(weight: Tensor, step: Tensor) -> Tensor:
    """The nearest integers (N, K), as floats, in steps (N,)."""
    return (weight / step[:, None]).round().clamp(-_LARGEST, _LARGEST)


def compensated(weight: Tensor, step: Tensor, inputs: Tensor) -> Tensor:
    """Integers (N, K), as floats, whose product with inputs (R, K) is near that of the weight (N, K); steps (N,).

    Columns are rounded one after the other, those with the strongest inputs first. The remaining columns compensate
    for the error of each. Source: Frantar et al., "GPTQ" (arXiv 2210.17323), with its order by activation.
    """
    moments = inputs.T @ inputs / len(inputs)  # (K, K)
    moments.diagonal().add_(_DAMPING * moments.diagonal().mean().clamp(min=1e-12))
    order = moments.diagonal().argsort(descending=True)
    moments = moments[order][:, order]
    # Each row spreads the error of one column over the columns after it.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    rest = weight.T[order].contiguous()  # (K, N): a column of the weight is a row, which is contiguous
    rounded = torch.empty_like(rest)
    for start in range(0, len(rest), _COLUMNS):
        end = min(start + _COLUMNS, len(rest))
        within, block = spread[start:end, start:end], rest[start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            rounded[start + i] = (block[i] / step).round().clamp(-_LARGEST, _LARGEST)
            errors[i] = (block[i] - rounded[start + i] * step) / within[i, i]
            block[i + 1 :] -= within[i, i + 1 :, None] * errors[i]
        rest[end:] -= spread[start:end, end:].T @ errors
    integers = torch.empty_like(rounded)
    integers[order] = rounded
    return integers.T.contiguous()
