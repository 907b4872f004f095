"""Parquet files of results, read back by DuckDB."""

import duckdb
import numpy as np
import pyarrow.parquet
import pytest

from avex_serve.archive.parquet import ParquetWriter, cycles, lists, plain, runs

LABELS = ("wren", 'a "quoted", label', "Zaunkönig", "tab\there", "wren")  # two probes may share a label


def write(path, groups):
    with path.open("wb") as file:
        writer = ParquetWriter(file)
        for columns in groups:
            writer.write(columns)
        writer.close()
    return path


def read(path):
    return duckdb.sql(f"SELECT * FROM '{path}'").fetchnumpy()


@pytest.mark.parametrize("windows", [1, 7, 200])
@pytest.mark.parametrize("labels", [("one",), LABELS, tuple(f"label {i}" for i in range(300))], ids=len)
def test_scores(tmp_path, windows, labels):
    random = np.random.default_rng(0)
    scores = random.random((3, windows, len(labels))).astype(np.float32)
    starts = np.arange(3 * windows).reshape(3, windows) / 3
    groups = [
        {
            "recording": runs(["ab" * 32], windows * len(labels)),
            "start": runs(starts[i], len(labels)),
            "label": cycles(labels, windows),
            "score": plain(scores[i].ravel()),
        }
        for i in range(3)
    ]
    columns = read(write(tmp_path / "scores.parquet", groups))
    np.testing.assert_array_equal(columns["score"], scores.ravel())
    np.testing.assert_array_equal(columns["start"], np.repeat(starts.ravel(), len(labels)))
    assert columns["label"].tolist() == list(labels) * 3 * windows
    assert set(columns["recording"]) == {"ab" * 32}


def test_more_labels_than_two_bytes_count(tmp_path):
    labels = tuple(f"label {i}" for i in range(70_000))
    columns = read(write(tmp_path / "many.parquet", [{"label": cycles(labels, 2)}]))
    assert columns["label"].tolist() == list(labels) * 2


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 1280)], ids=str)
def test_embeddings(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    groups = [{"start": runs(np.arange(shape[0]) * 1.0, 1), "embedding": lists(each)} for each in values]
    columns = read(write(tmp_path / "embeddings.parquet", groups))
    np.testing.assert_array_equal(np.stack(columns["embedding"]), np.concatenate(values))
    np.testing.assert_array_equal(columns["start"], np.tile(np.arange(shape[0]), 2))


def test_pyarrow_reads_them(tmp_path):
    values = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    columns = {"label": cycles(LABELS, 4), "score": plain(values.ravel())}
    table = pyarrow.parquet.read_table(write(tmp_path / "scores.parquet", [columns, columns]))
    assert table["label"].to_pylist() == list(LABELS) * 8
    np.testing.assert_array_equal(table["score"].to_numpy(), np.tile(values.ravel(), 2))
    embeddings = write(tmp_path / "embeddings.parquet", [{"embedding": lists(values)}])
    np.testing.assert_array_equal(np.stack(pyarrow.parquet.read_table(embeddings)["embedding"].to_numpy()), values)
