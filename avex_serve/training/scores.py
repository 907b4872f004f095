"""``evaluation.parquet``: a row for each evaluated window and label, from which reports are compared.

Needs no torch. Other programs read it too: pandas, DuckDB, R.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from avex_serve.archive.parquet import ParquetWriter, cycles, plain, runs
from avex_serve.database import connect, quoted
from avex_serve.errors import InputError, NotFoundError
from avex_serve.training.embed import Windows
from avex_serve.training.report import Predictions, join
from avex_serve.writing import report_full_disk

SCORES: Final = "evaluation.parquet"
_ROWS: Final = 2**20  # of a group of rows


class Scores(NamedTuple):
    """The content of the file."""

    labels: tuple[str, ...]
    recordings: np.ndarray  # (N,) SHA-256 of each window's recording
    groups: np.ndarray  # (N,) name of its group
    spans: np.ndarray  # (N, 2) seconds
    targets: np.ndarray  # (N, C) int8: 1, 0, or -1 where unknown
    predictions: Predictions


def write_scores(windows: Windows, labels: Sequence[str], predictions: Sequence[Predictions], folder: Path) -> None:
    """Write the file into a folder; StorageError if the disk is full.

    Args:
        windows: with their targets.
        labels: C names.
        predictions: of parts of the windows that don't overlap.
        folder: of the report.
    """
    joined = join(predictions)
    order = np.argsort(joined.rows)
    with report_full_disk(), (folder / SCORES).open("wb") as file:
        writer = ParquetWriter(file)
        step = max(1, _ROWS // len(labels))
        for start in range(0, order.size, step):
            chosen = order[start : start + step]
            rows = joined.rows[chosen]
            recordings = [windows.recordings[i] for i in windows.recording[rows]]
            targets = windows.targets[rows].astype(np.float32)
            values = {
                "target": np.where(targets < 0, np.nan, targets),
                "logit": joined.logits[chosen],
                "detected": joined.detected[chosen],
                "probability": joined.probabilities[chosen],
            }
            texts = {
                "file": [recording.name for recording in recordings],
                "recording": [recording.digest for recording in recordings],
                "group": [recording.group for recording in recordings],
            }
            writer.write(
                {name: runs(column, len(labels)) for name, column in texts.items()}
                | {
                    "start": runs(windows.spans[rows, 0], len(labels)),
                    "end": runs(windows.spans[rows, 1], len(labels)),
                    "label": cycles(tuple(labels), rows.size),
                }
                | {name: plain(column.ravel()) for name, column in values.items()}
            )
        writer.close()


def read_scores(path: Path) -> Scores:
    """Read the file.

    Raises:
        NotFoundError: no such file.
        InputError: not such a file.
    """
    if not path.is_file():
        raise NotFoundError(
            f"{path}: no such file; fit and evaluate write it next to evaluation.json, if anything was evaluated"
        )
    import duckdb

    try:
        with connect() as database:
            query = 'SELECT recording, "group", start, "end", label, target, logit, detected, probability FROM '
            columns = database.execute(f"{query} read_parquet({quoted(path)})").fetchnumpy()
    except (OSError, duckdb.Error) as error:
        raise InputError(f"{path} holds no scores of a report: {error}") from None
    names = columns["label"]
    later = np.flatnonzero(names[1:] == names[0])
    count = int(later[0]) + 1 if later.size else names.size
    table = {name: np.asarray(column).reshape(-1, count) for name, column in columns.items()}
    return Scores(
        labels=tuple(map(str, table["label"][0])),
        recordings=table["recording"][:, 0].astype(str),
        groups=table["group"][:, 0].astype(str),
        spans=np.stack([table["start"][:, 0], table["end"][:, 0]], axis=1),
        targets=np.nan_to_num(table["target"], nan=-1).astype(np.int8),
        predictions=Predictions(
            np.arange(len(table["label"])), table["logit"], table["detected"], table["probability"]
        ),
    )
