"""What every backbone can do, whatever its architecture: give embeddings by layer name."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from avex_serve.configs import Aggregation, AudioConfig
from avex_serve.models.aggregation import concatenate
from avex_serve.models.frontends import AudioProcessor
from avex_serve.models.hooks import frozen, keep_listening, measure_batch_axes, tap_by_hooks
from avex_serve.models.layers import BACKBONE, last_layer, resolve_layers
from avex_serve.models.tracing import is_tracing


class ModelBase(nn.Module):
    """A backbone: waveforms in, embeddings by layer name out.

    The architectures here say which layers they have and compute them without hooks: they override
    `get_model_layers`, `tappable_layers` and `taps`. A subclass with no more than `forward`, as avex's
    documentation shows them, works too: its layers are its linear submodules, any submodule can be named, and `taps`
    listens to them during one forward pass. Everything else follows: the surface that avex's models have
    (`get_model_layers`, `register_hooks_for_layers`, `extract_embeddings`).

    Attributes:
        audio_config: what audio it expects, or None if that is not known.
        audio_processor: what `audio_config` makes of a waveform, under avex's name; None without one.
        label_mapping: ``{"label_to_index": …, "index_to_label": …}`` of a loaded classifier, else None.
        checkpoint_uri: URI that its weights were loaded from, with the hub's revision; None for local files.
        trunk_name: name of the submodule that makes the embeddings; checkpoints may leave it out of their names.
        fills_clips: whether short clips are filled up inside the model, so that a layer has steps that hear nothing.
    """

    trunk_name: ClassVar[str] = "backbone"
    fills_clips: ClassVar[bool] = False

    def __init__(self, device: str = "cpu", audio_config: AudioConfig | Mapping[str, Any] | None = None) -> None:
        """Start a model.

        Args:
            device: where it is.
            audio_config: what audio it expects, or the fields of that.
        """
        super().__init__()
        self.device = device
        self.audio_config = AudioConfig(**audio_config) if isinstance(audio_config, Mapping) else audio_config
        self.audio_processor = None if self.audio_config is None else AudioProcessor(self.audio_config)
        # A submodule, so that it moves with the model.
        self.audio_spectrogram = None if self.audio_processor is None else self.audio_processor.spectrogram
        self.label_mapping: dict[str, dict[Any, Any]] | None = None
        self.checkpoint_uri: str | None = None
        self._hook_layers: list[str] = []
        # For a subclass that brings its own extract_embeddings and reads these, as those written for avex do.
        self._hooks: dict[str, RemovableHandle] = {}
        self._hook_outputs: dict[str, Tensor] = {}
        self._layer_names: list[str] = []
        self.tap_pooling: nn.Module | None = None  # reduces tapped layers by name, in an exported copy
        self._batch_axes: dict[str, int] | None = None  # see `fix_batch_axes`

    @property
    def called_module(self) -> nn.Module:
        """The module that is called and that checkpoints are for: the model itself, unless it adapts another."""
        return self

    def get_model_layers(self) -> list[str]:
        """The discoverable layers in order; indices in ``target_layers`` count along this list."""
        self._discover_embedding_layers()
        return list(self._layer_names)

    def _discover_embedding_layers(self) -> None:
        # A subclass written for avex overrides this to choose its layers, and fills this list.
        self._layer_names = [name for name, part in self.named_modules() if isinstance(part, nn.Linear)]

    def tappable_layers(self) -> list[str]:
        """Every name that `taps` knows: the discoverable layers and those that must be named."""
        return [BACKBONE, *(name for name, _ in self.called_module.named_modules() if name)]

    def taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None, *, as_if_alone: bool = False
    ) -> dict[str, Tensor]:
        """Outputs of layers by name, batch first.

        Args:
            wave: (B, S) or (S,) in [-1, 1] at the model's sample rate.
            layers: names among `tappable_layers`.
            padding_mask: (B, S) bool, True where a sample is padding.
            as_if_alone: use the mask so that each clip gets what it would get alone and without padding, in the
                steps that `token_mask` leaves, as far as the architecture can; else use it as avex does.

        Returns:
            (B, T, D) of a sequence, (B, C, H, W) of a feature map.

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
        """What a probe reads: the layers aggregated, side by side, (B, sum of D); for ``none`` one tensor a layer.

        A subclass that brings its own `extract_embeddings` is asked through it, as avex's probes do, and what it
        gives is taken as it comes.

        Args:
            wave: see `taps`.
            layers: see `taps`.
            aggregation: see `avex_serve.models.aggregation.aggregate`; padding is never left out of it.
            padding_mask: see `taps`.
            freeze_backbone: told to a subclass's own extraction.

        Raises:
            ValueError: see `taps`.
        """
        if self.has_own_extraction():
            found = self._extracted(wave, layers, padding_mask, aggregation, freeze_backbone)
        else:
            tapped = self.pooled_taps(wave, self.resolve_layers(layers), padding_mask)
            found = concatenate([tapped[name] for name in layers], aggregation)
        return [found] if isinstance(found, Tensor) else list(found)

    def pooled_taps(
        self, wave: Tensor, layers: Sequence[str], padding_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See `taps`; in an exported copy the layers are reduced in time as far as `tap_pooling` does it."""
        tapped = self.taps(wave, layers, padding_mask)
        return tapped if self.tap_pooling is None else self.tap_pooling(tapped)

    def token_mask(self, padding_mask: Tensor, tokens: int) -> Tensor:
        """The padding mask (B, S) brought to the time steps of an embedding, (B, tokens).

        True for those that the clip alone, without padding, wouldn't have.

        Raises:
            NotImplementedError: the architecture doesn't honour masks.
        """
        raise NotImplementedError(f"{type(self).__name__} has no padding mask at the level of tokens")

    def fix_batch_axes(self, samples: int, layers: Sequence[str]) -> None:
        """Find out once where the batch is in the layers, for clips of so many samples; see `taps`.

        In a traced graph the size of the batch is no number that could tell.
        """
        if type(self).taps is ModelBase.taps and not self.has_own_extraction():
            silence = self._batch(torch.zeros(1, samples))
            self._batch_axes = measure_batch_axes(self.called_module, silence, layers)

    @property
    def embedding_settings(self) -> str:
        """What makes the embedding beside the tensors and can't be seen in them, as text for the fingerprint."""
        return ""

    @property
    def clip_samples(self) -> int:
        """Samples of a clip as the audio configuration says.

        Raises:
            ValueError: it doesn't say.
        """
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
    def last_layer_name(self) -> str:
        """The layer that ``last_layer`` means."""
        return last_layer(self.get_model_layers())

    def resolve_layers(self, target_layers: Sequence[str | int]) -> list[str]:
        """Concrete names for ``target_layers``; see `avex_serve.models.layers.resolve_layers`."""
        return resolve_layers(target_layers, self.get_model_layers(), self.tappable_layers())

    def process_audio(self, x: Tensor) -> Tensor:
        """What `audio_processor` makes of the waveform (B, S) or (S,), on the model's device.

        Returns:
            (B, S), or (B, F, frames) if `audio_config` asks for a spectrogram; without an audio_config x itself.

        Raises:
            ValueError: no tensor, or an empty one.
        """
        wave = self._placed(x)
        return wave if self.audio_processor is None else self.audio_processor(wave)

    def _waveform(self, x: Tensor) -> Tensor:
        """The waveform (B, S) on the model's device; (S,) becomes (1, S); ValueError for another rank."""
        if x is not None and x.ndim not in (1, 2):
            raise ValueError(f"waveform of shape {tuple(x.shape)}; expected (batch, samples) or (samples,)")
        return self._batch(x)

    def _batch(self, x: Tensor) -> Tensor:
        """The input on the model's device; (S,) becomes (1, S), other shapes are the network's affair."""
        wave = self._placed(x)
        return wave[None] if wave.ndim == 1 else wave

    def batch_inference(self, batched_samples: Tensor) -> Tensor:
        """Outputs of the model for the rows of a batch, one by one, as avex's models have it.

        Args:
            batched_samples: (B, S), or several batches (N, B, S).

        Returns:
            The outputs, one after the other along the first axis.
        """
        outputs = [self(self._batch(row)) for row in batched_samples]
        return torch.cat([output[None] if output.ndim == 1 else output for output in outputs])

    def enable_gradient_checkpointing(self) -> None:
        """Raise NotImplementedError: no architecture here trades time for memory in training."""
        raise NotImplementedError(f"{type(self).__name__} doesn't support gradient checkpointing")

    def _placed(self, x: Tensor) -> Tensor:
        if x is None:
            raise ValueError("Input tensor cannot be None; give a waveform of shape (batch, samples)")
        if not is_tracing() and x.numel() == 0:  # sizes are no numbers while a graph is traced
            raise ValueError(f"Audio tensor cannot be empty, got shape {tuple(x.shape)}")
        parameter = next(self.parameters(), None)
        device = x.device if parameter is None else parameter.device
        return x if x.device == device else x.to(device)  # a traced move would name the device

    # -- avex's way to embeddings: choose the layers first, then extract -------------------------------------

    def get_model_layer_map(self) -> dict[int, str]:
        """The discoverable layers by index."""
        return dict(enumerate(self.get_model_layers()))

    def register_hooks_for_layers(self, target_layers: Sequence[str | int]) -> list[str]:
        """Choose the layers for `extract_embeddings` and return their names; no hook is involved.

        Raises:
            TypeError: a bool among the layers.
            ValueError: no layer, an index out of range, or a name that is not there.
        """
        self.deregister_all_hooks()
        self._hook_layers = self.resolve_layers(target_layers)
        return list(self._hook_layers)

    def deregister_all_hooks(self) -> None:
        """Forget the layers chosen for `extract_embeddings`."""
        self._hook_layers = []
        self._stop_listening()

    def ensure_hooks_registered(self) -> None:
        """Listen to the chosen layers, for an own `extract_embeddings` that reads ``_hook_outputs`` after a pass."""
        for name in self._hook_layers:
            if name not in self._hooks:
                self._hooks[name] = keep_listening(self, name, self._hook_outputs)

    def _clear_hook_outputs(self) -> None:
        self._hook_outputs.clear()

    def _stop_listening(self) -> None:
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
            aggregation: see `avex_serve.models.aggregation.aggregate`; padding is never left out of it.
            freeze_backbone: compute in eval mode and without gradients; None: so for the architectures here, while
                gradients flow through other models, as in avex.

        Returns:
            Aggregated: (B, D), several layers side by side. ``none``: a list, or the tensor of one layer.

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

    # -- a subclass's own way to embeddings ----------------------------------------------------------------------

    def has_own_extraction(self) -> bool:
        """Whether a subclass brings its own `extract_embeddings`."""
        return type(self).extract_embeddings is not ModelBase.extract_embeddings

    def _extracted(
        self,
        wave: Tensor,
        layers: Sequence[str],
        padding_mask: Tensor | None,
        aggregation: Aggregation,
        freeze_backbone: bool,
    ) -> Tensor | Sequence[Tensor]:
        options: dict[str, Any] = {
            "padding_mask": padding_mask,
            "aggregation": aggregation,
            "freeze_backbone": freeze_backbone,
        }
        # avex's base class doesn't have the last of these arguments, so a subclass may not.
        known = inspect.signature(self.extract_embeddings).parameters
        selected, self._hook_layers = self._hook_layers, list(layers)
        try:
            return self.extract_embeddings(
                self._batch(wave), **{name: value for name, value in options.items() if name in known}
            )
        finally:
            self._hook_layers = selected
            self._stop_listening()


def unpack_audio(x: Tensor | Mapping[str, Tensor], padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Waveform and mask of a tensor or of ``{"raw_wav": …, "padding_mask": …}``.

    Raises:
        ValueError: no audio there.
    """
    if isinstance(x, Mapping):
        if "raw_wav" not in x:
            raise ValueError(f"the input has keys {sorted(x)}; expected 'raw_wav' with the waveform")
        return x["raw_wav"], x.get("padding_mask", padding_mask)
    return x, padding_mask


def refuse_pretrained(pretrained: bool) -> None:
    """Raise ValueError if a class that is called directly is asked for weights, which avex's download."""
    if pretrained:
        raise ValueError(
            "pretrained is True, but a model class has random weights only; set pretrained=False, or load a model "
            "with its weights by load_model()"
        )
