"""Progress: the step that is running, and a bar for long steps."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

_Item = TypeVar("_Item")


class Progress:
    """Announces steps with the seconds since the start."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.monotonic()

    def __call__(self, step: str) -> None:
        """Announce a step."""
        self._say(f"[{time.monotonic() - self._started:5.1f} s] {step}")


def bar(items: Sequence[_Item], title: str) -> Iterable[_Item]:
    """The items, with a bar on standard error during the iteration if that is a terminal."""
    shown: Iterable[_Item] = tqdm(items, desc=title, leave=False, disable=None)
    return shown


@contextlib.contextmanager
def counter(total: int, title: str) -> Iterator[Callable[[], None]]:
    """The same bar for steps that another function takes: call the returned function after each."""
    with tqdm(total=total, desc=title, leave=False, disable=None) as shown:

        def count() -> None:
            shown.update()

        yield count
