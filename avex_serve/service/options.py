"""What a client may ask for besides the audio: parsed strictly, unknown names refused."""

import json
from collections.abc import Iterable
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avex_serve.errors import InputError
from avex_serve.inference.query import Query
from avex_serve.scheduling.request import current

Model = TypeVar("Model", bound=BaseModel)
QUOTED = 80  # characters of a client's value that an error message repeats


class _ModelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    version: str | None = None

    def query(self) -> Query:
        """The options as a question."""
        return Query(**self.model_dump())


class AudioOptions(_ModelOptions):
    """Options that every way to ask about a recording has."""

    overlap: float = 0.0

    @classmethod
    def from_text(cls, pairs: Iterable[tuple[str, str]]) -> Self:
        """Options from query parameters and form fields.

        BentoML's client writes form fields as JSON (``null``, ``0.5``, ``"name"``), people write plain text; an
        empty value and ``null`` stand for the default.

        Raises:
            InputError: an unknown name, one given twice, or a value of the wrong type.
        """
        fields: dict[str, str] = {}
        for name, text in pairs:
            if name in fields:
                raise InputError(f"{name[:QUOTED]} is given more than once; send it once")
            fields[name] = text
        return validated(cls, {name: _unquoted(text) for name, text in fields.items() if text not in ("", "null")})


class EmbedOptions(AudioOptions):
    """Options of ``/embed``."""

    output: str | None = None


class PredictAllOptions(AudioOptions):
    """Options of ``/predict_all``."""

    threshold: float | None = None
    top_k: int | None = None


class PredictOptions(PredictAllOptions):
    """Options of ``/predict``."""

    probe: str | None = None


class ClassifyRequest(_ModelOptions):
    """The JSON body of ``/classify``."""

    model_config = ConfigDict(strict=True)

    embeddings: list[Any] = Field(exclude=True)
    threshold: float | None = None
    top_k: int | None = None
    probe: str | None = None


def validated(model: type[Model], value: dict[str, Any] | bytes) -> Model:
    """The model from a dict, or from the bytes of a JSON document.

    Raises:
        InputError: not JSON, or not what the model says; the message names the first fault.
        TooLargeError: more JSON than the current request may send.
    """
    if isinstance(value, bytes):
        current().limits.check_json(len(value))
    try:
        return model.model_validate_json(value) if isinstance(value, bytes) else model.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in fault["loc"])[:QUOTED]
        if fault["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise InputError(f"unknown option {where!r}; known: {known}") from None
        if fault["type"] in ("missing", "json_invalid") or not where:
            raise InputError(f"{where}: {fault['msg']}".lstrip(": ")) from None
        raise InputError(f"{where} is {_shortened(fault['input'])}: {fault['msg']}") from None


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _shortened(value: object) -> str:
    # A list may be a whole recording: its type says enough.
    text = type(value).__name__ if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= QUOTED else text[:QUOTED] + "…"
