"""Configurations, with avex's names, fields and defaults (avex 1.4): `ProbeConfig`, `ModelSpec`, `AudioConfig`.

They are strict: an unknown field is an error, and every field is read somewhere. This module needs no torch.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ProbeType = Literal["linear", "mlp", "attention", "lstm", "transformer"]
Aggregation = Literal["mean", "max", "cls_token", "none"]
InputProcessing = Literal["flatten", "sequence", "pooled", "none"]

SEQUENCE_PROBES: tuple[ProbeType, ...] = ("lstm", "attention", "transformer")

# avex requires `num_layers` for an attention probe, its documentation doesn't. 2 is the default of its class
# AttentionProbe.
DEFAULT_ATTENTION_LAYERS = 2


class AudioConfig(BaseModel):
    """The audio that a backbone expects."""

    model_config = ConfigDict(extra="forbid")

    sample_rate: int = Field(16000, gt=0, description="Hz")
    n_fft: int = Field(2048, gt=0, description="FFT length in samples, for spectrogram representations")
    hop_length: int | None = Field(None, gt=0, description="samples between frames; None: n_fft // 4")
    win_length: int | None = Field(None, gt=0, description="window in samples; None: n_fft")
    window: Literal["hann", "hamming"] = Field("hann", description="window function")
    n_mels: int = Field(128, gt=0, description="mel bins")
    representation: Literal["spectrogram", "mel_spectrogram", "raw"] = Field(
        "mel_spectrogram", description="input of the backbone; BEATs and EAT need raw"
    )
    normalize: bool = Field(True, description="log and min-max per clip, for spectrogram representations")
    target_length_seconds: int | None = Field(None, gt=0, description="length of a clip in seconds")
    window_selection: Literal["random", "center"] = Field(
        "random", description="the part of a longer recording that training uses"
    )
    center: bool = Field(True, description="centre the frames, for spectrogram representations")
    extra_config: dict[str, Any] | None = Field(None, description="free-form options of a custom model")


class ModelSpec(BaseModel):
    """Everything needed to build a backbone."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="architecture, a name in list_model_classes()")
    pretrained: bool = Field(True, description="whether load_model must find weights")
    device: Literal["cpu", "cuda"] = Field("cuda", description="used where no device is given")
    audio_config: AudioConfig | None = Field(None, description="the audio that the backbone expects")
    init_config: dict[str, Any] | None = Field(
        None,
        description="geometry and flags of the architecture, for BEATs the fields of BEATsConfig, "
        "for EAT those of EATConfig",
    )
    use_naturelm: bool | None = Field(None, description="BEATs: clamp the waveform to [-1, 1] first")
    fine_tuned: bool | None = Field(None, description="BEATs: the fine-tuned geometry, with a predictor")
    efficientnet_variant: Literal["b0", "b1"] = Field("b0", description="EfficientNet: which of the family")
    eat_cfg: dict[str, Any] | None = Field(None, description="EAT: the same as init_config, under avex's name")
    eat_norm_mean: float | None = Field(
        -4.268,
        description="EAT: subtracted from the log-mel features; avex uses this default even if its YAML has -5.553",
    )
    eat_norm_std: float | None = Field(
        4.569,
        gt=0,
        description="EAT: half the divisor of log-mel features; avex uses this default even if its YAML has 4.606",
    )
    # avex has these for other architectures. A registered class gets those that its constructor accepts.
    model_id: str = Field("worstchan/EAT-base_epoch30_pretrain", description="name of a model on the hub")
    fairseq_weights_path: str | None = Field(None, description="weights that fairseq wrote")
    pretraining_mode: bool | None = Field(None, description="whether the model is built for pre-training")
    handle_padding: bool | None = Field(None, description="whether the model uses padding masks")
    text_model_name: str | None = Field(None, description="text encoder of a model for audio and text")
    projection_dim: int | None = Field(None, description="common width of audio and text embeddings")
    temperature: float | None = Field(None, description="of the similarity between audio and text")
    language: str | None = Field(None, description="language of labels or text")
    extra_config: dict[str, Any] | None = Field(
        None, description="free-form options of a custom model whose class takes extra_config"
    )


class ProbeConfig(BaseModel):
    """Describes a probe: its head, the layers that it taps, and the way from their embeddings to the head.

    Rules, each an error that names the field, its value and the remedy:

    - ``input_processing="sequence"`` is for lstm, attention and transformer probes, and for
      ``aggregation="none"``; an aggregation that was not set follows from it.
    - mlp needs ``hidden_dims``; lstm ``lstm_hidden_size`` and ``num_layers``; attention ``num_heads`` and
      ``attention_dim`` (``num_layers`` is 2 if not set); transformer all three of these.
    - ``online_training=False`` needs ``freeze_backbone=True``.

    ``input_processing`` acts only if it was set. Otherwise an aggregated embedding is not changed, a linear or mlp
    head flattens an unaggregated one, and a sequence head reads it as a sequence. In a mapping of all fields, as
    written by avex and ``model_dump()``, the default ``pooled`` counts as not set. To keep a choice of it, write a
    config with ``model_dump(exclude_unset=True)``.
    """

    model_config = ConfigDict(extra="forbid")

    probe_type: ProbeType = Field("linear", description="kind of head")
    aggregation: Aggregation = Field(
        "mean",
        description="how the time axis of each tapped layer is reduced: its mean, its maximum, its first "
        "token, or not at all (none); several aggregated layers are concatenated, several unaggregated ones "
        "are merged with learned weights",
    )
    input_processing: InputProcessing = Field(
        "pooled",
        description="how an embedding is prepared for the head, if set: averaged over time (pooled), kept as a "
        "sequence (sequence), flattened to one vector (flatten), or unchanged (none)",
    )
    target_layers: list[str | int] = Field(
        description="layers to tap: names, indices into the model's layers (negative ones count from the "
        "end), 'all', 'last_layer', or 'backbone' for the model's output; see list_model_layers()"
    )
    freeze_backbone: bool = Field(True, description="train the head only, with the backbone in eval mode")
    hidden_dims: list[int] | None = Field(None, description="mlp: widths of the hidden layers")
    dropout_rate: float = Field(0.1, ge=0, le=1, description="dropout of mlp, lstm, attention, transformer")
    activation: Literal["relu", "gelu", "tanh", "swish"] = Field(
        "relu", description="mlp: activation between its layers"
    )
    num_heads: int | None = Field(None, ge=1, description="attention, transformer: attention heads")
    attention_dim: int | None = Field(
        None,
        ge=1,
        description="transformer: width of the feed-forward layer; attention: required as in avex, no effect",
    )
    num_layers: int | None = Field(None, ge=1, description="lstm, attention, transformer: stacked layers")
    lstm_hidden_size: int | None = Field(
        None, ge=1, description="lstm: hidden size, at least max_sequence_length // 4"
    )
    bidirectional: bool = Field(False, description="lstm: read the sequence in both directions")
    max_sequence_length: int | None = Field(
        None, ge=1, description="lstm, attention, transformer: longest sequence with positions (None: 1000)"
    )
    use_positional_encoding: bool = Field(
        False, description="add positions: fixed sines for attention, learned ones for lstm, transformer"
    )
    target_length: int | None = Field(
        None, ge=1, description="samples of a clip; None: the length of the backbone's audio_config"
    )
    online_training: bool | None = Field(
        None,
        description="whether training runs the backbone (True) or starts from stored embeddings (False); "
        "None: online unless the backbone is frozen and the embeddings are aggregated",
    )
    extra_config: dict[str, Any] | None = Field(
        None,
        description="further options; with 'exclude_padding': true, unlike in avex, the head and means over time "
        "leave out padded time steps",
    )

    @field_validator("target_layers", mode="before")
    @classmethod
    def _refuse_bools(cls, layers: Any) -> Any:
        if isinstance(layers, list | tuple) and any(isinstance(layer, bool) for layer in layers):
            raise ValueError(f"target_layers is {layers}: a bool is not a layer; use a name or an index")
        return layers

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        if filled.keys() >= cls.model_fields.keys() and filled["input_processing"] == "pooled":
            del filled["input_processing"]  # a dump of all fields, such as avex writes: the default, not a choice
        if filled.get("input_processing") == "sequence":
            filled.setdefault("aggregation", "none")
        if filled.get("probe_type") == "attention" and filled.get("num_layers") is None:
            filled["num_layers"] = DEFAULT_ATTENTION_LAYERS
        return filled

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        kind = self.probe_type
        if self.input_processing == "sequence":
            if kind not in SEQUENCE_PROBES:
                raise ValueError(
                    f"Sequence input processing is not compatible with {kind} probe: input_processing is "
                    f"'sequence'; set 'pooled' or 'flatten', or probe_type to one of {list(SEQUENCE_PROBES)}"
                )
            if self.aggregation != "none":
                raise ValueError(
                    f"aggregation is {self.aggregation!r}, but input_processing='sequence' keeps the time axis; "
                    "set aggregation='none' or leave it out"
                )
        for field, example in _REQUIRED[kind].items():
            if getattr(self, field) is None:
                raise ValueError(f"{field} is None, but a {kind} probe needs it; set {field}={example}")
        if kind == "mlp" and not (self.hidden_dims and min(self.hidden_dims) > 0):
            raise ValueError(
                f"hidden_dims is {self.hidden_dims}; expected at least one width, all positive, such as [512, 256]"
            )
        if self.online_training is False and not self.freeze_backbone:
            raise ValueError(
                "online_training is False, but freeze_backbone is False too: stored embeddings come from a frozen "
                "backbone; set freeze_backbone=True, or online_training=True to train the backbone"
            )
        return self

    def get_training_mode(self) -> bool:
        """Whether training runs the backbone: True for online, False for stored embeddings."""
        if self.online_training is not None:
            return self.online_training
        return not self.freeze_backbone or self.aggregation == "none"


# The fields that each head needs, with the value that the error proposes.
_REQUIRED: dict[ProbeType, dict[str, object]] = {
    "linear": {},
    "mlp": {"hidden_dims": [512, 256]},
    "lstm": {"lstm_hidden_size": 256, "num_layers": 2},
    "attention": {"num_heads": 8, "attention_dim": 512},
    "transformer": {"num_heads": 8, "attention_dim": 512, "num_layers": 2},
}
