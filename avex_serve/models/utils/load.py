"""Load a model with its weights, from a registered name, a YAML file or a spec; and the labels of its classifier."""

import logging
from pathlib import Path
from typing import Any

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import count_classes, load_backbone, read_checkpoint
from avex_serve.models.files import LabelMapping, read_label_mapping, resolve_file, with_revision
from avex_serve.models.utils.registry import (
    ModelEntry,
    accepts,
    build_model_from_spec,
    get_entry,
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
    """Load a backbone with its weights, in eval mode. Loading doesn't change the registry.

    Args:
        model: a registered name, a YAML file, or a spec. A spec that equals the spec of exactly one registered model
            means that model.
        device: where to put it.
        checkpoint_path: weights to load instead of the model's own: a path, ``file://``, ``hf://``, ``s3://`` or
            ``gs://``.
        return_features_only: leave out the checkpoint's classifier.

    Returns:
        The model. Its output is logits if the checkpoint holds a classifier that wasn't left out, else token
        features. With a classifier, ``label_mapping`` holds ``{"label_to_index": …, "index_to_label": …}`` if the
        model names a label map. It is None, with a warning, if that file is missing.

    Raises:
        ValueError: no such model; a checkpoint that doesn't fit or isn't the published one; a label map of the
            model's own checkpoint whose number of labels isn't the number of classes; or no weights although the
            spec says ``pretrained``.
        FileNotFoundError: no such checkpoint.
        ModuleNotFoundError: cloud storage without the package for it.
        KeyError: the model's class isn't registered.
        TypeError: `model` is of another type.
    """
    entry = find_entry(model)
    uri = str(checkpoint_path) if checkpoint_path else entry.checkpoint_path
    if uri is None:
        # A class that a program registered may load its weights itself.
        if entry.spec.pretrained and is_own_architecture(entry.spec.name):
            raise ValueError(
                f"{entry.description} names no weights; give checkpoint_path, or set pretrained=False for random "
                "ones"
            )
        return build_model_from_spec(entry.spec, device, **_head_arguments(entry.spec, None, keep=False))
    is_models_own = checkpoint_path is None
    path = resolve_file(uri, sha256=entry.sha256 if is_models_own else None)
    state, stated_classes = read_checkpoint(path)
    classes = count_classes(state)
    if classes is None and not accepts(entry.spec, "return_features_only"):
        classes = stated_classes  # of a head whose names don't reveal it
    keep = classes is not None and not return_features_only
    loaded = build_model_from_spec(entry.spec, device, **_head_arguments(entry.spec, classes, keep=keep))
    load_backbone(loaded, state, f"checkpoint {uri}", keep_classifier=keep)
    loaded.checkpoint_uri = with_revision(uri, path)
    if keep and classes is not None and entry.class_mapping_path is not None:
        loaded.label_mapping = _labels(entry.class_mapping_path, classes, uri, is_models_own=is_models_own)
    return loaded


def load_label_mapping(model_or_path: str | Path) -> LabelMapping | None:
    """The labels of a model's classifier, ``{"label_to_index": …, "index_to_label": …}``.

    The argument is a registered name, or the path or URI of a label map, JSON ``{label: index}``. Returns None, with
    a warning, if there is no such model or file, or no label map in it.
    """
    name = str(model_or_path)
    entry = get_entry(name)
    uri = name if entry is None else entry.class_mapping_path
    if uri is None:
        logger.warning("model %r names no label map", name)
        return None
    if entry is None and isinstance(model_or_path, str) and "/" not in name and not name.endswith(".json"):
        logger.warning("%r is neither a registered model nor a JSON file of labels", name)
        return None
    try:
        return read_label_mapping(uri)
    except ValueError as error:  # this function answers as avex's; `load_model` refuses such a map
        logger.warning("%s", error)
        return None


def find_entry(model: str | Path | ModelSpec) -> ModelEntry:
    """The model that a name, a YAML file or a spec means. Errors as in `load_model`."""
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
    """The classifier's arguments for the class. A class that can't leave it out gets the checkpoint's width."""
    if not keep and accepts(spec, "return_features_only"):
        return {"return_features_only": True}
    return {"num_classes": classes} if classes is not None and accepts(spec, "num_classes") else {}


def _labels(uri: str, classes: int, checkpoint: str, *, is_models_own: bool) -> LabelMapping | None:
    mapping = read_label_mapping(uri)
    if mapping is None or len(mapping["label_to_index"]) == classes:
        return mapping
    labels = len(mapping["label_to_index"])
    mismatch = f"label map {uri} has {labels} labels, but checkpoint {checkpoint} has {classes} classes"
    if is_models_own:
        raise ValueError(f"{mismatch}; they are of different versions: download both again")
    logger.warning("%s; it belongs to other weights, so label_mapping is None", mismatch)
    return None
