"""`avex-serve density`: reviewed windows are found in the store, and densities are those of its scores."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve.calibration.density import call_density, score_bands
from avex_serve.cli import main
from tests.bundles import LABELS, SAMPLE_RATE

LABEL = LABELS[0]
HEADER = "file,start,end,label,decision,annotator,comment,time\n"


@pytest.fixture
def store(bundles, command, tmp_path):
    """A store of recordings at two sites."""
    random = np.random.default_rng(0)
    for i in range(6):
        folder = tmp_path / "archive" / ("north" if i < 3 else "south")
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{i}.wav", random.uniform(-1, 1, 20 * SAMPLE_RATE), SAMPLE_RATE)
    assert command("run", bundles["plain"], tmp_path / "archive", "--out", tmp_path / "store")[0] == 0
    return tmp_path / "store"


@pytest.fixture
def windows(store, command):
    """Every window of the label: file, start, end and score."""
    assert command("tables", store, "--format", "csv", "--threshold", "0", "--label", LABEL)[0] == 0
    table = store / "tables" / "detections.csv"
    with table.open() as file:
        return list(csv.DictReader(file))


def test_densities_are_those_of_the_scores(store, windows, command, tmp_path):
    scores = np.array([float(row["score"]) for row in windows])
    has = np.random.default_rng(1).random(scores.size) < (scores - scores.min()) / np.ptp(scores) / 3
    bands = np.searchsorted(score_bands(scores), scores, side="right")
    chosen = np.concatenate([np.flatnonzero(bands == i)[::2] for i in range(bands.max() + 1)])
    rows = [
        f"{windows[i]['file']},{float(windows[i]['start']):.3f},{float(windows[i]['end']):.3f},{LABEL},"
        f"{'present' if has[i] else 'absent'},ann,,\n"
        for i in chosen
    ]
    (tmp_path / "ann.csv").write_text(HEADER + "".join(rows) + f"gone.wav,0,1,{LABEL},present,ann,,\n")
    code, lines = command("density", store, tmp_path / "ann.csv", "--output", tmp_path / "density.csv")
    assert code == 0
    assert any("1 of" in line and "the store doesn't have" in line for line in lines)
    with (tmp_path / "density.csv").open() as file:
        found = {row["site"]: row for row in csv.DictReader(file)}
    assert set(found) == {"(all)", "north", "south"}
    decisions = np.full(scores.size, -1)
    decisions[chosen] = has[chosen]
    expected = call_density(scores, decisions).all
    everywhere = found["(all)"]
    assert (int(everywhere["windows"]), int(everywhere["reviewed"])) == (scores.size, chosen.size)
    assert float(everywhere["density"]) == pytest.approx(expected.value, rel=1e-5)
    assert float(everywhere["low"]) <= has.mean() <= float(everywhere["high"])
    assert sum(int(found[site]["present"]) for site in ("north", "south")) == has[chosen].sum()
    assert (tmp_path / "density.csv").read_text().splitlines()[0].startswith("label,site,density,low,high,windows")

    sites = tmp_path / "sites.csv"
    sites.write_text("file,site\n" + "".join(f"{i}.wav,{'hill' if i % 2 else 'lake'}\n" for i in range(6)))
    code, lines = command("density", store, tmp_path / "ann.csv", "--sites", sites)
    assert code == 0
    assert [line.split()[1] for line in lines[1:4]] == ["(all)", "hill", "lake"]
    archive = Path(os.path.commonpath([row["file"] for row in windows]))
    names = sorted({os.path.relpath(row["file"], archive) for row in windows})  # from the folder of the table
    (archive / "sites.csv").write_text("\n".join(["file,site", *(f"{name},hill" for name in names)]) + "\n")
    code, lines = command("density", store, tmp_path / "ann.csv", "--sites", archive / "sites.csv")
    (archive / "sites.csv").unlink()
    assert code == 0


@pytest.mark.parametrize("form", ["csv", "raven"])
def test_a_table_with_decisions_is_not_replaced(store, command, capsys, form):
    code, lines = command("tables", store, "--format", form, "--threshold", "0")
    assert code == 0
    path = Path(lines[-1])
    first, *rows = path.read_text().splitlines()
    tab = "\t" if form == "raven" else ","
    decided = "\n".join([f"{first}{tab}Decision", *(f"{row}{tab}present" for row in rows)]) + "\n"
    for content in (decided.encode(), decided.encode("utf-16")):
        path.write_bytes(content)
        assert main(["tables", str(store), "--format", form]) == 2
        assert "has a column of decisions: not replaced" in capsys.readouterr().err
        assert path.read_bytes() == content
    path.rename(path.with_name(f"mine{path.suffix}"))
    assert command("tables", store, "--format", form)[0] == 0
    assert command("tables", store, "--format", form)[0] == 0


def test_other_labels_of_the_review_page_have_no_density(store, windows, tmp_path, capsys):
    rows = [f"{row['file']},{row['start']},{row['end']},{LABEL},present,ann,,\n" for row in windows]
    other = rows[0].replace(LABEL, "rain")
    (tmp_path / "x.csv").write_text(HEADER + "".join(rows) + other)
    assert main(["density", str(store), str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert "rain: it has no scores here" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == [LABEL] * 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (f"0.wav,0,1,{LABEL},present,,,\n", "too few reviewed windows; missing: 9"),
        ("0.wav,0,1,unknown,present,,,\n", "no probe of the store has the label 'unknown'"),
    ],
)
def test_what_can_not_be_estimated_is_said(store, tmp_path, capsys, rows, said):
    (tmp_path / "x.csv").write_text(HEADER + rows)
    main(["density", str(store), str(tmp_path / "x.csv")])
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_a_copy_is_the_recording_and_one_without_results_is_none(store, command, bundles, tmp_path, capsys):
    archive = tmp_path / "archive"
    shutil.copy(archive / "north" / "0.wav", archive / "south" / "copy.wav")
    assert command("run", bundles["plain"], archive, "--out", store)[0] == 0
    paths = [archive / "north" / "0.wav", archive / "south" / "copy.wav"]
    rows = [f"{paths[i % 2]},{i * 0.1:.3f},{(i + 1) * 0.1:.3f},{LABEL},present,,,\n" for i in range(20)]
    (tmp_path / "x.csv").write_text(HEADER + "".join(rows))
    capsys.readouterr()
    assert main(["density", str(store), str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert "doesn't have" not in shown
    assert shown.splitlines()[1].split()[-2] == "20"
    for path in store.glob("scores/*/*/*.parquet"):  # as after a run that was killed at its start
        path.unlink()
    assert main(["density", str(store), str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert f"{LABEL}: too few reviewed windows" in shown
    assert "20 of 20 decisions are about windows that the store doesn't have" in shown


def test_a_recording_without_a_site_is_refused(store, tmp_path, capsys):
    (tmp_path / "x.csv").write_text(HEADER + f"0.wav,0,1,{LABEL},present,,,\n")
    (tmp_path / "sites.csv").write_text("file,site\n0.wav,hill\n")
    assert main(["density", str(store), str(tmp_path / "x.csv"), "--sites", str(tmp_path / "sites.csv")]) == 2
    assert ".wav has no site" in capsys.readouterr().err
