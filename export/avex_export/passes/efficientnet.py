"""Passes over EfficientNet."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from avex_export.passes.target import Target
from avex_serve.models.efficientnet import ConvNorm, EfficientNetModel


def fold_batch_norms(target: Target) -> bool:
    """Fold each batch norm into its convolution; one before which the convolution is tapped stays."""
    model = target.model
    if not isinstance(model, EfficientNetModel):
        return False
    for name, part in model.model.named_modules(prefix="model"):
        if isinstance(part, ConvNorm) and len(part) > 1 and f"{name}.0" not in target.layers:
            convolution, norm = part[0], part[1]
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            part[0] = fuse_conv_bn_eval(convolution, norm)
            part[1] = nn.Identity()
    return True


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
