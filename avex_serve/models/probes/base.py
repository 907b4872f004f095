"""The common part of all probes: from embeddings to the features that a head classifies.

A probe *combines* the tapped layers (aggregates and merges them), and its *head* classifies the result. A head is a
subclass that builds its layers and computes logits; everything else is here. Parameters have avex's names:
``layer_weights``, ``embedding_projectors.{i}``, the head's own, and ``base_model.…`` for the backbone.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from avex_serve.bundles.manifest import Activation
from avex_serve.configs import Aggregation, InputProcessing, ProbeConfig
from avex_serve.models.aggregation import aggregate, time_steps
from avex_serve.models.base_model import ModelBase, unpack_audio
from avex_serve.models.layers import frozen, is_tracing

Shape = tuple[int, ...]  # of one clip's embedding, without the batch: (D,), (T, D) or (C, H, W)
InputDim = int | tuple[int, ...] | list[tuple[int, ...]]
Combined = tuple[Tensor, Tensor | None]  # features (B, D) or (B, T, D), and the padding (B, T) of a sequence
ProbeInput = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

# Keys in a batch of stored embeddings that don't hold embeddings.
_NOT_EMBEDDINGS = ("label", "padding_mask")
_DEFAULT_POSITIONS = 1000  # steps with positions if max_sequence_length is not set


class Probe(nn.Module, ABC):
    """A head on the embeddings of a backbone (online) or on stored embeddings (offline).

    Attributes:
        base_model: the backbone, or None offline.
        layers: names of the tapped layers.
        config: the ProbeConfig that it was built from; None if its class was called directly.
        input_dim: the shapes that it was built for, one per layer.
        labels: names of the classes, if known.
        output_activation: what turns its logits into scores, if known: softmax, sigmoid or none.
    """

    options: ClassVar[Mapping[str, Any]]  # the head's own arguments with their defaults
    without_effect: ClassVar[frozenset[str]] = frozenset()  # options that are accepted, as in avex, but not used
    takes_sequence: ClassVar[bool]  # whether the head reads (B, T, D) rather than (B, D)

    def __init__(
        self,
        base_model: ModelBase | None,
        layers: Sequence[str],
        num_classes: int,
        device: str = "cpu",
        feature_mode: bool = False,
        input_dim: InputDim | None = None,
        aggregation: Aggregation = "mean",
        target_length: int | None = None,
        freeze_backbone: bool = True,
        input_processing: InputProcessing | None = None,
        exclude_padding: bool = False,
        **options: Any,
    ) -> None:
        """Build the probe with random weights.

        Args:
            base_model: the backbone; None offline.
            layers: names of the tapped layers.
            num_classes: width of the logits.
            device: where to put the probe.
            feature_mode: whether the input is embeddings instead of audio.
            input_dim: offline, the shape of a clip's embedding, see `build_probe_from_config`.
            aggregation: see `ProbeConfig`.
            target_length: online, samples of a clip, which determine the shapes; None: the backbone's clip length.
            freeze_backbone: whether the backbone is not trained.
            input_processing: see `ProbeConfig`; None: as in avex.
            exclude_padding: keep padded steps out of the head and out of means over time.
            **options: of the head, see `options`.

        Raises:
            TypeError: an option that the head doesn't have.
            ValueError: incompatible shapes or processing.
        """
        super().__init__()
        unknown = options.keys() - self.options.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {sorted(unknown)}; it has {sorted(self.options)}")
        self.device = device
        self.base_model = base_model
        self.layers = list(layers)
        self.num_classes = num_classes
        self.feature_mode = feature_mode
        self.aggregation: Aggregation = aggregation
        self.target_length = target_length
        self.freeze_backbone = freeze_backbone
        self.input_processing = input_processing
        self.exclude_padding = exclude_padding
        self.config: ProbeConfig | None = None
        self.labels: tuple[str, ...] | None = None
        self.output_activation: Activation | None = None
        for name, default in self.options.items():
            setattr(self, name, options.get(name, default))
        if base_model is not None and not feature_mode:
            base_model.requires_grad_(not freeze_backbone)
            base_model.train(not freeze_backbone)
        self.input_dim = self._clip_shapes(input_dim)
        self.input_width = self._build_combination()
        self.build_head(self.input_width)
        self.to(device)

    @abstractmethod
    def build_head(self, width: int) -> None:
        """Build the head for features of that width."""

    @abstractmethod
    def classify(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of combined features.

        Args:
            features: (B, width), or (B, T, width) if the head takes a sequence.
            padding: (B, T) bool, True where padded.
        """

    def forward(self, x: ProbeInput, padding_mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes).

        Args:
            x: online (B, S) or ``{"raw_wav": (B, S), "padding_mask": (B, S)}``; offline an embedding, a list with
                one embedding per layer, or a mapping with one per key (and ``padding_mask``).
            padding_mask: bool, True where padded: (B, S) online, (B, T) offline.

        Raises:
            RuntimeError: embeddings of another shape than the probe was built for.
            ValueError: no audio, no embeddings, or a mask of the wrong shape where padding is excluded.
        """
        return self.classify(*self.combine(x, padding_mask))

    def combine(self, x: ProbeInput, padding_mask: Tensor | None = None) -> Combined:
        """The head's input, see `classify`; arguments and errors as in `forward`."""
        return self._combined(*self._embeddings(x, padding_mask))

    def combine_taps(self, tapped: Mapping[str, Tensor], padding_mask: Tensor | None = None) -> Combined:
        """The result of `combine` from the output of `ModelBase.taps`, so that several probes share one pass.

        The mask (B, S) bool, True where padded, is only for a probe that excludes padding.
        """
        return self._combined(*self._from_taps(tapped, padding_mask))

    def _combined(self, embeddings: list[Tensor], paddings: list[Tensor | None]) -> Combined:
        features = self._merge([self._prepare(e, padding) for e, padding in zip(embeddings, paddings, strict=True)])
        if not is_tracing() and features.shape[-1] != self.input_width:
            raise RuntimeError(
                f"embeddings of shape {[tuple(e.shape) for e in embeddings]} make features of width "
                f"{features.shape[-1]}, but the probe was built for {self.input_width}; build it for this shape, or "
                "aggregate"
            )
        # Layers are resized to the shortest, so the mask of a layer of that length fits. As in avex, a mask of
        # another length is dropped. Traced lengths can't be compared; a model that pads clips has equal lengths.
        given = [p for p in paddings if p is not None and features.ndim == 3]
        fitting = given if is_tracing() else [p for p in given if p.shape[1] == features.shape[1]]
        return features, fitting[0] if fitting else None

    def pool(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mean over time of a sequence (B, T, D) → (B, D), without padded steps if the probe excludes them."""
        return aggregate(features, "mean", padding if self.exclude_padding else None)

    def train(self, mode: bool = True) -> "Probe":
        """Set the training mode. A frozen backbone stays in eval mode, including batch statistics and dropout."""
        super().train(mode)
        if self.base_model is not None and self.freeze_backbone:
            self.base_model.eval()
        return self

    def head_state(self) -> dict[str, Tensor]:
        """The state dict without the backbone's tensors."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("base_model.")}

    def debug_info(self) -> dict[str, Any]:
        """The probe's settings under avex's keys; with ``layer_weights`` if it merges layers by weights."""
        info = {
            "probe_type": type(self).__name__.removesuffix("Probe").lower(),
            "layers": self.layers,
            "feature_mode": self.feature_mode,
            "aggregation": self.aggregation,
            "freeze_backbone": self.freeze_backbone,
            "target_length": self.target_length,
            **{name: getattr(self, name) for name in self.options},
            "has_layer_weights": hasattr(self, "layer_weights"),
            "has_embedding_projectors": hasattr(self, "embedding_projectors"),
        }
        return {**info, "layer_weights": self.layer_weights.tolist()} if hasattr(self, "layer_weights") else info

    def get_learned_weights_table(self) -> str:
        """A printable table of the weights that merge unaggregated layers, or a sentence if there are none."""
        if not hasattr(self, "layer_weights"):
            return "No learned weights: the probe doesn't merge layers by weights."
        raw = self.layer_weights.detach()
        names = self.layers if len(self.layers) == len(raw) else [f"layer {i}" for i in range(len(raw))]
        width = max(len("layer"), *map(len, names))
        rows = zip(names, raw.tolist(), raw.softmax(dim=0).tolist(), strict=True)
        lines = [f"{name:<{width}}  {weight:>8.4f}  {share:>7.2%}" for name, weight, share in rows]
        return "\n".join([f"{'layer':<{width}}  {'weight':>8}  {'share':>7}", *lines])

    # -- from the input to embeddings ------------------------------------------------------------------------

    def _embeddings(self, x: ProbeInput, padding_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        """The embeddings, and the padding (B, T) of each: online only if it is excluded, offline as given."""
        if self.base_model is None or self.feature_mode:
            embeddings, padding = _stored_embeddings(x, padding_mask)
            return embeddings, [padding] * len(embeddings)
        if not isinstance(x, Tensor | Mapping):
            raise ValueError(f"the input is a {type(x).__name__}; expected a waveform (batch, samples)")
        wave, mask = unpack_audio(x, padding_mask)
        # In avex only the backbone gets the mask.
        if not self.exclude_padding or (mask is None and not self.base_model.fills_clips):
            with self._gradients():
                embeddings = self._embed(self.base_model, wave, mask)
            return embeddings, [None] * len(embeddings)
        as_if_alone = mask is not None
        mask = torch.zeros_like(wave, dtype=torch.bool) if mask is None else mask
        expected = tuple(wave.shape) if wave.ndim == 2 else (1, *wave.shape)
        if not is_tracing() and tuple(mask.shape) != expected:
            raise ValueError(f"padding_mask has shape {tuple(mask.shape)}; expected {expected}, as the waveform")
        with self._gradients():
            tapped = self.base_model.taps(wave, self.layers, mask, as_if_alone=as_if_alone)
        return self._from_taps(tapped, mask)

    def _from_taps(
        self, tapped: Mapping[str, Tensor], mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        found = [tapped[name] for name in self.layers]
        assert self.base_model is not None
        # Layers of a convolutional network differ in length.
        paddings = [None if mask is None else self.base_model.token_mask(mask, time_steps(e)) for e in found]
        if self.aggregation == "none":
            return found, paddings
        pooled = [aggregate(e, self.aggregation, padding) for e, padding in zip(found, paddings, strict=True)]
        return [torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0]], [None]

    def _embed(self, base_model: ModelBase, wave: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        return base_model.probe_embeddings(
            wave, self.layers, self.aggregation, mask, freeze_backbone=self.freeze_backbone
        )

    def _gradients(self) -> contextlib.AbstractContextManager[object]:
        return torch.no_grad() if self.freeze_backbone else contextlib.nullcontext()

    # -- from embeddings to features -------------------------------------------------------------------------

    def _prepare(self, embedding: Tensor, padding: Tensor | None) -> Tensor:
        """Apply `input_processing`, if it was set. Then reshape the embedding to the head's rank, as avex does."""
        if self.input_processing == "pooled":
            embedding = self.pool(embedding, padding)
        if self.input_processing == "flatten" or not self.takes_sequence:
            embedding = embedding.flatten(1)
        if not self.takes_sequence:
            return embedding
        if embedding.ndim == 2:
            return embedding[..., None]  # (B, D, 1)
        if embedding.ndim == 4:
            return embedding.transpose(1, 3).flatten(2)  # (B, C, H, W) → (B, W, H * C)
        return embedding

    def _merge(self, embeddings: list[Tensor]) -> Tensor:
        if len(embeddings) == 1 == len(self.input_dim):
            return embeddings[0]
        if len(embeddings) != len(self.input_dim):
            raise RuntimeError(
                f"{len(embeddings)} embeddings for a probe built for {len(self.input_dim)}; give one per layer"
            )
        projected = [
            embedding if projector is None else projector(embedding)
            for embedding, projector in zip(embeddings, self.embedding_projectors, strict=True)
        ]
        if self.takes_sequence:
            # In a graph, lengths are not numbers that can be compared. There the same layers are resized as for the
            # clips that the probe was built for.
            graph = is_tracing() or torch.compiler.is_exporting()
            steps = self.built_steps if graph else [p.shape[1] for p in projected]
            fewest = min(steps)
            shortest = projected[steps.index(fewest)].shape[1]
            projected = [p if n == fewest else _resize(p, shortest) for p, n in zip(projected, steps, strict=True)]
        weights = self.layer_weights.softmax(dim=0).unbind()
        return sum(weight * part for weight, part in zip(weights, projected, strict=True))

    # -- building ----------------------------------------------------------------------------------------------

    def _clip_shapes(self, input_dim: InputDim | None) -> list[Shape]:
        if self.base_model is None or (self.feature_mode and input_dim is not None):
            if input_dim is None:
                raise ValueError(
                    "input_dim must be provided when feature_mode=True and there is no base_model; give the "
                    "embedding's width"
                )
            if isinstance(input_dim, int):
                return [(1, input_dim) if self.takes_sequence else (input_dim,)]
            return [tuple(shape) for shape in input_dim] if isinstance(input_dim, list) else [tuple(input_dim)]
        samples = self.base_model.clip_samples if self.target_length is None else self.target_length
        with frozen(self.base_model):
            found = self._embed(self.base_model, torch.zeros(1, samples))
        return [tuple(embedding.shape[1:]) for embedding in found]

    def _build_combination(self) -> int:
        """Create the parameters that merge several layers, and return the width of the features."""
        meta = [torch.empty(1, *shape, device="meta") for shape in self.input_dim]
        self._check_processing()
        shapes = [self._prepare(embedding, None).shape[1:] for embedding in meta]
        if len(shapes) == 1:
            return shapes[0][-1]
        target = tuple(_vote([shape[axis] for shape in shapes]) for axis in range(len(shapes[0])))
        # avex also projects a layer of the right width if its length differs.
        projectors = [None if shape == target else nn.Linear(shape[-1], target[-1]) for shape in shapes]
        self.embedding_projectors = nn.ModuleList(projectors)  # type: ignore[arg-type]
        self.layer_weights = nn.Parameter(torch.zeros(len(shapes)))
        self.built_steps = [shape[0] for shape in shapes]
        return target[-1]

    def _check_processing(self) -> None:
        if self.input_processing not in ("none", "sequence"):
            return
        for shape in self.input_dim:
            wanted = (2, 3) if self.input_processing == "sequence" else (2,) if self.takes_sequence else (1,)
            if len(shape) not in wanted:
                raise ValueError(
                    f"input_processing is {self.input_processing!r}, but a clip's embedding has shape {shape}, and "
                    f"{type(self).__name__} reads {'sequences (T, D)' if self.takes_sequence else 'vectors (D,)'}; "
                    "change aggregation or input_processing"
                )


class SequenceProbe(Probe):
    """A head that reads a sequence: positions before its encoder, and the mean over time before its classifier."""

    options: ClassVar[dict[str, Any]] = {
        "dropout_rate": 0.1,
        "max_sequence_length": None,
        "use_positional_encoding": False,
    }
    takes_sequence = True
    dropout_rate: float
    max_sequence_length: int | None
    use_positional_encoding: bool
    pos_encoding: Tensor | None

    def build_head(self, width: int) -> None:
        """See `Probe.build_head`."""
        self.dropout = nn.Dropout(self.dropout_rate) if self.dropout_rate > 0 else None
        classifier_width = self.build_encoder(width)
        if self.use_positional_encoding:
            self.build_positions(self.max_sequence_length or _DEFAULT_POSITIONS, width)
        else:
            self.pos_encoding = None
        self.classifier = nn.Linear(classifier_width, self.num_classes)

    def build_encoder(self, width: int) -> int:
        """Build the encoder for sequences of that width, and return the width of its output."""
        raise NotImplementedError

    def encode(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, width) → (B, T, encoder width)."""
        raise NotImplementedError

    def build_positions(self, steps: int, width: int) -> None:
        """Create `pos_encoding` (1, steps, width); here it is learned."""
        self.pos_encoding = nn.Parameter(torch.randn(1, steps, width))

    def classify(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """See `Probe.classify`."""
        if self.pos_encoding is not None:
            steps, longest = features.shape[1], self.pos_encoding.shape[1]
            if not is_tracing() and steps > longest > 1:  # a single position is added to every step, as in avex
                raise RuntimeError(
                    f"a sequence of {steps} steps is longer than the {longest} positions; raise max_sequence_length"
                )
            features = features + self.pos_encoding[:, :steps]
        return self.classifier(self.drop(self.pool(self.encode(features, padding), padding)))

    def drop(self, features: Tensor) -> Tensor:
        """Apply dropout, if there is any."""
        return features if self.dropout is None else self.dropout(features)


def _stored_embeddings(x: ProbeInput, padding_mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    if isinstance(x, Mapping):
        padding_mask = x.get("padding_mask", padding_mask)
        if "raw_wav" in x:  # avex's loaders put a single stored embedding there
            return [x["raw_wav"]], padding_mask
        x = [value for key, value in x.items() if key not in _NOT_EMBEDDINGS]
    embeddings = [x] if isinstance(x, Tensor) else list(x)
    if not embeddings:
        raise ValueError("the input holds no embeddings; give a tensor, or one per layer")
    return embeddings, padding_mask


def _vote(values: Sequence[int]) -> int:
    """The value of the absolute majority, or the largest."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else max(values)


def _resize(sequence: Tensor, steps: int) -> Tensor:
    """(B, T, D) → (B, steps, D) by linear interpolation."""
    resized = nn.functional.interpolate(sequence.transpose(1, 2), size=steps, mode="linear", align_corners=False)
    return resized.transpose(1, 2)
