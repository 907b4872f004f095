"""DuckDB in memory, which reads and writes Parquet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb


@contextmanager
def connect(threads: int = 1) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database. With one thread, rows keep their order and files their bytes.

    Raises:
        OSError: in the block, for a file that can't be read or written.
    """
    database = duckdb.connect(config={"threads": threads, "memory_limit": "1GB"})
    try:
        yield database
    except duckdb.IOException as error:
        raise OSError(str(error)) from error
    finally:
        database.close()


def quoted(text: str | os.PathLike[str]) -> str:
    """A string of SQL."""
    return "'" + str(text).replace("'", "''") + "'"
