"""Labels in the order of the logits, as files hold them: JSON ``{label: index}`` as avex has it, or one a line."""

import json
from pathlib import Path
from typing import Any

from avex_serve.errors import BundleError, InputError, NotFoundError


def parse_labels(text: str | bytes, *, source: str) -> tuple[str, ...]:
    """Labels in the order of their indices, from avex's ``{label: index}`` JSON.

    Raises:
        BundleError: not such an object, a label given twice, or indices that are not 0 … n-1, each once.
    """
    try:
        mapping = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise BundleError(f"{source} is not JSON of labels: {error}") from None
    if not isinstance(mapping, dict) or not all(type(index) is int for index in mapping.values()):
        raise BundleError(f"{source} must be one JSON object {{label: index}}")
    if sorted(mapping.values()) != list(range(len(mapping))) or not mapping:
        raise BundleError(f"{source}: indices must be 0 to {len(mapping) - 1}, each once")
    return tuple(sorted(mapping, key=mapping.__getitem__))


def dump_labels(labels: tuple[str, ...]) -> str:
    """The text of ``labels.json``; BundleError for a label given twice."""
    if twice := _repeated(labels):
        raise BundleError(f"labels must differ from one another; more than once: {twice}")
    return json.dumps({label: index for index, label in enumerate(labels)}, indent=1, ensure_ascii=False) + "\n"


def read_label_file(path: Path) -> tuple[str, ...]:
    """Labels from JSON ``{label: index}`` (``.json``), or from text with one label a line.

    Raises:
        NotFoundError: no such file.
        InputError: the file can't be read, holds no labels, or holds one twice.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix == ".json":
        try:
            return parse_labels(text, source=str(path))
        except BundleError as error:
            raise InputError(str(error)) from None
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise InputError(f"{path} holds no labels; expected one a line")
    if twice := _repeated(labels):
        raise InputError(f"{path} names labels more than once: {', '.join(twice)}")
    return labels


def _repeated(labels: tuple[str, ...]) -> list[str]:
    """The first five labels that occur more than once."""
    return sorted({label for label in labels if labels.count(label) > 1})[:5]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):  # json silently keeps the last one
        raise ValueError("a label is given more than once")
    return mapping
