"""The passes of EfficientNet."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from avex_export.architectures.base import DEAD_LAYERS, POOLING, Architecture, Pass, Target
from avex_export.architectures.spectra import FRONT_ENDS
from avex_serve.models.efficientnet import Bottleneck, ConvNorm, EfficientNetModel, SqueezeExcite
from avex_serve.models.layers import BACKBONE, Taps

IMAGE = Pass("image", "convolve the spectrogram once instead of three equal channels")
BATCH_NORM = Pass("batch-norm", "fold batch norms into the convolutions before them")

_FEATURES = "model.features"
_STEM = f"{_FEATURES}.0"


def _drop_dead_layers(target: Target) -> bool:
    model = target.model_as(EfficientNetModel)
    model.model.classifier = None
    if {"model.avgpool", BACKBONE}.isdisjoint(target.layers):  # else the last feature map is needed
        _cut(model.model.features, _FEATURES, target.layers)
    return True


def _cut(chain: nn.ModuleList, name: str, layers: Iterable[str]) -> None:
    """Drop all parts after the deepest of the layers, in place."""
    inside = [layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")]
    if name in layers or not inside:
        return
    deepest = max(int(layer.partition(".")[0]) for layer in inside)
    if isinstance(chain, ConvNorm) and deepest > 0:  # norm and activation go together
        return
    del chain[deepest + 1 :]
    part, part_name = chain[deepest], f"{name}.{deepest}"
    if isinstance(part, Bottleneck):
        if {part_name, f"{part_name}.stochastic_depth"}.isdisjoint(layers):
            _cut(part.block, f"{part_name}.block", layers)
    elif isinstance(part, nn.ModuleList):
        _cut(part, part_name, layers)


def _merge_channels(target: Target) -> bool:
    """Pass the spectrogram to the first convolution once, with summed weights, instead of three times."""
    model = target.model_as(EfficientNetModel)
    stem = _convolution(model.model.features[0])
    with torch.no_grad():
        stem.weight = nn.Parameter(stem.weight.double().sum(dim=1, keepdim=True).float(), requires_grad=False)
    stem.in_channels = model.channels = 1
    return True


class MeanOverTime(nn.Module):
    """(B, C, H, W) → (B, C, H, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean over time; the axis stays."""
        return x.mean(dim=3, keepdim=True)


class PooledGains(nn.Module):
    """Squeeze and excitation (B, C, H, W) → the same, and its mean over time (B, C, H).

    The mean of a channel is computed from the mean over time, which therefore takes no extra time.
    """

    def __init__(self, part: SqueezeExcite) -> None:
        super().__init__()
        self.fc1, self.fc2 = part.fc1, part.fc2

    def forward(self, x: Tensor, taps: Taps, name: str) -> tuple[Tensor, Tensor]:
        """Offers no layer."""
        means = x.mean(dim=3, keepdim=True)
        squeezed = nn.functional.silu(self.fc1(means.mean(dim=(2, 3), keepdim=True)))
        gains = self.fc2(squeezed).sigmoid()
        return x * gains, (means * gains).squeeze(3)


class PooledConvolution(ConvNorm):
    """A convolution with its norm and activation. Its tapped layer is its output for the mean, (B, C' * H)."""

    weight: Tensor  # of the convolution, without the norm that may be folded into it later

    def __init__(self, part: ConvNorm) -> None:
        nn.ModuleList.__init__(self, part)
        self.register_buffer("weight", _convolution(part).weight.detach())

    def offer(self, pooled: Tensor, x: Tensor, taps: Taps, name: str) -> Tensor:
        """Tap the pooled output (B, C', H, …), and compute the rest from the convolution's input."""
        taps(f"{name}.0", pooled.reshape(-1, pooled.shape[1] * pooled.shape[2]))
        if not taps.complete:
            for part in self:
                x = part(x)
        return x


class PooledProjection(PooledConvolution):
    """The end of a bottleneck, after `PooledGains`."""

    def forward(self, pair: tuple[Tensor, Tensor], taps: Taps, name: str) -> Tensor:  # type: ignore[override]
        """Offers the convolution."""
        x, means = pair
        return self.offer(self.weight.flatten(1) @ means, x, taps, name)


class PooledStem(PooledConvolution):
    """The first convolution with its norm and activation.

    Each column of the kernel covers other frames of the image, so each has a separate mean.
    """

    seen: Tensor  # (frames, kernel): 1 where a column of the kernel covers a frame
    bias: Tensor

    def __init__(self, part: ConvNorm, frames: int) -> None:
        super().__init__(part)
        convolution = _convolution(part)
        assert isinstance(convolution.padding, tuple)
        self.padding, self.stride = convolution.padding[1], convolution.stride[1]
        kernel = convolution.kernel_size[1]
        self.steps = (frames + 2 * self.padding - kernel) // self.stride + 1
        seen = torch.zeros(frames, kernel)
        for column in range(kernel):
            at = column - self.padding + self.stride * torch.arange(self.steps)
            seen[at[(at >= 0) & (at < frames)], column] = 1.0
        self.register_buffer("seen", seen)
        self.register_buffer("bias", torch.zeros(convolution.out_channels))

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """Offers the convolution."""
        means = x @ self.seen / self.steps  # (B, C, H, kernel)
        pooled = nn.functional.conv2d(means, self.weight, self.bias, (self.stride, 1), (self.padding, 0))
        return self.offer(pooled, x, taps, name)


def _pool(target: Target) -> bool:
    """Take the mean over time before tapped convolutions instead of after them, if nothing else is tapped.

    The mean commutes with a convolution. Before the stem this works in clips of one length only.
    """
    model, layers = target.model_as(EfficientNetModel), target.layers
    modules = dict(model.named_modules())
    if target.pooling != "mean" or not all(isinstance(modules.get(layer), nn.Conv2d) for layer in layers):
        return False
    spectrogram, stem = model.audio_spectrogram, model.model.features[0]
    assert spectrogram is not None
    assert isinstance(stem, ConvNorm)
    with torch.no_grad():
        _, height, frames = spectrogram(torch.zeros(1, target.samples)).shape
    size = _strided((height, frames), _convolution(stem))
    pooled = set()
    for name, part in modules.items():
        if isinstance(part, Bottleneck) and len(part.block) > part.last_part:  # not cut off
            size = _strided(size, _convolution(part.block[part.last_part - 2]))
            if _pool_bottleneck(part, name, size, layers):
                pooled.add(f"{name}.block.{part.last_part}.0")
    if f"{_STEM}.0" in layers and not target.any_length:
        model.model.features[0] = PooledStem(stem, frames)
        pooled.add(f"{_STEM}.0")
    deepest = max(layers, key=list(modules).index)
    convolution, part = modules[deepest], modules[deepest.rpartition(".")[0]]
    assert isinstance(convolution, nn.Conv2d)
    small = convolution.kernel_size == convolution.stride == (1, 1)
    if deepest not in pooled and small and isinstance(part, ConvNorm):
        part[0] = nn.Sequential(MeanOverTime(), convolution)
        pooled.add(deepest)
    return bool(pooled)


def _pool_bottleneck(part: Bottleneck, name: str, size: tuple[int, int], layers: Sequence[str]) -> bool:
    """Pool before the convolution that ends a bottleneck, if it is tapped and pooling saves work."""
    end = part.last_part
    gains = f"{name}.block.{end - 1}"
    if f"{name}.block.{end}.0" not in layers or any(layer.startswith(f"{gains}.") for layer in layers):
        return False
    squeeze, projection = part.block[end - 1], part.block[end]
    assert isinstance(squeeze, SqueezeExcite)
    assert isinstance(projection, ConvNorm)
    if _convolution(projection).in_channels > 2 * size[0] * size[1]:
        return False  # its weights are larger than its output, so the mean of the output takes less time
    part.block[end - 1], part.block[end] = PooledGains(squeeze), PooledProjection(projection)
    return True


def _strided(size: tuple[int, int], convolution: nn.Conv2d) -> tuple[int, int]:
    return -(-size[0] // convolution.stride[0]), -(-size[1] // convolution.stride[1])


def _fold_batch_norms(target: Target) -> bool:
    """Fold each batch norm into its convolution, unless the convolution's own output is tapped."""
    for name, part in target.model_as(EfficientNetModel).model.named_modules(prefix="model"):
        if not isinstance(part, ConvNorm) or len(part) == 1:
            continue
        if isinstance(part, PooledConvolution) or f"{name}.0" not in target.layers:
            norm = part[1]
            assert isinstance(norm, nn.BatchNorm2d)
            part[0] = fuse_conv_bn_eval(_convolution(part), norm)
            part[1] = nn.Identity()
        else:  # without a bias, the graph creates zeros in each run, and onnxruntime can't block the convolution
            zeros = torch.zeros(_convolution(part).out_channels)
            _convolution(part).bias = nn.Parameter(zeros, requires_grad=False)
    return True


def _convolution(part: nn.Module) -> nn.Conv2d:
    assert isinstance(part, ConvNorm)
    convolution = part[0]
    if isinstance(convolution, nn.Sequential):
        *_, convolution = convolution  # after `MeanOverTime`
    assert isinstance(convolution, nn.Conv2d)
    return convolution


EFFICIENTNET = Architecture(
    name="EfficientNet",
    backbone=EfficientNetModel,
    passes={
        DEAD_LAYERS: _drop_dead_layers,
        **FRONT_ENDS,
        IMAGE: _merge_channels,
        POOLING: _pool,
        BATCH_NORM: _fold_batch_norms,
    },
    network=_STEM,
    refusals={
        "--padding-mask": "EfficientNet can't use one, since its convolutions process every sample",
        "--quantize": "EfficientNet has no int8 graph: on CPUs that have only AVX2 its convolutions are slower in "
        "integers than in float32, and its embeddings are wrong (cosine 0.6)",
    },
)
