"""EfficientNet: a convolutional network on the log-mel spectrogram as an image.

Architecture: Tan & Le, "EfficientNet" (arXiv 1905.11946), with the inverted bottlenecks of MobileNetV2 (arXiv
1801.04381), squeeze-and-excitation (Hu et al., arXiv 1709.01507) and stochastic depth (Huang et al., arXiv
1603.09382). Names and shapes of the parameters are torchvision's under ``model.``, as in avex 1.4, so its
checkpoints load strictly.

Feature maps are (B, C, H, W): H is frequency from low to high, and W is time. Every part is called with the
collector of layers and its own name, under which it offers its output.

Some parts of torchvision's network work in place, so that a hook holds a tensor with later changes. Layers here have
those values too: avex's probes are trained on them.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from avex_serve.configs import AudioConfig
from avex_serve.models.base_model import ModelBase, refuse_pretrained
from avex_serve.models.frontends import Spectrogram
from avex_serve.models.layers import BACKBONE, Taps, is_tracing

Variant = Literal["b0", "b1"]

# Depth relative to B0 (arXiv 1905.11946, as released by its authors). Both variants have B0's widths.
_DEPTH: dict[Variant, float] = {"b0": 1.0, "b1": 1.1}
_STEM_CHANNELS, _TOP_CHANNELS = 32, 1280
_DROPOUT = 0.2  # before the classifier (B0 and B1 alike)
_DROPPED_PATHS = 0.2  # stochastic depth: probability at the last block, with linear growth from 0
_SQUEEZE = 4  # ratio of the block's input channels to those of its squeeze
_IMAGENET_CLASSES = 1000


class Stage(NamedTuple):
    """Blocks of one kind; a row of table 1 in arXiv 1905.11946."""

    expansion: int
    kernel: int
    stride: int  # of its first block
    channels: int
    blocks: int


_STAGES = (
    Stage(expansion=1, kernel=3, stride=1, channels=16, blocks=1),
    Stage(expansion=6, kernel=3, stride=2, channels=24, blocks=2),
    Stage(expansion=6, kernel=5, stride=2, channels=40, blocks=2),
    Stage(expansion=6, kernel=3, stride=2, channels=80, blocks=3),
    Stage(expansion=6, kernel=5, stride=1, channels=112, blocks=3),
    Stage(expansion=6, kernel=5, stride=2, channels=192, blocks=4),
    Stage(expansion=6, kernel=3, stride=1, channels=320, blocks=1),
)


class Chain(nn.ModuleList):
    """Runs its parts in order, and stops as soon as `taps` is complete."""

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        for i, part in enumerate(self):
            x = part(x, taps, f"{name}.{i}")
            if taps.complete:
                return x
        taps(name, x)
        return x


class ConvNorm(nn.ModuleList):
    """Convolution, batch norm and, optionally, SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, activate: bool = True
    ) -> None:
        convolution = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        super().__init__([convolution, nn.BatchNorm2d(outputs), *([nn.SiLU()] if activate else [])])

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride), rounded up."""
        convolution, *rest = self
        x = convolution(x)
        taps(f"{name}.0", x)  # before the norm, as avex's hook has it
        if taps.complete:
            return x
        for part in rest:
            x = part(x)
        # The activation works in place in avex.
        for i in range(1, len(self)):
            taps(f"{name}.{i}", x)
        taps(name, x)
        return x


class SqueezeExcite(nn.Module):
    """Scales each channel by a gain that is computed from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        means = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        taps(f"{name}.avgpool", means)
        squeezed = nn.functional.silu(self.fc1(means))
        # The activation works in place in avex.
        taps(f"{name}.fc1", squeezed)
        taps(f"{name}.activation", squeezed)
        widened = self.fc2(squeezed)
        taps(f"{name}.fc2", widened)
        gains = widened.sigmoid()
        taps(f"{name}.scale_activation", gains)
        x = x * gains
        taps(name, x)
        return x


class Bottleneck(nn.Module):
    """Inverted bottleneck: widen, filter each channel, scale, narrow; with a residual if the shape is kept."""

    def __init__(self, stage: Stage, inputs: int, stride: int, dropped: float) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        widening = [ConvNorm(inputs, wide, 1)] if stage.expansion > 1 else []
        self.block = Chain(
            [
                *widening,
                ConvNorm(wide, wide, stage.kernel, stride=stride, groups=wide),
                SqueezeExcite(wide, max(1, inputs // _SQUEEZE)),
                ConvNorm(wide, stage.channels, 1, activate=False),
            ]
        )
        self.residual = stride == 1 and inputs == stage.channels
        self.last_part = len(self.block) - 1
        self.dropped = dropped

    def forward(self, x: Tensor, taps: Taps, name: str) -> Tensor:
        """(B, C, H, W) → (B, C', H / stride, W / stride), rounded up."""
        found = self.block(x, taps, f"{name}.block")
        drops = self.training and self.dropped > 0
        held = set()
        if self.residual and not drops:
            # The residual is added in place in avex, so the layers at the end of the branch are the sum.
            last = f"{name}.block.{self.last_part}"
            held = {f"{name}.block", last, f"{last}.1"} & taps.found.keys()
        if taps.complete and not held:
            return found
        if self.residual:
            x = x + (self._drop(found) if drops else found)
            taps(f"{name}.stochastic_depth", x)
        else:
            x = found
        taps.found.update(dict.fromkeys(held, x))
        taps(name, x)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        # Stochastic depth: some clips skip the branch, for the others it is scaled up. Drawn as in torchvision, so
        # that a seed has the same effect.
        kept = torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.dropped)
        return x * kept.div_(1 - self.dropped)


class EfficientNet(nn.Module):
    """Convolutions from the image to the last feature map, and a classifier that `forward` doesn't use."""

    def __init__(self, variant: Variant, num_classes: int) -> None:
        super().__init__()
        depths = [math.ceil(_DEPTH[variant] * stage.blocks) for stage in _STAGES]
        parts: list[nn.Module] = [ConvNorm(3, _STEM_CHANNELS, 3, stride=2)]
        channels, built = _STEM_CHANNELS, 0
        for stage, depth in zip(_STAGES, depths, strict=True):
            blocks = []
            for i in range(depth):
                dropped = _DROPPED_PATHS * built / sum(depths)
                blocks.append(Bottleneck(stage, channels, stage.stride if i == 0 else 1, dropped))
                channels, built = stage.channels, built + 1
            parts.append(Chain(blocks))
        self.features = Chain([*parts, ConvNorm(channels, _TOP_CHANNELS, 1)])
        self.classifier: nn.Sequential | None = nn.Sequential(
            nn.Dropout(_DROPOUT), nn.Linear(_TOP_CHANNELS, num_classes)
        )

    def forward(self, image: Tensor, taps: Taps) -> Tensor:
        """(B, 3, n_mels, frames) → the last feature map (B, 1280, n_mels / 32, frames / 32), rounded up.

        The image is a spectrogram, repeated for the three channels. The pass offers its layers to `taps`, and stops
        as soon as that is complete.
        """
        x = self.features(image, taps, "model.features")
        if taps.wants("model.avgpool"):
            taps("model.avgpool", self.pool(x))
        taps(BACKBONE, x)
        return x

    @staticmethod
    def pool(x: Tensor) -> Tensor:
        """Mean over frequency and time, (B, C, 1, 1)."""
        return x.mean(dim=(2, 3), keepdim=True)


class EfficientNetModel(ModelBase):
    """EfficientNet as a model: waveform to the last feature map, or to logits if it has a classifier.

    Discoverable layers are convolutions, before their norm: the first, ``model.features.0.0``, the last,
    ``model.features.8.0``, and the last of each bottleneck, ``model.features.{i}.{j}.block.3.0``. Blocks of the
    first stage don't widen, so theirs is ``….block.2.0``, which as in avex is not discoverable. Further layers by
    name: all other parts of torchvision's network, such as ``model.features.{i}`` (output of a stage),
    ``model.features.{i}.{j}`` (of a block), norms, activations and the parts that compute the gains;
    ``model.avgpool`` (mean over frequency and time); and ``backbone`` (the last feature map).

    Padding masks are accepted and, as in avex, not used.
    """

    trunk_name: ClassVar[str] = "model"

    def __init__(
        self,
        num_classes: int | None = None,
        pretrained: bool = False,
        device: str = "cpu",
        audio_config: AudioConfig | None = None,
        return_features_only: bool = False,
        efficientnet_variant: Variant = "b0",
    ) -> None:
        """Build it with random weights.

        Args:
            num_classes: of the classifier; None: features only.
            pretrained: must be False: weights come from `load_model`.
            device: where to put it.
            audio_config: settings of the spectrogram, see `Spectrogram`.
            return_features_only: return the feature map. The module still has a classifier, by default ImageNet's
                with 1000 classes, because avex's state dicts have one.
            efficientnet_variant: ``b0`` or ``b1``.

        Raises:
            ValueError: no audio_config, or an unsuitable one.
        """
        super().__init__(device=device, audio_config=audio_config)
        refuse_pretrained(pretrained)
        if self.audio_spectrogram is None:
            raise ValueError(
                "EfficientNet needs an audio_config with representation 'mel_spectrogram' for its image; set it in "
                "the ModelSpec"
            )
        self.num_classes = num_classes
        self.return_features_only = return_features_only or num_classes is None
        classes = _IMAGENET_CLASSES if return_features_only or num_classes is None else num_classes
        self.model = EfficientNet(efficientnet_variant, classes)
        self.channels = 3  # of the image, all equal
        self.to(device)

    @property
    def embedding_settings(self) -> str:
        """See `ModelBase.embedding_settings`."""
        return f"{self._front_end().settings}\n"

    @property
    def shortest_samples(self) -> int:
        """See `ModelBase.shortest_samples`: one frame."""
        return self._front_end().shortest_samples

    def get_model_layers(self) -> list[str]:
        """See `ModelBase.get_model_layers`."""
        ends = ("model.features.0.0", f"model.features.{len(_STAGES) + 1}.0")
        return [name for name in self._parts() if name in ends or name.endswith(".block.3.0")]

    def tappable_layers(self) -> list[str]:
        """See `ModelBase.tappable_layers`."""
        return [*self._parts(), "model.avgpool", BACKBONE]

    def taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """See `ModelBase.taps`; the mask is not used."""
        taps = Taps(layers)
        self.model(self.process_audio(wave), taps)
        return taps.found

    def token_mask(self, padding_mask: Tensor, tokens: int) -> Tensor:
        """See `ModelBase.token_mask`. A step is padded if the centres of all its frames are."""
        samples = padding_mask.shape[-1]
        front_end = self._front_end()
        frames = front_end.frames(samples)
        # Each stride of two rounds up, so the total stride is the power of two that yields `tokens` steps.
        stride = 1 << max(0, -(-frames // tokens) - 1).bit_length()
        centres = torch.arange(frames, device=padding_mask.device) * front_end.hop_length
        if not front_end.center:
            centres = centres + front_end.n_fft // 2
        padded = padding_mask.bool()[:, centres.clamp(max=samples - 1)]  # (B, frames)
        padded = nn.functional.pad(padded, (0, stride * tokens - frames), value=True)
        return padded.reshape(-1, tokens, stride).all(dim=-1)

    def process_audio(self, x: Tensor) -> Tensor:
        """The spectrogram of waveforms (B, S) or (S,) as an image (B, 3, n_mels, frames); errors as in `forward`."""
        wave, front_end = self._waveform(x), self._front_end()
        if not is_tracing() and wave.shape[-1] < front_end.shortest_samples:
            raise RuntimeError(
                f"{wave.shape[-1]} samples are too few: the spectrogram needs {front_end.shortest_samples}; pad the "
                "clip"
            )
        return front_end(wave)[:, None].expand(-1, self.channels, -1, -1)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The last feature map (B, 1280, n_mels / 32, frames / 32), rounded up, or logits (B, classes) of its mean.

        Args:
            x: (B, S) in [-1, 1] at the model's sample rate.
            padding_mask: accepted, not used.

        Raises:
            RuntimeError: fewer samples than the spectrogram needs.
            ValueError: no audio.
        """
        features = self.model(self.process_audio(x), Taps([BACKBONE]))
        if self.return_features_only or self.model.classifier is None:
            return features
        return self.model.classifier(self.model.pool(features).flatten(1))

    def _front_end(self) -> Spectrogram:
        assert self.audio_spectrogram is not None
        return self.audio_spectrogram

    def _parts(self) -> list[str]:
        """Names of all parts that offer their output to `taps`, in the order of a pass."""
        names = []
        for name, module in self.model.features.named_modules(prefix="model.features"):
            names.append(name)
            if isinstance(module, SqueezeExcite):
                names += [f"{name}.{part}" for part in ("avgpool", "activation", "scale_activation")]
            if isinstance(module, Bottleneck) and module.residual:
                names.append(f"{name}.stochastic_depth")
        return names


Model = EfficientNetModel  # avex's name
