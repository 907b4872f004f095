"""Memory: what an export that needs too much of it says."""

import contextlib
import re
from collections.abc import Iterator

from avex_serve.errors import ExportError

# Torch and onnxruntime have no error class for it.
_REFUSALS = re.compile(r"can't allocate memory|failed to allocate memory|bad_alloc|bad allocation", re.IGNORECASE)


@contextlib.contextmanager
def shortage_told() -> Iterator[None]:
    """Turn what the allocators of numpy, torch and onnxruntime raise into an ExportError with the remedy."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, MemoryError) or _REFUSALS.search(str(error))):
            raise
        raise ExportError(
            "there is not enough memory: long clips take most of it; give a smaller --clip-seconds, or more memory. "
            "Nothing was written"
        ) from error
