"""The label map of a model: JSON ``{label: index}``, as avex publishes it beside the weights of a classifier."""

import logging
from typing import Any

from avex_serve.bundles.labels import parse_labels
from avex_serve.errors import BundleError
from avex_serve.models.files import find_local, resolve_file

logger = logging.getLogger(__name__)

LabelMapping = dict[str, dict[Any, Any]]


def read_label_mapping(uri: str) -> LabelMapping | None:
    """``{"label_to_index": {label: index}, "index_to_label": {index: label}}``, or None with a warning if absent.

    Args:
        uri: a path or URI, see `avex_serve.models.files.resolve_file`.

    Raises:
        ValueError: the file is no label map: an object of labels with the indices 0 to n - 1, each once.
    """
    try:
        path = resolve_file(uri, "Label map")
    except (FileNotFoundError, ModuleNotFoundError) as error:
        logger.warning("%s; label_mapping is None", error)
        return None
    try:
        labels = parse_labels(path.read_bytes(), source=uri)
    except BundleError as error:
        raise ValueError(str(error)) from None
    return {
        "label_to_index": {label: index for index, label in enumerate(labels)},
        "index_to_label": dict(enumerate(labels)),
    }


def count_labels(uri: str | None) -> int | None:
    """How many labels the map has, or None if that isn't known without network."""
    path = None if uri is None else find_local(uri)
    mapping = None if path is None else read_label_mapping(str(path))
    return None if mapping is None else len(mapping["label_to_index"])
