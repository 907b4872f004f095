"""The files of the pages: modules, style sheets and documents, all of them in `static/` next to this module.

They are read once and found by name in a table, so no path that a client sends is ever opened.

A document names all modules that its script imports, so that the browser loads them at once instead of one level of
imports after the other.
"""

import hashlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

STATIC: Final = Path(__file__).parent / "static"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
SCRIPT: Final = re.compile(rb'<script type="module" src="page/([^"]+)"></script>\n')
IMPORT: Final = re.compile(rb'^import\s[^"]*"([^"]+)"', re.MULTILINE)
# No script, style or connection from elsewhere, none written into a document, and no other page around it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final[Mapping[str, str]] = MappingProxyType({
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and answered by 304 while it is the same
})  # fmt: skip


class Asset(NamedTuple):
    """A file of the pages."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or only that the browser has it already."""
        headers = {**HEADERS, "ETag": self.etag}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@cache
def assets() -> Mapping[str, Asset]:
    """All files by their name within `static/`, such as ``app.js``."""
    files = {
        path.relative_to(STATIC).as_posix(): path.read_bytes() for path in STATIC.rglob("*") if path.suffix in TYPES
    }
    return MappingProxyType({name: _asset(files, name) for name in files})


def _asset(files: Mapping[str, bytes], name: str) -> Asset:
    content = files[name]
    if (script := SCRIPT.search(content)) is not None:
        modules = sorted(set(_imported(files, script[1].decode())))
        links = "".join(f'  <link rel="modulepreload" href="page/{module}">\n' for module in modules)
        content = content[: script.end()] + links.encode() + content[script.end() :]
    return Asset(content, TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _imported(files: Mapping[str, bytes], name: str) -> Iterator[str]:
    """The modules that a module imports, and those that these import; some more than once."""
    for target in IMPORT.findall(files[name]):
        module = posixpath.normpath(posixpath.join(posixpath.dirname(name), target.decode()))
        yield module
        yield from _imported(files, module)
