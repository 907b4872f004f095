"""Progress: which step is running and since when, and a bar for the steps that take long."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

_Item = TypeVar("_Item")


class Progress:
    """Tells which step is running and how long each took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.monotonic()

    def __call__(self, step: str) -> None:
        """Announce a step."""
        self._say(f"[{time.monotonic() - self._started:5.1f} s] {step}")


def bar(items: Sequence[_Item], title: str) -> Iterable[_Item]:
    """The items, with a bar on standard error while they are gone through; none where that is no terminal."""
    shown: Iterable[_Item] = tqdm(items, desc=title, leave=False, disable=None)
    return shown


@contextlib.contextmanager
def counter(total: int, title: str) -> Iterator[Callable[[], None]]:
    """The same for things that come one by one from elsewhere: what is given is called after each."""
    with tqdm(total=total, desc=title, leave=False, disable=None) as shown:

        def count() -> None:
            shown.update()

        yield count
