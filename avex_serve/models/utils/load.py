"""From a name, a YAML file or a spec to a backbone: with its weights, or just its layers."""

from pathlib import Path

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.checkpoints import count_classes, load_backbone, read_state_dict, resolve_checkpoint
from avex_serve.models.utils.factory import build_model_from_spec
from avex_serve.models.utils.registry import (
    ModelEntry,
    get_entry,
    get_model_spec,
    list_models,
    read_model_yaml,
)


def load_model(
    model: str | Path | ModelSpec,
    device: str = "cpu",
    checkpoint_path: str | None = None,
    return_features_only: bool = False,
) -> ModelBase:
    """Load a backbone with its weights, in eval mode.

    Args:
        model: a registered name, a YAML file, or a spec.
        device: where to put it.
        checkpoint_path: weights to load instead of the model's own: a path, ``file://`` or ``hf://``.
        return_features_only: leave out the classifier that the checkpoint may hold.

    Returns:
        The model: token features out, or logits if the checkpoint holds a classifier and it wasn't left out.

    Raises:
        ValueError: no such model, a checkpoint that doesn't fit, or no weights for a spec that wants them.
        FileNotFoundError: the checkpoint isn't there.
        TypeError: `model` is something else.
    """
    entry = find_entry(model)
    uri = checkpoint_path or entry.checkpoint_path
    if uri is None:
        if entry.spec.pretrained:
            raise ValueError(
                f"{entry.description} names no weights; give checkpoint_path, or set pretrained=False for random "
                "ones"
            )
        return build_model_from_spec(entry.spec, device, return_features_only=True)
    state = read_state_dict(resolve_checkpoint(uri))
    classes = None if return_features_only else count_classes(state)
    loaded = build_model_from_spec(
        entry.spec, device, num_classes=classes, return_features_only=return_features_only
    )
    load_backbone(loaded, state, f"checkpoint {uri}", keep_classifier=classes is not None)
    return loaded


def list_model_layers(model: str | ModelBase, device: str = "cpu") -> dict[str, list[str] | str]:
    """The layers that a probe can tap.

    Args:
        model: a registered name (its weights are not needed) or a model.
        device: where to build it, for a name.

    Returns:
        ``layers`` and ``all``: the discoverable ones in order; ``last_layer``: what that selector means;
        ``special_options``: the selectors.

    Raises:
        ValueError: no such model.
    """
    if isinstance(model, str):
        spec = get_model_spec(model)
        if spec is None:
            raise ValueError(f"Model '{model}' not found in registry. Available models: {sorted(list_models())}")
        model = build_model_from_spec(spec, device)
    if not isinstance(model, ModelBase):
        raise ValueError(f"Model must be an instance of ModelBase, got {type(model)}")
    layers = model.get_model_layers()
    return {
        "layers": layers,
        "last_layer": model.last_layer,
        "all": layers,
        "special_options": ["last_layer", "all"],
    }


def find_entry(model: str | Path | ModelSpec) -> ModelEntry:
    """The model that a name, a YAML file or a spec means; errors as in `load_model`."""
    if isinstance(model, ModelSpec):
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
