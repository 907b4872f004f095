"""`avex-serve compare`: paired differences, checked against an independent bootstrap."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from avex_serve.cli import main
from avex_serve.errors import InputError, NotFoundError
from avex_serve.training.compare import compare_reports
from avex_serve.training.scores import read_scores
from tests.training.reports import make_windows, write

LABELS = ("robin", "wren")


@pytest.fixture
def windows(tmp_path):
    return make_windows(tmp_path / "data", LABELS, recordings=20)


def test_the_scores_file_holds_what_was_evaluated(windows, tmp_path):
    evaluation, logits = write(tmp_path / "a", windows, LABELS)
    rows = pd.read_parquet(tmp_path / "a" / "evaluation.parquet")
    assert len(rows) == logits.size
    assert rows["target"].isna().sum() == 1
    assert rows["logit"].to_numpy().reshape(logits.shape) == pytest.approx(logits, abs=1e-6)
    for label, found in rows.dropna(subset="target").groupby("label"):
        expected = evaluation.labels[label].average_precision.value
        assert average_precision_score(found["target"], found["logit"]) == pytest.approx(expected)
        probable = (found["target"] - found["probability"]).abs()
        assert probable.max() < 1
    scores = read_scores(tmp_path / "a" / "evaluation.parquet")
    assert scores.labels == LABELS
    assert np.array_equal(scores.targets, windows.targets)
    assert np.array_equal(scores.spans, windows.spans)


def test_differences_are_paired(windows, tmp_path):
    _, first = write(tmp_path / "a", windows, LABELS, skill=0.5)
    _, second = write(tmp_path / "b", windows, LABELS, skill=1.0)
    found = compare_reports(tmp_path / "a", tmp_path / "b" / "evaluation.json")
    assert (found.recordings, found.groups, found.windows) == (20, 20, (120, 120))
    targets = windows.targets[:, 1]

    def difference(rows):
        return average_precision_score(targets[rows], second[rows, 1]) - average_precision_score(
            targets[rows], first[rows, 1]
        )

    each = found.labels["wren"]["average_precision"]
    assert each.difference == pytest.approx(difference(np.arange(120)), abs=1e-6)
    rng = np.random.default_rng(5)
    drawn = [difference((rng.integers(20, size=20)[:, None] * 6 + np.arange(6)).ravel()) for _ in range(1000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert (each.low, each.high) == pytest.approx((low, high), abs=0.02)
    mean = found.macro["average_precision"]
    parts = [found.labels[label]["average_precision"].difference for label in LABELS]
    assert mean.difference == pytest.approx(np.mean(parts))
    assert mean.sure
    same = compare_reports(tmp_path / "a", tmp_path / "a").macro["auroc"]
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert not same.sure


def test_windows_of_other_lengths_are_paired_by_recording(windows, tmp_path):
    write(tmp_path / "a", windows, LABELS)
    half = np.arange(0, len(windows.targets), 2)
    spans = np.stack([windows.spans[half, 0], windows.spans[half, 0] + 2], axis=1)
    longer = replace(windows, targets=windows.targets[half], spans=spans, recording=windows.recording[half])
    write(tmp_path / "b", longer, LABELS)
    found = compare_reports(tmp_path / "a", tmp_path / "b")
    assert found.windows == (120, 60)
    assert any("windows of different places or lengths" in note for note in found.notes)


def test_labels_of_one_report_are_left_out(windows, tmp_path):
    write(tmp_path / "a", windows, LABELS)
    write(tmp_path / "b", windows, ("wren", "owl"))
    with pytest.raises(InputError, match="windows have other labels"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    swapped = replace(windows, targets=windows.targets[:, ::-1].copy())
    write(tmp_path / "b", swapped, ("wren", "owl"))
    found = compare_reports(tmp_path / "a", tmp_path / "b")
    assert set(found.labels) == {"wren"}
    assert any("robin" in note for note in found.notes)
    assert any("owl" in note for note in found.notes)


def test_reports_of_other_data_are_refused(windows, tmp_path):
    write(tmp_path / "a", windows, LABELS)
    others = tuple(replace(each, digest=f"f{each.digest[1:]}") for each in windows.recordings[:3])
    write(tmp_path / "b", replace(windows, recordings=others + windows.recordings[3:]), LABELS)
    with pytest.raises(InputError, match="different recordings: 3 are only in"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    sites = tuple(replace(each, group="site") for each in windows.recordings)
    write(tmp_path / "b", replace(windows, recordings=sites), LABELS)
    with pytest.raises(InputError, match="group their recordings differently"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b", windows, ("x", "y"))
    with pytest.raises(InputError, match="no label in common"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "evaluation.parquet").unlink()
    with pytest.raises(NotFoundError, match="fit and evaluate write it"):
        compare_reports(tmp_path / "a", tmp_path / "b")
    with pytest.raises(NotFoundError, match="expected the folder of a report"):
        compare_reports(tmp_path / "a", tmp_path)
    (tmp_path / "b" / "evaluation.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="holds no scores of a report"):
        compare_reports(tmp_path / "a", tmp_path / "b")


def test_the_command(windows, tmp_path, capsys):
    write(tmp_path / "a", windows, LABELS, skill=0.2)
    write(tmp_path / "b", windows, LABELS, skill=2.0)
    target = tmp_path / "compared.json"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(target)]) == 0
    said = capsys.readouterr().out
    assert "20 recordings in 20 groups" in said
    row = next(line for line in said.splitlines() if line.startswith("average precision"))
    assert row.endswith("*")
    document = json.loads(target.read_text())
    assert f"{document['macro']['average_precision']['a']:.3f}" in row
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(target / "x.json")]) == 6
    assert "the results can't be written" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
