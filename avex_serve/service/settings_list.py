"""Every setting as a list: what `avex-serve settings` prints."""

import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import SecretStr
from pydantic_core import to_jsonable_python

from avex_serve.service.settings import PREFIX, Settings

REDACTED: Final = "(set)"


class Setting(NamedTuple):
    """One setting; the values are what JSON can hold, and secrets say only whether they are set."""

    variable: str
    default: Any
    value: Any
    description: str


def list_settings(environment: Mapping[str, str] = os.environ, kind: type[Settings] = Settings) -> list[Setting]:
    """The settings as the environment says; InputError for a value that makes no sense."""
    settings = kind.from_environment(environment)
    return [
        Setting(
            PREFIX + name.upper(),
            _shown(field.get_default()),
            _shown(getattr(settings, name)),
            field.description or "",
        )
        for name, field in kind.model_fields.items()
    ]


def table(settings: list[Setting]) -> str:
    """The settings as a table for people."""
    rows = [("variable", "value", "default", "description")]
    rows += [(each.variable, _text(each.value), _text(each.default), each.description) for each in settings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _shown(value: Any) -> Any:
    return to_jsonable_python(_redacted(value))


def _redacted(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return REDACTED
    if isinstance(value, tuple | list | set | frozenset):
        return [_redacted(each) for each in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):  # as the variable has it
        return os.pathsep.join(map(str, value))
    return "none" if value is None else str(value)
