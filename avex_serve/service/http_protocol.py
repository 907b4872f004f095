"""uvicorn's HTTP protocol with a bound on the head of a request: its line and headers, and trailers.

The parser collects each header until it is complete, in time by the square of its size, and before any application
sees the request: one of 200 MiB kept the event loop busy for a minute, and nobody needed a key for it.
"""

import json
from typing import Final

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES: Final = 2**16

_BESIDE: Final = len(b": \r\n")  # in a line, beside name and value
_REFUSAL: Final = json.dumps(
    {"error": f"the request's head is larger than the {MAX_HEAD_BYTES} bytes that are taken"}
)


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 and closes the connection where a head is too large."""

    _unfinished = 0  # bytes since something was complete: a head, a piece of a body, a request
    _too_large = False

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self._too_large:
            self._refuse()

    def on_headers_complete(self) -> None:
        """A head is complete; it may have come all at once."""
        self._unfinished = 0
        size = len(self.url) + sum(len(name) + len(value) + _BESIDE for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._too_large = True
            raise ValueError("the head is too large")  # ends the parser, see `send_400_response`
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body has come."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._unfinished = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser has given up."""
        if self._too_large:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        self._too_large = True
        if self.cycle is None or self.cycle.response_complete:  # else the answer would seem another request's
            head = f"content-type: application/json\r\ncontent-length: {len(_REFUSAL)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[431] + (head + _REFUSAL).encode())
        self.transport.close()


def bound_heads() -> None:
    """Have the servers of this process use it: BentoML, which starts uvicorn, leaves it to choose by itself."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttp.__name__}"
