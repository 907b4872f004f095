"""From a name, a YAML file or a spec to a backbone: with its weights, or just its layers and labels."""

import logging
from pathlib import Path
from typing import Any

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import count_classes, load_backbone, read_checkpoint
from avex_serve.models.custom import Backbone, adapt
from avex_serve.models.files import resolve_file, with_revision
from avex_serve.models.utils.factory import build_model_from_spec, takes
from avex_serve.models.utils.labels import LabelMapping, read_label_mapping
from avex_serve.models.utils.registry import (
    ModelEntry,
    get_entry,
    get_model_spec,
    is_own_architecture,
    list_models,
    read_model_yaml,
)

logger = logging.getLogger(__name__)


def load_model(
    model: str | Path | ModelSpec,
    device: str = "cpu",
    checkpoint_path: str | Path | None = None,
    return_features_only: bool = False,
) -> ModelBase:
    """Load a backbone with its weights, in eval mode. The registry stays as it is.

    Args:
        model: a registered name, a YAML file, or a spec; one that equals a single registered model's is that model.
        device: where to put it.
        checkpoint_path: weights to load instead of the model's own: a path, ``file://``, ``hf://``, ``s3://`` or
            ``gs://``.
        return_features_only: leave out the classifier that the checkpoint may hold.

    Returns:
        The model: token features out, or logits if the checkpoint holds a classifier and it wasn't left out. Then
        ``label_mapping`` holds its labels, ``{"label_to_index": …, "index_to_label": …}``, if the model names a
        label map; it is None, with a warning, if that can't be had.

    Raises:
        ValueError: no such model, a checkpoint that doesn't fit or isn't the published one, a label map of the
            model's own checkpoint with another number of labels than that has classes, or no weights for a spec that
            wants them.
        FileNotFoundError: the checkpoint isn't there.
        ModuleNotFoundError: cloud storage without the package for it.
        KeyError: the model's class isn't registered.
        TypeError: `model` is something else.
    """
    entry = find_entry(model)
    uri = str(checkpoint_path) if checkpoint_path else entry.checkpoint_path
    if uri is None:
        # A class of one's own may bring weights itself.
        if entry.spec.pretrained and is_own_architecture(entry.spec.name):
            raise ValueError(
                f"{entry.description} names no weights; give checkpoint_path, or set pretrained=False for random "
                "ones"
            )
        return build_model_from_spec(entry.spec, device, **_head_arguments(entry.spec, None, keep=False))
    own = checkpoint_path is None
    path = resolve_file(uri, sha256=entry.sha256 if own else None)
    checkpoint = read_checkpoint(path)
    state, classes = checkpoint.state, count_classes(checkpoint.state)
    if classes is None and not takes(entry.spec, "return_features_only"):
        classes = checkpoint.num_classes  # of a head under a name of its own
    keep = classes is not None and not return_features_only
    loaded = build_model_from_spec(entry.spec, device, **_head_arguments(entry.spec, classes, keep=keep))
    load_backbone(loaded, state, f"checkpoint {uri}", keep_classifier=keep)
    loaded.checkpoint_uri = with_revision(uri, path)
    if keep and classes is not None and entry.class_mapping_path is not None:
        loaded.label_mapping = _labels(entry.class_mapping_path, classes, uri, own=own)
    return loaded


def load_label_mapping(model_or_path: str | Path) -> LabelMapping | None:
    """The labels of a model's classifier, ``{"label_to_index": …, "index_to_label": …}``.

    Args:
        model_or_path: a registered name, or the path or URI of a label map, JSON ``{label: index}``.

    Returns:
        The mapping, or None with a warning: no such model or file, a model that names no label map, or a file that
        is none.
    """
    name = str(model_or_path)
    entry = get_entry(name)
    if entry is not None and entry.class_mapping_path is None:
        logger.warning("model %r names no label map", name)
        return None
    if entry is None and isinstance(model_or_path, str) and "/" not in name and not name.endswith(".json"):
        logger.warning("%r is neither a registered model nor a JSON file of labels", name)
        return None
    uri = name if entry is None or entry.class_mapping_path is None else entry.class_mapping_path
    try:
        return read_label_mapping(uri)
    except ValueError as error:  # asked for alone, it answers as avex's; `load_model` refuses such a map
        logger.warning("%s", error)
        return None


def list_model_layers(model: str | ModelBase | Backbone, device: str = "cpu") -> dict[str, list[str] | str]:
    """The layers that a probe can tap.

    Args:
        model: a registered name (its weights are not needed) or a model.
        device: where to build it, for a name.

    Returns:
        ``layers`` and ``all``: the discoverable ones in order; ``last_layer``: what that selector means;
        ``special_options``: the selectors.

    Raises:
        ValueError: no such model, or something that is no model.
    """
    if isinstance(model, str):
        spec = get_model_spec(model)
        if spec is None:
            raise ValueError(f"Model '{model}' not found in registry. Available models: {sorted(list_models())}")
        model = build_model_from_spec(spec, device)
    backbone = adapt(model)
    layers = backbone.get_model_layers()
    return {
        "layers": layers,
        "last_layer": backbone.last_layer_name,
        "all": layers,
        "special_options": ["last_layer", "all"],
    }


def find_entry(model: str | Path | ModelSpec) -> ModelEntry:
    """The model that a name, a YAML file or a spec means; errors as in `load_model`."""
    if isinstance(model, ModelSpec):
        registered = [get_entry(name) for name in list_models()]
        same = [entry for entry in registered if entry is not None and entry.spec == model]
        if len(same) == 1:
            return same[0]
        return ModelEntry(model, f"{model.name} from a spec", None, licence="unknown")
    if not isinstance(model, str | Path):
        raise TypeError(f"Unsupported model type: {type(model)}. Expected str, Path, or ModelSpec.")
    entry = get_entry(str(model))
    if entry is not None:
        return entry
    if str(model).endswith((".yml", ".yaml")):
        return read_model_yaml(Path(model))
    raise ValueError(
        f"Unknown model identifier: '{model}'. Available models: {sorted(list_models())}. "
        "Or give the path of a YAML config file."
    )


def _head_arguments(spec: ModelSpec, classes: int | None, *, keep: bool) -> dict[str, Any]:
    """What the class is told of its classifier. One that can't leave it out gets the checkpoint's width instead."""
    if not keep and takes(spec, "return_features_only"):
        return {"return_features_only": True}
    return {"num_classes": classes} if classes is not None and takes(spec, "num_classes") else {}


def _labels(uri: str, classes: int, checkpoint: str, *, own: bool) -> LabelMapping | None:
    mapping = read_label_mapping(uri)
    if mapping is None or len(mapping["label_to_index"]) == classes:
        return mapping
    labels = len(mapping["label_to_index"])
    told = f"label map {uri} has {labels} labels, but checkpoint {checkpoint} has {classes} classes"
    if own:
        raise ValueError(f"{told}; one of them is another version: get both again")
    logger.warning("%s: it belongs to other weights; label_mapping is None", told)
    return None
