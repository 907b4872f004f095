"""Assembling: from recipes to probes with their weights on one backbone."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from avex_export.graph import Assembly, Head
from avex_export.lengths import ERRORS, check_clip, check_mask, shortest_clip
from avex_export.sources import DEFAULT_MODEL, Request, Source, find_source
from avex_serve.errors import ExportError, NotFoundError
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import StateDict, brought_to, fingerprint, read_state_dict
from avex_serve.models.files import resolve_file
from avex_serve.models.probes import Probe, build_probe_from_config
from avex_serve.models.probes.storage import SavedProbe, backbone_of, check_backbone, load_head
from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.load import find_entry, load_model
from avex_serve.models.utils.registry import ModelEntry

# Parameters by which a probe merges its layers; they belong to what its head reads.
_MERGING = ("layer_w", "embedding_p")


def assemble(request: Request) -> Assembly:
    """Find the weights and labels, build the probes on one backbone and load them.

    Raises:
        ExportError: weights or labels are missing, or don't fit; or the probes don't go together.
        InputError: a file of labels holds none.
        NotFoundError: a file that was named is not there.
    """
    if request.model is not None:
        _find_model(request.model)
    sources = [find_source(request, recipe) for recipe in request.recipes]
    model, entry = _one_model(request, sources)
    try:
        if request.offline:
            probes = [_offline_probe(request, source) for source in sources]
            clip_samples, sample_rate = None, None
        else:
            probes, clip_samples, sample_rate = _online_probes(request, entry, sources)
        for probe, source in zip(probes, sources, strict=True):
            if source.weights is not None:
                state = read_state_dict(resolve_file(str(source.weights)))
                load_head(probe, _up_to_embedding(probe, state) if request.headless else state, str(source.weights))
    except ERRORS as error:
        names = ", ".join(recipe.name for recipe in request.recipes)
        raise ExportError(f"the probe {names} can't be built on {model}: {error}") from error
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise ExportError(str(error)) from error
    heads = [_head(request, source, probe) for source, probe in zip(sources, probes, strict=True)]
    shortest = None
    if clip_samples is not None:
        shortest = shortest_clip(probes, clip_samples, request.headless) if request.dynamic_length else None
        if request.padding_mask:
            check_mask(probes, clip_samples)
    (saved, *_) = (source.saved for source in sources)
    licence = entry.licence
    if request.offline and request.model is None and (saved is None or saved.model is None):
        model, licence = "unknown", "unknown"  # it may have been trained on the embeddings of any backbone
    return Assembly(
        name=request.name or _name(request, model),
        version=request.version,
        heads=tuple(heads),
        model=model,
        checkpoint=_checkpoint(probes[0], saved),
        licence=licence,
        clip_samples=clip_samples,
        sample_rate=sample_rate,
        half=request.half,
        headless=request.headless,
        shortest_samples=shortest,
        masked=request.padding_mask,
    )


def bundle_name(request: Request) -> str:
    """The name that the bundle will have; errors as in `assemble`."""
    if request.name is not None:
        return request.name
    saved = request.recipes[0].saved
    known = backbone_of(saved) if saved is not None and request.model is None else None
    return _name(request, known[0] if known is not None else _find_model(request.model or DEFAULT_MODEL)[0])


def _name(request: Request, model: str) -> str:
    if request.headless:
        return f"{model}-embeddings"
    return request.recipes[0].name if len(request.recipes) == 1 else f"{model}-probes"


def _head(request: Request, source: Source, probe: Probe) -> Head:
    merges = any(name.startswith(_MERGING) for name in probe.head_state())
    if request.headless and merges and source.weights is None and not request.allow_untrained:
        raise ExportError(
            f"{source.recipe.name} merges its layers by weights that are trained with the head; give the saved "
            "probe (--probe FOLDER)"
        )
    reads = _fingerprint(probe, source.saved)
    pooled = _digest_of([reads, "mean over time"]) if reads is not None and probe.takes_sequence else reads
    trained = source.weights is not None or (request.headless and not merges)
    return Head(source.recipe.name, probe.eval(), source.labels, trained, reads, pooled)


# -- the backbone ----------------------------------------------------------------------------------------------


def _one_model(request: Request, sources: Sequence[Source]) -> tuple[str, ModelEntry]:
    """The backbone of all probes: its name and how to get it."""
    found = [_model(request, source.saved) for source in sources]
    (model, entry), *others = found
    for source, other in zip(sources[1:], others, strict=True):
        if other[0] != model:
            raise ExportError(
                f"{sources[0].recipe.name} belongs to the backbone {model}, {source.recipe.name} to {other[0]}; a "
                "bundle has one backbone: export them one by one"
            )
    return model, entry


def _model(request: Request, saved: SavedProbe | None) -> tuple[str, ModelEntry]:
    """As asked for, else the saved probe's, else the demo model."""
    if request.model is None and saved is not None:
        if (backbone := backbone_of(saved)) is not None:
            return backbone
        if not request.offline:
            raise ExportError(
                "the saved probe doesn't say which backbone it belongs to; give --model, or --offline to serve "
                "embeddings"
            )
    return _find_model(request.model or DEFAULT_MODEL)


def _find_model(name: str) -> tuple[str, ModelEntry]:
    try:
        return Path(name).stem if name.endswith((".yml", ".yaml")) else name, find_entry(name)
    except (ValueError, FileNotFoundError) as error:
        raise NotFoundError(f"--model {name}: {error}") from error


# -- the probes ------------------------------------------------------------------------------------------------


def _online_probes(request: Request, entry: ModelEntry, sources: Sequence[Source]) -> tuple[list[Probe], int, int]:
    """The probes on one backbone, samples of a clip, and their rate in Hz."""
    tuned = [s.recipe.name for s in sources if not s.recipe.config.freeze_backbone and s.saved is not None]
    if tuned and len(sources) > 1:
        raise ExportError(
            f"{tuned[0]} brings a backbone of its own, which was fine-tuned with it; export it by itself"
        )
    if tuned:  # the saved probe holds the backbone's weights
        base: ModelBase = build_model_from_spec(entry.spec, "cpu", return_features_only=True)
    else:
        base = load_model(entry.spec, "cpu", entry.checkpoint_path, return_features_only=True)
        for source in sources:
            if source.saved is not None and source.path is not None:
                check_backbone(source.saved, base, source.path)
    if len(sources) > 1 and base.has_own_extraction():
        raise ExportError(
            f"model {entry.description} brings its own extract_embeddings, which makes the embeddings of one probe "
            "at a time; export the probes one by one"
        )
    if base.audio_config is None:
        raise ExportError(f"model {entry.description} has no audio_config, so its sample rate is unknown; add one")
    rate = base.audio_config.sample_rate
    samples = _one_length(request, sources, rate, lambda: base.clip_samples)
    check_clip(base, samples, rate)
    build = build_probe_from_config
    probes = [
        build(source.recipe.config, len(source.labels), "cpu", base_model=base, target_length=samples)
        for source in sources
    ]
    return probes, samples, rate


def _one_length(request: Request, sources: Sequence[Source], rate: int, usual: Callable[[], int]) -> int:
    """Samples of a clip: as asked for, else those that the probes were trained with, else the backbone's own."""
    if request.clip_seconds is not None:
        if (samples := round(request.clip_seconds * rate)) < 1:
            raise ExportError(f"--clip-seconds {request.clip_seconds} is less than one sample; give seconds")
        return samples
    lengths = {}
    for source in sources:
        own = (
            source.saved.target_length if source.saved is not None else None
        ) or source.recipe.config.target_length
        lengths[source.recipe.name] = own or usual()
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {samples / rate:g} s" for name, samples in lengths.items())
        raise ExportError(f"the probes hear clips of different lengths ({told}); give --clip-seconds")
    return lengths[sources[0].recipe.name]


def _offline_probe(request: Request, source: Source) -> Probe:
    saved = source.saved
    input_dim: Sequence[Sequence[int]] | None = [request.input_dim] if request.input_dim else None
    if input_dim is None and saved is not None:
        input_dim = saved.input_dim
    if input_dim is None:
        raise ExportError("--offline needs --input-dim D, or T,D: the shape of one embedding")
    if len(input_dim) > 1 or len(saved.layers or [] if saved is not None else []) > 1:
        raise ExportError(
            f"{source.recipe.name} merges several layers, but an embedding bundle takes one embedding; use a _last "
            "variant, or serve it from audio"
        )
    (shape,) = input_dim
    width = shape[0] if len(shape) == 1 else tuple(shape)
    return build_probe_from_config(source.recipe.config, len(source.labels), "cpu", input_dim=width)


def _up_to_embedding(probe: Probe, state: StateDict) -> StateDict:
    """A state dict with the probe's own values for what reads the embedding, whatever classes it was trained for."""
    own = {name: tensor for name, tensor in probe.head_state().items() if not name.startswith(_MERGING)}
    return {**brought_to(probe.state_dict(), state), **own}


# -- what the manifest says of them ------------------------------------------------------------------------------


def _checkpoint(probe: Probe, saved: SavedProbe | None) -> str | None:
    if probe.base_model is not None and probe.base_model.checkpoint_uri is not None:
        return probe.base_model.checkpoint_uri
    return saved.checkpoint if saved is not None else None


def _fingerprint(probe: Probe, saved: SavedProbe | None) -> str | None:
    """Digest of what makes what the head reads: backbone, layers, aggregation and, of several, their weights."""
    backbone = fingerprint(probe.base_model) if probe.base_model is not None else None
    layers: Sequence[str] | None = probe.layers
    if probe.base_model is None:
        backbone = saved.backbone_fingerprint if saved is not None else None
        layers = saved.layers if saved is not None else None
    if backbone is None or layers is None:
        return None
    merging = {name: _digest(t) for name, t in probe.head_state().items() if name.startswith(_MERGING)}
    return _digest_of([backbone, list(layers), probe.aggregation, probe.input_processing, merging])


def _digest_of(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
