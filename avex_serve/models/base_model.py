"""`ModelBase`, the interface of every backbone: embeddings by layer name. And any torch module adapted to it."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avex_serve.configs import Aggregation, AudioConfig
from avex_serve.models.aggregation import concatenate
from avex_serve.models.frontends import AudioProcessor
from avex_serve.models.layers import (
    BACKBONE,
    capture,
    frozen,
    is_tracing,
    last_layer,
    measure_batch_axes,
    resolve_layers,
    tap_by_hooks,
)


class ModelBase(nn.Module):
    """A backbone: waveforms in, embeddings by layer name out.

    A subclass needs only `forward`, as in avex's documentation. Its discoverable layers are its linear submodules.
    Any submodule can be tapped by name: `taps` captures it with a hook during one forward pass. The architectures
    here override `get_model_layers`, `tappable_layers` and `taps`, and compute their layers without hooks.

    Attributes:
        audio_config: the audio that it expects, or None if unknown.
        audio_processor: applies `audio_config` to a waveform, under avex's name; None without an `audio_config`.
        label_mapping: ``{"label_to_index": …, "index_to_label": …}`` of a loaded classifier, else None.
        checkpoint_uri: URI of its weights, with the hub's revision; None for local files.
        trunk_name: name of the submodule that computes the embeddings. Checkpoints may omit it in their names.
        fills_clips: whether the model pads short clips itself, so that a layer has steps without audio.
    """

    trunk_name: ClassVar[str] = "backbone"
    fills_clips: ClassVar[bool] = False

    def __init__(self, device: str = "cpu", audio_config: AudioConfig | Mapping[str, Any] | None = None) -> None:
        """Set up the common attributes; `audio_config` may be a mapping of its fields."""
        super().__init__()
        self.device = device
        self.audio_config = AudioConfig(**audio_config) if isinstance(audio_config, Mapping) else audio_config
        self.audio_processor = None if self.audio_config is None else AudioProcessor(self.audio_config)
        # A submodule, so that it moves with the model.
        self.audio_spectrogram = None if self.audio_processor is None else self.audio_processor.spectrogram
        self.label_mapping: dict[str, dict[Any, Any]] | None = None
        self.checkpoint_uri: str | None = None
        self._hook_layers: list[str] = []
        # A subclass written for avex may read these in its own extract_embeddings.
        self._hooks: dict[str, RemovableHandle] = {}
        self._hook_outputs: dict[str, Tensor] = {}
        self._layer_names: list[str] = []
        self.tap_pooling: nn.Module | None = None  # in an exported copy: reduces tapped layers by name
        self._batch_axes: dict[str, int] | None = None  # see `fix_batch_axes`

    @property
    def called_module(self) -> nn.Module:
        """The module that is called and that checkpoints are for: the model itself, or the module that it wraps."""
        return self

    def get_model_layers(self) -> list[str]:
        """The discoverable layers in order. Indices in ``target_layers`` refer to this list."""
        self._discover_embedding_layers()
        return list(self._layer_names)

    def _discover_embedding_layers(self) -> None:
        # A subclass written for avex may override this method to fill the list with other layers.
        self._layer_names = [name for name, part in self.named_modules() if isinstance(part, nn.Linear)]

    def tappable_layers(self) -> list[str]:
        """Every name that `taps` accepts: the discoverable layers and the others."""
        return [BACKBONE, *(name for name, _ in self.called_module.named_modules() if name)]

    def taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """Outputs of layers by name, batch first.

        Args:
            wave: (B, S) or (S,) in [-1, 1] at the model's sample rate.
            layers: names among `tappable_layers`.
            padding_mask: (B, S) bool, True where a sample is padding.
            as_if_alone: apply the mask so that each clip has the same output as alone and without padding, in the
                steps that `token_mask` doesn't mask, as far as the architecture allows. Otherwise apply it as avex
                does.

        Returns:
            (B, T, D) for a sequence, (B, C, H, W) for a feature map.

        Raises:
            ValueError: no audio, or a layer that a forward pass doesn't reach.
        """
        return tap_by_hooks(self.called_module, self._batch(wave), layers, padding_mask, self._batch_axes)

    def probe_embeddings(
        self,
        wave: Tensor,
        layers: Sequence[str],
        aggregation: Aggregation = "none",
        padding_mask: Tensor | None = None,
        *,
        freeze_backbone: bool = False,
    ) -> list[Tensor]:
        """A probe's input: the aggregated layers side by side, (B, sum of D); for ``none`` one tensor per layer.

        Arguments and errors are those of `taps` and `extract_embeddings`. If a subclass has its own
        `extract_embeddings`, that method is called, as avex's probes do, and its result is used unchanged.
        """
        if self.has_own_extraction():
            options = {"padding_mask": padding_mask, "aggregation": aggregation, "freeze_backbone": freeze_backbone}
            found = self._call_own_extraction(wave, layers, options)
        else:
            tapped = self.pooled_taps(wave, self.resolve_layers(layers), padding_mask)
            found = concatenate([tapped[name] for name in layers], aggregation)
        return [found] if isinstance(found, Tensor) else list(found)

    def pooled_taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """See `taps`. In an exported copy, `tap_pooling` reduces the layers."""
        tapped = self.taps(wave, layers, padding_mask, as_if_alone=as_if_alone)
        return tapped if self.tap_pooling is None else self.tap_pooling(tapped)

    def token_mask(self, padding_mask: Tensor, tokens: int) -> Tensor:
        """The padding mask (B, S) converted to the time steps of an embedding, (B, tokens).

        True for steps that the clip alone, without padding, wouldn't have. Not every class implements it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no padding mask for tokens; override token_mask")

    def fix_batch_axes(self, samples: int, layers: Sequence[str]) -> None:
        """Measure once on which axis `taps` finds the batch. A traced pass can't: its sizes are not numbers."""
        if type(self).taps is ModelBase.taps and not self.has_own_extraction():
            silence = self._batch(torch.zeros(1, samples))
            self._batch_axes = measure_batch_axes(self.called_module, silence, layers)

    @property
    def embedding_settings(self) -> str:
        """Settings that affect the embedding and don't show in the tensors, as text for the fingerprint."""
        return ""

    @property
    def clip_samples(self) -> int:
        """Samples of a clip, from the audio configuration. Raises ValueError if that has no length."""
        samples = getattr(self.audio_processor, "target_length", None)
        if self.audio_config is None and isinstance(samples, int):  # a subclass written for avex
            return samples
        if self.audio_config is None or self.audio_config.target_length_seconds is None:
            raise ValueError(
                "target_length is not given, and the model's audio_config has no target_length_seconds; "
                "give target_length in samples"
            )
        return self.audio_config.target_length_seconds * self.audio_config.sample_rate

    @property
    def shortest_samples(self) -> int:
        """Samples of the shortest clip that the model accepts; 1 if no minimum is known."""
        return 1

    @property
    def last_layer_name(self) -> str:
        """The layer that the selector ``last_layer`` means."""
        return last_layer(self.get_model_layers())

    def resolve_layers(self, target_layers: Sequence[str | int]) -> list[str]:
        """Layer names for ``target_layers``; errors as in `avex_serve.models.layers.resolve_layers`."""
        return resolve_layers(target_layers, self.get_model_layers(), self.tappable_layers())

    def process_audio(self, x: Tensor) -> Tensor:
        """Apply `audio_processor` to the waveform (B, S) or (S,), on the model's device; without one, x itself.

        Returns (B, S), or (B, F, frames) if `audio_config` has a spectrogram. Raises ValueError for an empty tensor.
        """
        wave = self._on_device(x)
        return wave if self.audio_processor is None else self.audio_processor(wave)

    def _waveform(self, x: Tensor) -> Tensor:
        """The waveform (B, S) on the model's device; (S,) becomes (1, S); ValueError for another rank."""
        if x is not None and x.ndim not in (1, 2):
            raise ValueError(f"waveform of shape {tuple(x.shape)}; expected (batch, samples) or (samples,)")
        return self._batch(x)

    def _batch(self, x: Tensor) -> Tensor:
        """The input on the model's device; (S,) becomes (1, S), other shapes are left to the network."""
        wave = self._on_device(x)
        return wave[None] if wave.ndim == 1 else wave

    def batch_inference(self, batched_samples: Tensor) -> Tensor:
        """Outputs of the rows of (B, S), or of the batches of (N, B, S), run one by one as in avex; concatenated."""
        outputs = [self(self._batch(row)) for row in batched_samples]
        return torch.cat([output[None] if output.ndim == 1 else output for output in outputs])

    def enable_gradient_checkpointing(self) -> None:
        """Raise NotImplementedError: no architecture here supports it."""
        raise NotImplementedError(f"{type(self).__name__} doesn't support gradient checkpointing")

    def _on_device(self, x: Tensor) -> Tensor:
        if x is None:
            raise ValueError("Input tensor cannot be None; give a waveform of shape (batch, samples)")
        if not is_tracing() and x.numel() == 0:
            raise ValueError(f"Audio tensor cannot be empty, got shape {tuple(x.shape)}")
        parameter = next(self.parameters(), None)
        device = x.device if parameter is None else parameter.device
        return x if x.device == device else x.to(device)  # a traced `to` would fix the device

    # -- embeddings as in avex: choose the layers first, then extract ----------------------------------------

    def get_model_layer_map(self) -> dict[int, str]:
        """The discoverable layers by index."""
        return dict(enumerate(self.get_model_layers()))

    def register_hooks_for_layers(self, target_layers: Sequence[str | int]) -> list[str]:
        """Choose the layers for `extract_embeddings` and return their names; errors as in `resolve_layers`."""
        self.deregister_all_hooks()
        self._hook_layers = self.resolve_layers(target_layers)
        return list(self._hook_layers)

    def deregister_all_hooks(self) -> None:
        """Forget the layers chosen for `extract_embeddings`."""
        self._hook_layers = []
        self._remove_hooks()

    def ensure_hooks_registered(self) -> None:
        """Register hooks on the chosen layers, for a subclass that reads ``_hook_outputs`` after a pass."""
        parts = dict(self.named_modules())
        for name in self._hook_layers:
            if name not in parts:
                raise ValueError(f"Layer '{name}' not found in model")
            if name not in self._hooks:
                self._hooks[name] = capture(parts[name], name, self._hook_outputs)

    def _clear_hook_outputs(self) -> None:
        self._hook_outputs.clear()

    def _remove_hooks(self) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._hook_outputs.clear()

    def extract_embeddings(
        self,
        x: Tensor | Mapping[str, Tensor],
        *,
        padding_mask: Tensor | None = None,
        aggregation: Aggregation = "none",
        freeze_backbone: bool | None = None,
    ) -> Tensor | list[Tensor]:
        """Embeddings of the layers chosen with `register_hooks_for_layers`.

        Args:
            x: (B, S), or ``{"raw_wav": (B, S), "padding_mask": (B, S)}``.
            padding_mask: (B, S) bool, True where padded.
            aggregation: see `avex_serve.models.aggregation.aggregate`; it always includes padding.
            freeze_backbone: compute in eval mode and without gradients. None: True for the architectures here, and
                False for other models, as in avex.

        Returns:
            Aggregated: (B, D), several layers side by side. ``none``: a list, or the tensor of a single layer.

        Raises:
            ValueError: no layers chosen, or no audio.
        """
        wave, mask = unpack_audio(x, padding_mask)
        if not self._hook_layers:
            raise ValueError("No layers are chosen. Call register_hooks_for_layers() first.")
        own_taps = type(self).taps is not ModelBase.taps
        freeze = own_taps if freeze_backbone is None else freeze_backbone
        with frozen(self) if freeze else contextlib.nullcontext():
            found = self.taps(wave, self._hook_layers, mask)
        return concatenate([found[name] for name in self._hook_layers], aggregation)

    # -- a subclass's own extract_embeddings ---------------------------------------------------------------------

    def has_own_extraction(self) -> bool:
        """Whether a subclass overrides `extract_embeddings`."""
        return type(self).extract_embeddings is not ModelBase.extract_embeddings

    def _call_own_extraction(
        self, wave: Tensor, layers: Sequence[str], options: dict[str, Any]
    ) -> Tensor | Sequence[Tensor]:
        # avex's base class has no freeze_backbone, so a subclass may lack it.
        known = inspect.signature(self.extract_embeddings).parameters
        selected, self._hook_layers = self._hook_layers, list(layers)
        try:
            return self.extract_embeddings(
                self._batch(wave), **{name: value for name, value in options.items() if name in known}
            )
        finally:
            self._hook_layers = selected
            self._remove_hooks()


@runtime_checkable
class Backbone(Protocol):
    """What a torch module must have to carry a probe. avex's models have it.

    Two attributes are optional. ``audio_config`` (`AudioConfig`, or a mapping of its fields) has the sample rate and
    the length of a clip. Without it, a probe needs ``target_length`` and can't be exported. ``audio_processor`` has
    the same in avex's models (``sr`` or ``sample_rate``, ``target_length_seconds``).
    """

    def __call__(self, wave: Tensor, padding_mask: Tensor | None = None, /) -> Any:
        """A forward pass on (B, S) in [-1, 1], with or without a mask (B, S) bool, True where padded."""

    def get_model_layers(self) -> list[str]:
        """Names of submodules, in the order that ``all`` and indices in ``target_layers`` refer to."""


class AdaptedBackbone(ModelBase):
    """Wraps a torch module that fulfils `Backbone` and isn't a `ModelBase`. The module itself isn't changed."""

    def __init__(self, module: nn.Module) -> None:
        parameter = next(module.parameters(), None)
        device = "cpu" if parameter is None else str(parameter.device)
        super().__init__(device=device, audio_config=_audio_config(module))
        self.module = module
        self.training = module.training

    @property
    def called_module(self) -> nn.Module:
        """The adapted module."""
        return self.module

    def get_model_layers(self) -> list[str]:
        """See `ModelBase.get_model_layers`."""
        assert isinstance(self.module, Backbone)
        return list(self.module.get_model_layers())

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Any:
        """The module's output for waveforms (B, S)."""
        return self.module(x) if padding_mask is None else self.module(x, padding_mask)


def adapt(model: object) -> ModelBase:
    """The model itself if it is a `ModelBase`, else an `AdaptedBackbone`. ValueError if it can't be adapted."""
    if isinstance(model, ModelBase):
        return model
    if not (isinstance(model, nn.Module) and isinstance(model, Backbone)):
        raise ValueError(
            f"Model must be an instance of ModelBase, got {type(model)}; or a torch module that names its layers in "
            "get_model_layers()"
        )
    return AdaptedBackbone(model)


def _audio_config(module: nn.Module) -> AudioConfig | None:
    config = getattr(module, "audio_config", None)
    if isinstance(config, AudioConfig):
        return config
    if isinstance(config, Mapping):
        return AudioConfig(**config)
    processor = getattr(module, "audio_processor", None)
    rate = getattr(processor, "sr", None) or getattr(processor, "sample_rate", None)
    if rate is None:
        return None
    seconds = getattr(processor, "target_length_seconds", None)
    fields = {"sample_rate": rate, "representation": "raw", "target_length_seconds": seconds}
    return AudioConfig.model_validate(fields)


def unpack_audio(x: Tensor | Mapping[str, Tensor], padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Waveform and mask of a tensor or of ``{"raw_wav": …, "padding_mask": …}``. ValueError without audio."""
    if isinstance(x, Mapping):
        if "raw_wav" not in x:
            raise ValueError(f"the input has keys {sorted(x)}; expected 'raw_wav' with the waveform")
        return x["raw_wav"], x.get("padding_mask", padding_mask)
    return x, padding_mask


def require_raw(audio_config: AudioConfig | None, name: str) -> None:
    """Raise ValueError for audio_config that asks for a spectrogram, if the model of that name computes its own."""
    if audio_config is not None and audio_config.representation != "raw":
        raise ValueError(
            f"audio_config.representation is {audio_config.representation!r}, but {name} has its own front end; "
            "set 'raw'"
        )


def refuse_pretrained(pretrained: bool) -> None:
    """Raise ValueError if a model class is called with ``pretrained=True``. avex's classes download weights then."""
    if pretrained:
        raise ValueError(
            "pretrained is True, but a model class has random weights only; set pretrained=False, or load a model "
            "with its weights by load_model()"
        )
