"""Passes over EfficientNet."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from avex_export.passes.target import Target
from avex_serve.models.efficientnet import ConvNorm, EfficientNetModel

# Where a norm shifts a channel by so many times what it scales its deviation to, undoing it would cost digits.
_LARGEST_SHIFT = 30.0


class UnfoldedMeans(nn.Module):
    """Tapped convolutions into which a batch norm was folded (B, C, H, W) → means of what they give without it.

    A norm is linear in each channel, so it can be taken back from the mean instead of from every step.
    """

    def __init__(self, norms: Mapping[str, nn.BatchNorm2d]) -> None:
        """Take the norms by the names of the convolutions before them."""
        super().__init__()
        self.layers = tuple(norms)
        for i, norm in enumerate(norms.values()):
            scale, shift = _scale_and_shift(norm)
            self.register_buffer(f"scale_{i}", (1 / scale).float()[:, None, None])
            self.register_buffer(f"shift_{i}", (-shift / scale).float()[:, None, None])

    def forward(self, tapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same names; those layers are (B, C, H, 1)."""
        found = dict(tapped)
        for i, name in enumerate(self.layers):
            mean = tapped[name].mean(dim=3, keepdim=True)
            found[name] = mean * getattr(self, f"scale_{i}") + getattr(self, f"shift_{i}")
        return found


def fold_batch_norms(target: Target) -> bool:
    """Fold each batch norm into its convolution.

    Where the convolution is tapped, before the norm, the fold is taken back from the tap, if that is no more than a
    mean; else the norm stays.
    """
    model = target.model
    if not isinstance(model, EfficientNetModel):
        return False
    undone: dict[str, nn.BatchNorm2d] = {}
    for name, part in model.model.named_modules(prefix="model"):
        if isinstance(part, ConvNorm) and len(part) > 1:
            convolution, norm = part[0], part[1]
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            if f"{name}.0" in target.layers:
                if target.pooling != "mean" or not _can_be_undone(norm):
                    continue
                undone[f"{name}.0"] = norm
            part[0] = fuse_conv_bn_eval(convolution, norm)
            part[1] = nn.Identity()
    if undone:
        model.tap_pooling = UnfoldedMeans(undone)
    return True


def _can_be_undone(norm: nn.BatchNorm2d) -> bool:
    return bool((norm.bias.abs() <= _LARGEST_SHIFT * norm.weight.abs()).all() and (norm.weight != 0).all())


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def fold_image_channels(target: Target) -> bool:
    """Give the first convolution the spectrogram once, with its weights summed, instead of three times."""
    model = target.model
    if not isinstance(model, EfficientNetModel):
        return False
    first = model.model.features[0]
    assert isinstance(first, ConvNorm)
    stem = first[0]
    assert isinstance(stem, nn.Conv2d)
    with torch.no_grad():
        stem.weight = nn.Parameter(stem.weight.double().sum(dim=1, keepdim=True).float(), requires_grad=False)
    stem.in_channels = model.channels = 1
    return True
