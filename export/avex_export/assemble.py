"""From the request to probes with their weights on one backbone."""

import hashlib
import json
from collections.abc import Sequence

import msgspec
from torch import Tensor

from avex_export.graph import Assembly, Head
from avex_export.lengths import ERRORS, check_clip, check_mask, shortest_clip
from avex_export.request import ExportRequest, ProbeSource
from avex_serve.bundles.manifest import AudioSpec
from avex_serve.errors import ExportError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import StateDict, brought_to, fingerprint, read_state_dict
from avex_serve.models.files import resolve_file
from avex_serve.models.probes import Probe, build_probe_from_config
from avex_serve.models.probes.storage import check_backbone, load_head
from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.load import load_model

# Parameters with which a probe merges its layers; the head's input depends on them.
_MERGING = ("layer_w", "embedding_p")


def assemble(request: ExportRequest, sources: Sequence[ProbeSource]) -> Assembly:
    """Build the probes of a request, from `read_probes`, on one backbone and load their weights.

    Raises:
        ExportError: weights that don't fit, or probes that can't be built or exported together.
    """
    audio = None
    try:
        if request.offline:
            probes = [_offline_probe(request, source) for source in sources]
        else:
            probes, audio = _online_probes(request, sources)
        for probe, source in zip(probes, sources, strict=True):
            if source.weights is not None:
                state = read_state_dict(resolve_file(str(source.weights)))
                if request.embeddings:
                    state = _up_to_embedding(probe, state)
                load_head(probe, state, str(source.weights))
    except ERRORS as error:
        names = ", ".join(source.name for source in sources)
        raise ExportError(f"the probe {names} can't be built on {sources[0].model}: {error}") from error
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ExportError(str(error)) from error
    if audio is not None and request.dynamic_length:
        shortest = shortest_clip(probes, audio.window_samples, request.embeddings)
        audio = msgspec.structs.replace(audio, shortest_samples=shortest)
    if audio is not None and request.padding_mask:
        check_mask(probes, audio.window_samples)
    first, base = sources[0], probes[0].base_model
    checkpoint = None if base is None else base.checkpoint_uri
    if checkpoint is None and first.saved is not None:
        checkpoint = first.saved.checkpoint
    return Assembly(
        heads=tuple(_head(request, source, probe) for source, probe in zip(sources, probes, strict=True)),
        model=first.model,
        checkpoint=checkpoint,
        licence="unknown" if first.backbone is None else first.backbone.licence,
        audio=audio,
        headless=request.embeddings,
        takes_padding_mask=request.padding_mask,
    )


# -- the probes ------------------------------------------------------------------------------------------------


def _online_probes(request: ExportRequest, sources: Sequence[ProbeSource]) -> tuple[list[Probe], AudioSpec]:
    """The probes on one backbone, and their clips."""
    entry = sources[0].backbone
    assert entry is not None
    tuned = [source.name for source in sources if source.fine_tuned]
    if tuned and len(sources) > 1:
        raise ExportError(f"the backbone of {tuned[0]} was fine-tuned with it; export this probe by itself")
    if tuned:  # the probe's own weights include the backbone's
        base: ModelBase = build_model_from_spec(entry.spec, "cpu", return_features_only=True)
    else:
        base = load_model(entry.spec, "cpu", entry.checkpoint_path, return_features_only=True)
        for source in sources:
            if source.saved is not None and source.weights is not None:
                check_backbone(source.saved, base, source.weights.parent)
    if len(sources) > 1 and base.has_own_extraction():
        raise ExportError(
            f"model {entry.description} has its own extract_embeddings, which returns the embeddings of one probe; "
            "export the probes one by one"
        )
    if base.audio_config is None:
        raise ExportError(f"model {entry.description} has no audio_config, so its sample rate is unknown; add one")
    rate = base.audio_config.sample_rate
    samples = _clip_samples(request, sources, base, rate)
    check_clip(base, samples, rate)
    probes = [
        build_probe_from_config(s.config, len(s.labels), "cpu", base_model=base, target_length=samples)
        for s in sources
    ]
    return probes, AudioSpec(sample_rate=rate, window_samples=samples)


def _clip_samples(request: ExportRequest, sources: Sequence[ProbeSource], base: ModelBase, rate: int) -> int:
    """Samples of a clip: as requested, else as in the probes' training, else the backbone's usual length."""
    if request.clip_seconds is not None:
        if (samples := round(request.clip_seconds * rate)) < 1:
            raise ExportError(f"--clip-seconds {request.clip_seconds} is less than one sample; give seconds")
        return samples
    lengths = {}
    for source in sources:
        trained = None if source.saved is None else source.saved.target_length
        lengths[source.name] = trained or source.config.target_length or base.clip_samples
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {samples / rate:g} s" for name, samples in lengths.items())
        raise ExportError(f"the probes take clips of different lengths ({listed}); give --clip-seconds")
    return lengths[sources[0].name]


def _offline_probe(request: ExportRequest, source: ProbeSource) -> Probe:
    saved = source.saved
    input_dim: Sequence[Sequence[int]] | None = [request.input_dim] if request.input_dim else None
    if input_dim is None and saved is not None:
        input_dim = saved.input_dim
    if input_dim is None:
        raise ExportError("--offline needs --input-dim D, or T,D: the shape of one embedding")
    if len(input_dim) > 1 or len(saved.layers or [] if saved is not None else []) > 1:
        raise ExportError(
            f"{source.name} merges several layers, but an embedding bundle takes one embedding; use a _last "
            "variant, or serve it from audio"
        )
    (shape,) = input_dim
    width = shape[0] if len(shape) == 1 else tuple(shape)
    return build_probe_from_config(source.config, len(source.labels), "cpu", input_dim=width)


def _up_to_embedding(probe: Probe, state: StateDict) -> StateDict:
    """The state dict with the probe's present values for its head, so that it fits for any number of classes."""
    kept = {name: tensor for name, tensor in probe.head_state().items() if not name.startswith(_MERGING)}
    return {**brought_to(probe.state_dict(), state), **kept}


# -- their description in the manifest ---------------------------------------------------------------------------


def _head(request: ExportRequest, source: ProbeSource, probe: Probe) -> Head:
    merges = any(name.startswith(_MERGING) for name in probe.head_state())
    if request.embeddings and merges and source.weights is None and not request.allow_untrained:
        raise ExportError(
            f"{source.name} merges its layers by weights that are trained with the head; give the saved probe "
            "(--probe FOLDER)"
        )
    activation = source.activation
    if activation is None:
        if source.weights is not None and not request.embeddings:
            raise ExportError(
                f"{source.weights} doesn't say what turns the logits into scores, and with another function than in "
                "the training every score is wrong. Give --activation softmax if the loss was cross entropy (one "
                "label a clip), --activation sigmoid if it was binary cross entropy (any number of labels), or "
                "--activation none for raw logits; save_probe(…, activation=…) saves it with the probe"
            )
        activation = "sigmoid"  # the scores of a random head mean nothing, and embeddings have none
    digest = _input_fingerprint(probe, source)
    pooled = _digest_of([digest, "mean over time"]) if digest is not None and probe.takes_sequence else digest
    trained = source.weights is not None or (request.embeddings and not merges)
    return Head(source.name, probe.eval(), source.labels, activation, trained, digest, pooled)


def _input_fingerprint(probe: Probe, source: ProbeSource) -> str | None:
    """Digest of all that the head's input depends on: backbone, layers, aggregation, weights that merge layers."""
    if probe.base_model is not None:
        backbone: str | None = fingerprint(probe.base_model)
        layers: Sequence[str] | None = probe.layers
    else:
        backbone = None if source.saved is None else source.saved.backbone_fingerprint
        layers = None if source.saved is None else source.saved.layers
    if backbone is None or layers is None:
        return None
    merging = {name: _digest(t) for name, t in probe.head_state().items() if name.startswith(_MERGING)}
    return _digest_of([backbone, list(layers), probe.aggregation, probe.input_processing, merging])


def _digest_of(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
