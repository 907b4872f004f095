"""Files of labels, as editors, spreadsheets and programs write them."""

import codecs
import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from avex_serve.bundles.reading import check_labels, parse_labels
from avex_serve.errors import BundleError, InputError, NotFoundError

_EXPECTED = (
    "expected one label on each line (.txt), a table of labels or of labels and indices (.csv, .tsv), or a list, "
    "{label: index} or {index: label} (.json, .yml)"
)
_ENDINGS = ("", ".txt", ".csv", ".tsv", ".json", ".yml", ".yaml")
# First cells of the title row of a table; pandas leaves that of its index empty.
_TITLES = {
    "",
    "class",
    "classes",
    "label",
    "labels",
    "name",
    "names",
    "species",
    "index",
    "id",
    "class_id",
    "class_name",
}
# Lines of another format: an item of a list, a text of a program, or a number before a label.
_ITEM = re.compile(r"""[-*]\s+\S|["'].*["'],?$""")
_NUMBERED = re.compile(r"(\d+)[.:)]?\s+\S")


def read_label_file(path: Path) -> tuple[str, ...]:
    """Labels in the order of the logits; its ending, in any case, says how the file is read.

    Raises:
        NotFoundError: no such file.
        InputError: the file can't be read, has another format, or no labels, empty ones or one twice.
    """
    kind = path.suffix.lower()
    text = _text(path)
    try:
        if kind == ".json" or (kind in ("", ".txt") and _is_json(text)):
            labels = _from_json(text, path)
        elif kind in (".yml", ".yaml"):
            labels = _from_yaml(text)
        elif kind in (".csv", ".tsv"):
            delimiter = max("\t" if kind == ".tsv" else ",;\t", key=text.partition("\n")[0].count)
            labels = _from_table(list(csv.reader(text.splitlines(), delimiter=delimiter, strict=True)))
        else:
            labels = _from_lines([line.strip() for line in text.splitlines() if line.strip()])
        if not labels:
            raise ValueError(f"it holds no labels; {_EXPECTED}")
    except (ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from None
    try:
        check_labels(labels, str(path))
    except ValueError as error:
        raise InputError(str(error)) from None
    return labels


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(f"{path}: the ending {path.suffix} is not known; {_EXPECTED}")
    # Editors on Windows write a byte order mark, some of them UTF-16.
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    if "\0" in text or "\ufeff" in text:
        raise InputError(f"{path} is not plain text; save it as UTF-8 text. {_EXPECTED.capitalize()}")
    return text


def _is_json(text: str) -> bool:
    """Whether it is a list or mapping."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _from_json(text: str, path: Path) -> tuple[str, ...]:
    if text.lstrip().startswith("["):
        return _listed(json.loads(text))
    with suppress(ValueError, RecursionError):  # {index: label}, as id2label of Hugging Face's configurations
        pairs = json.loads(text, object_pairs_hook=list)
        if isinstance(pairs, list) and all(isinstance(label, str) for _, label in pairs):
            return _ordered(pairs)
    try:
        return parse_labels(text, source=str(path))
    except BundleError as error:
        raise InputError(str(error)) from None


def _from_yaml(text: str) -> tuple[str, ...]:
    # This loader makes text, lists and mappings alone; by others, "no" and "1" would be of another type.
    content = yaml.load(text, yaml.BaseLoader)
    if isinstance(content, Mapping):
        indices = sorted(map(str, range(len(content))))
        by_label = sorted(content) != indices or sorted(map(str, content.values())) == indices
        return _ordered(
            [(str(index), str(label)) if by_label else (label, str(index)) for label, index in content.items()]
        )
    if not isinstance(content, list):
        raise ValueError(f"it is no list; {_EXPECTED}")
    return _listed(content)


def _listed(labels: Sequence[Any]) -> tuple[str, ...]:
    if other := [label for label in labels if not isinstance(label, str)]:
        raise ValueError(f"{other[0]!r} is no label; {_EXPECTED}")
    return tuple(labels)


def _from_table(rows: list[list[str]]) -> tuple[str, ...]:
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]
    if rows and {cell.lower() for cell in rows[0]} <= _TITLES:
        rows = rows[1:]
    widths = {len(row) for row in rows}
    if widths == {1}:
        return tuple(row[0] for row in rows)
    if widths != {2}:
        raise ValueError(f"its rows have {' or '.join(map(str, sorted(widths)))} columns; {_EXPECTED}")
    pairs = [rows, [row[::-1] for row in rows]]
    fitting = [each for each in pairs if sorted(index for index, _ in each) == sorted(map(str, range(len(rows))))]
    if len(fitting) != 1:
        raise ValueError(
            f"one of its two columns must hold the indices 0 to {len(rows) - 1}, each once, and the other one labels"
        )
    return _ordered(fitting[0])


def _ordered(pairs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The labels of pairs of an index and a label."""
    labels = {index: label for index, label in pairs}  # noqa: C416 (a pair may be a list)
    try:
        return tuple(labels[str(index)] for index in range(len(pairs)))
    except KeyError:
        raise ValueError(f"its indices must be 0 to {len(pairs) - 1}, each once") from None


def _from_lines(lines: list[str]) -> tuple[str, ...]:
    for delimiter in "\t,;":
        rows = [line.split(delimiter) for line in lines]
        numbered = any(all(cells[place].strip().isdecimal() for cells in rows) for place in (0, -1))
        if lines and all(len(cells) == 2 for cells in rows) and (numbered or delimiter == "\t"):
            return _from_table(rows)
    if any("\t" in line for line in lines):
        raise ValueError(f"a line has a tab; {_EXPECTED}")
    numbers = [int(match[1]) if (match := _NUMBERED.match(line)) else None for line in lines]
    if lines and (all(map(_ITEM.match, lines)) or numbers in [list(range(k, k + len(lines))) for k in (0, 1)]):
        raise ValueError(f"{lines[0]!r} is not a label alone; {_EXPECTED}")
    return tuple(lines)
