"""The decisions of all annotators: a folder with a file for each of them, which only grows."""

import contextlib
import csv
import fcntl
import io
import os
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from avex_serve.annotations.reviews import COLUMNS, DECISIONS, Decision, Review, Subject, read_reviews
from avex_serve.annotations.table import one_line
from avex_serve.errors import InputError, NotFoundError
from avex_serve.writing import report_full_disk

REVIEWS: Final = "reviews"  # the folder within a results store
NAME: Final = re.compile(r"[\w][\w .-]{0,39}")  # of an annotator, and so of a file
LONGEST: Final = 1000  # characters of a comment or label


class Answer(NamedTuple):
    """A decision about a window and a label; None: withdrawn."""

    subject: Subject
    decision: Decision | None
    comment: str = ""


class Book:
    """The decisions in a folder. Other processes may add to it: `refresh` reads what they have written.

    Decisions that belong together have the same time.
    """

    def __init__(self, folder: Path) -> None:
        """Read the decisions in a folder, which need not exist.

        Raises:
            InputError: a table in it can't be read.
        """
        self.folder = folder
        self._lock = threading.Lock()
        self._seen: dict[Path, tuple[int, int]] = {}
        self._reviews: dict[tuple[Subject, str], Review] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the folder again if a file has changed."""
        with self._lock:
            if (found := self._look()) != self._seen:
                try:
                    reviews = read_reviews(self.folder)
                except NotFoundError:  # tables without any decision
                    reviews = []
                self._reviews = {(review.subject, review.annotator): review for review in reviews}
                self._seen = found

    @property
    def reviews(self) -> list[Review]:
        """The decisions that hold, in the order in which they were made."""
        return list(self._reviews.values())

    def write(self, annotator: str, answers: Sequence[Answer]) -> None:
        """Add decisions that belong together, such as that about another label; they are on disk on return.

        Raises:
            InputError: a name, a decision or a text that can't be written.
            StorageError: the disk is full.
        """
        check_annotator(annotator)
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        rows = [_row(answer, annotator, time) for answer in answers]
        with self._lock:
            self._append(annotator, rows)
            for answer in answers:
                key = (answer.subject, annotator)
                self._reviews.pop(key, None)
                if answer.decision is not None:
                    self._reviews[key] = Review(*answer.subject, answer.decision, annotator, answer.comment, time)

    def undo(self, annotator: str) -> list[Review]:
        """Withdraw the last decisions of an annotator that belong together; returns them, the first one first."""
        own = [review for review in self.reviews if review.annotator == annotator and review.time]
        last = [review for review in own if review.time == own[-1].time]
        if last:
            self.write(annotator, [Answer(review.subject, None) for review in last])
        return last

    def _look(self) -> dict[Path, tuple[int, int]]:
        if not self.folder.is_dir():
            return {}
        found = {path: path.stat() for path in sorted(self.folder.iterdir()) if path.suffix and path.is_file()}
        return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}

    def _append(self, annotator: str, rows: Sequence[tuple[str, ...]]) -> None:
        """Add whole lines to a file; a line that a killed process left unfinished is removed first.

        Raises:
            InputError: another program has saved the file in another form, in which these lines would be lost.
            StorageError: the disk is full.
        """
        path = self.folder / f"{annotator}.csv"
        with report_full_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                with contextlib.suppress(OSError):  # some file systems of clusters have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                size, ended = _whole_lines(file)
                file.seek(0)
                if size and _cells(file.readline())[: len(COLUMNS)] != list(COLUMNS):
                    raise InputError(
                        f"{path} was saved by another program: its first line isn't {','.join(COLUMNS)}. Rename it "
                        "(its decisions in the folder still count), and decide again"
                    )
                known = size == self._seen.get(path, (0, 0))[0]  # nobody else has written since
                file.truncate(size)
                text = io.StringIO("" if ended else "\n")
                text.seek(0, os.SEEK_END)
                csv.writer(text, lineterminator="\n").writerows(rows if size else [COLUMNS, *rows])
                try:
                    file.write(text.getvalue().encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
                status = os.fstat(file.fileno())
        if known:
            self._seen[path] = (status.st_size, status.st_mtime_ns)


def check_annotator(name: str) -> None:
    """Raise InputError for a name that can't be that of a file."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"the annotator {name[:50]!r}; expected a name of at most 40 letters, digits, spaces, dots, hyphens and "
            "underscores that begins with a letter or digit"
        )


def _row(answer: Answer, annotator: str, time: str) -> tuple[str, ...]:
    subject = answer.subject
    if answer.decision not in (None, *DECISIONS):
        raise InputError(f"decision {answer.decision!r}; expected one of {', '.join(DECISIONS)}")
    label = one_line(subject.label).strip()
    if not label or label != subject.label:
        raise InputError(f"label {subject.label!r}; expected a name on one line, without spaces around it")
    if max(len(label), len(answer.comment)) > LONGEST:
        raise InputError(f"a label or comment of more than {LONGEST} characters; shorten it")
    if one_line(subject.file) != subject.file or any("\ud800" <= each <= "\udfff" for each in subject.file):
        raise InputError(f"{subject.file!r} has a name that a table can't hold; rename the recording")
    times = (f"{subject.start!r}", f"{subject.end!r}")
    return (subject.file, *times, label, answer.decision or "", annotator, one_line(answer.comment).strip(), time)


def _whole_lines(file: io.BufferedRandom) -> tuple[int, bool]:
    """The size of a file up to its last whole line, and whether that ends in a line break: editors may drop it."""
    start = end = file.seek(0, os.SEEK_END)
    last = b""
    while start and b"\n" not in last:
        step = min(start, 4096)
        start -= step
        file.seek(start)
        last = file.read(step) + last
    whole = last.rfind(b"\n") + 1
    if len(_cells(last[whole:])) >= len(COLUMNS):
        return end, False
    return start + whole, True


def _cells(line: bytes) -> list[str]:
    text = line.decode("utf-8-sig", "replace").rstrip("\r\n")
    return next(csv.reader([text]), [])
