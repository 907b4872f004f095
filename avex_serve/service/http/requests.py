"""What HTTP requests carry: a recording as the body or as a file of a multipart form, its options, JSON."""

import logging
from collections.abc import Collection
from typing import Any, Final

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from avex_serve.errors import InputError, StorageError, TooLargeError
from avex_serve.inference.pipeline import Query
from avex_serve.service import parsing
from avex_serve.service.front import CONTROL_BYTES

logger = logging.getLogger(__name__)

AUDIO_FIELD: Final = "audio"
MAX_FIELDS: Final = 16  # of a form, besides the file; there are fewer options
MAX_FIELD_BYTES: Final = 2**16


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The JSON body of ``/classify``."""

    model: str | None = None
    version: str | None = None
    embeddings: list[Any]
    threshold: float | None = None
    top_k: int | None = None
    probe: str | None = None

    def query(self) -> Query:
        """The options."""
        return Query(
            model=self.model,
            version=self.version,
            threshold=self.threshold,
            top_k=self.top_k,
            probe=self.probe,
        )


async def read_recording(request: Request, options: Collection[str]) -> tuple[bytes, Query]:
    """The encoded recording, and the query that the URL's query and form fields describe.

    Args:
        request: the request.
        options: the options that it may have.

    Raises:
        InputError: a malformed form, or options that are unknown or of another type.
        StorageError: a large file has no room on disk.
    """
    pairs = request.query_params.multi_items()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return await read_body(request), parsing.query_from_text(pairs, options)
    audio: bytes | None = None
    _refuse_encoding(request)
    try:
        async with request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for name, field in form.multi_items():
                if name != AUDIO_FIELD and isinstance(field, str):
                    pairs.append((name, field))
                elif name == AUDIO_FIELD and isinstance(field, UploadFile) and audio is None:
                    audio = await field.read()
                else:
                    raise InputError(f"form field {name!r}: expected one file {AUDIO_FIELD!r} and options as text")
    except (MultiPartException, ValueError) as error:
        raise InputError(f"malformed multipart body: {error}") from None
    except OSError as error:  # of the temporary file that holds a large part
        logger.error("a form's file can't be stored: %s", error.strerror)
        raise StorageError("the service has no room on disk for a form; send the recording as the body") from None
    if audio is None:
        raise InputError(
            f"the multipart body holds no whole file {AUDIO_FIELD!r}; send it as -F {AUDIO_FIELD}=@FILE"
        )
    return audio, parsing.query_from_text(pairs, options)


async def read_body(request: Request) -> bytes:
    """The body; HTTPException if it is compressed."""
    _refuse_encoding(request)
    return await request.body()


async def read_small_body(request: Request) -> bytes:
    """The body of a request that is parsed on the event loop, which a large JSON document would block."""
    _refuse_encoding(request)
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > CONTROL_BYTES:
            raise TooLargeError(f"the body is too large; expected at most {CONTROL_BYTES} bytes here")
    return body


def _refuse_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "compressed requests are not supported; send the body without Content-Encoding")
