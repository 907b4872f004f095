"""The files of a report: for programs, for tables, for comparisons and for people. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from avex_serve.errors import DependencyError
from avex_serve.seeing.pictures import check_installed
from avex_serve.training.embed import Windows
from avex_serve.training.page import PAGE, make_page
from avex_serve.training.report import EVALUATION, Evaluation, Predictions
from avex_serve.training.scores import write_scores


def can_make_page(say: Callable[[str], None]) -> bool:
    """Whether the extra `plot` is installed; if not, `say` is called with what will be missing."""
    try:
        check_installed()
    except DependencyError as error:
        say(f"the report has no {PAGE}: {error}")
        return False
    return True


def write_report(
    folder: Path, evaluation: Evaluation, windows: Windows, predictions: Sequence[Predictions], *, page: bool
) -> None:
    """Write the files of a report into a folder.

    Args:
        folder: exists.
        evaluation: the report.
        windows: that were evaluated.
        predictions: for them, what the report was made from; none: nothing could be evaluated.
        page: whether to make the page, see `can_make_page`.
    """
    evaluation.write(folder)
    if predictions:
        write_scores(windows, tuple(evaluation.labels), predictions, folder)
    if page:
        paths = {recording.name: recording.path for recording in windows.recordings}
        (folder / PAGE).write_text(make_page(evaluation, paths), "utf-8")


def report_in(folder: Path) -> Path:
    """The file of a report to open first."""
    page = folder / PAGE
    return page if page.is_file() else folder / EVALUATION
