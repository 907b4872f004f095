"""From a spec to a backbone with random weights."""

from avex_serve.configs import ModelSpec
from avex_serve.models.base_model import ModelBase
from avex_serve.models.utils.registry import get_model_class

# Fields of ModelSpec that are about loading, or free-form; the others go to the architecture if they are set.
_NOT_FOR_THE_MODEL = {"name", "pretrained", "device", "extra_config", "audio_config"}


def build_model_from_spec(
    model_spec: ModelSpec,
    device: str | None = None,
    *,
    num_classes: int | None = None,
    return_features_only: bool = False,
) -> ModelBase:
    """Build a backbone with random weights, in eval mode.

    Args:
        model_spec: architecture and geometry.
        device: where to put it; None: the spec's.
        num_classes: of its classifier; None: no classifier.
        return_features_only: leave the classifier out.

    Raises:
        ValueError: an unknown architecture, or fields that it can't take.
    """
    cls = get_model_class(model_spec.name)
    options = model_spec.model_dump(exclude=_NOT_FOR_THE_MODEL, exclude_none=True)
    model = cls(
        num_classes=num_classes,
        device=device or model_spec.device,
        audio_config=model_spec.audio_config,
        return_features_only=return_features_only,
        **options,
    )
    return model.eval()
