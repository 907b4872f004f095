"""``avex-serve retrain`` as a process that the review page starts, watches and cancels; and what it has written."""

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from avex_serve.errors import InputError

RETRAINED: Final = "retrained"  # the folder within a results store
BEFORE: Final = "before"  # report of the head that was reviewed, in the folder of the new one
COMPARISON: Final = "comparison.json"
REPORT: Final = "report.html"
NEEDED: Final = {"torch": "export", "avex_export": "export"}  # packages, and the extra that has them
_LINES: Final = 12  # of its progress that are shown
_PATIENCE: Final = 30.0  # seconds for it to end


def folder_of(store: Path, number: int) -> Path:
    """The folder of a retrained head, whose name is that of the head."""
    return store / RETRAINED / f"retrained-{number}"


def missing_packages() -> str | None:
    """What must be installed before a head can be trained; None: nothing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} is not installed. Install it by: pip install 'avex-serve[{NEEDED[missing[0]]}]'"


class Retraining:
    """At most one process at a time, and the retrained heads of a store."""

    def __init__(self, store: Path | None, options: Sequence[str], missing: str | None) -> None:
        """Nothing is started yet.

        Args:
            store: the folder of a results store; None: there is none.
            options: of ``avex-serve retrain``, after the store.
            missing: why nothing can be retrained, and what to do; None: it can.
        """
        self._store = store
        self._options = options
        self._missing = missing
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._newest = 0  # head before the process started; one with a higher number is not whole yet
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._error: str | None = None
        self._cancelled = False

    def start(self) -> None:
        """Start the command; InputError if that is not possible now."""
        if self._missing is not None:
            raise InputError(self._missing)
        with self._lock:
            if self._process is not None:
                raise InputError("a head is being trained already; wait for it, or cancel it")
            self._newest = max(self._numbers(), default=0)
            self._lines.clear()
            self._error, self._cancelled = None, False
            command = [sys.executable, "-m", "avex_serve", "retrain", str(self._store), *self._options]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def cancel(self) -> None:
        """End the command if it runs; what it has written in part is removed."""
        with self._lock:
            process, self._cancelled = self._process, True
        if process is not None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()

    def describe(self) -> dict[str, Any]:
        """The state of the process, and the heads, the last one first."""
        with self._lock:
            return {
                "missing": self._missing,
                "running": self._process is not None,
                "lines": list(self._lines),
                "error": self._error,
                "heads": self._heads(),
            }

    def report(self, number: int, *, before: bool) -> Path | None:
        """A report of a retrained head, or of the head before it; None: there is none."""
        if self._store is None:
            return None
        folder = folder_of(self._store, number)
        path = (folder / BEFORE if before else folder) / REPORT
        return path if path.is_file() else None

    def _watch(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        last = ""
        with process.stderr as lines:
            for line in lines:
                if last := line.rstrip("\n") or last:
                    with self._lock:
                        self._lines.append(last)
        code = process.wait()
        with self._lock:
            self._process = None
            if code and not self._cancelled:
                self._error = last.removeprefix("avex-serve: ") or f"the training ended with the status {code}"

    def _heads(self) -> list[dict[str, Any]]:
        running = self._process is not None
        whole = [number for number in self._numbers() if not running or number <= self._newest]
        return [self._head(number) for number in sorted(whole, reverse=True)]

    def _numbers(self) -> list[int]:
        if self._store is None:
            return []
        ends = [path.name.removeprefix("retrained-") for path in (self._store / RETRAINED).glob("retrained-*")]
        return [int(end) for end in ends if end.isascii() and end.isdigit()]  # not of a user's copy of one

    def _head(self, number: int) -> dict[str, Any]:
        assert self._store is not None
        folder = folder_of(self._store, number)
        try:
            comparison = json.loads((folder / COMPARISON).read_bytes())
        except OSError:
            comparison = None
        return {
            "number": number,
            "name": folder.name,
            "report": self.report(number, before=False) is not None,
            "before": self.report(number, before=True) is not None,
            "comparison": comparison,
        }
