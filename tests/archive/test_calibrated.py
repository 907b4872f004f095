"""Runs and tables of a calibrated bundle, and calibration from reviewed detections."""

import csv
import json
import re
import shutil

import numpy as np
import pandas
import pytest
import soundfile

import avex_serve
from avex_serve.annotations.reviews import Review
from avex_serve.archive.calibrate import CalibrationRequest, _Recordings
from avex_serve.audio.reader import decode
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.inference.backend import open_bundle
from tests.archive.test_report import Page
from tests.bundles import LABELS, SAMPLE_RATE, calibrated_copy, make_audio_bundle

WINDOW = 0.1  # seconds


@pytest.fixture(scope="module")
def calibrated(bundles, tmp_path_factory):
    return calibrated_copy(bundles["plain"], tmp_path_factory.mktemp("bundles") / "calibrated")


def table(out, name="detections.csv"):
    with (out / "tables" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def expected(bundle, path, **options):
    with open_bundle(bundle, "cpu") as engine:
        return [
            (each.label, each.score, each.probability)
            for each in engine.predict(*decode(path), **options).detections
        ]


@pytest.mark.parametrize("options", [(), ("--threshold", "0.6"), ("--top-k", "2")])
def test_tables_have_the_probabilities_of_the_engine(archive, calibrated, command, tmp_path, options):
    command("run", calibrated, archive, "--out", tmp_path / "out", *options, "--format", "csv", "--format", "raven")
    rows = table(tmp_path / "out")
    same = {"--threshold": {"threshold": 0.6}, "--top-k": {"top_k": 2}}.get(options[0] if options else "", {})
    for path in (archive / "dawn.wav", archive / "silent.wav"):
        found = [row for row in rows if row["file"] == str(path)]
        wanted = expected(calibrated, path, **same)
        assert [row["label"] for row in found] == [label for label, _, _ in wanted]
        for row, (label, score, probability) in zip(found, wanted, strict=True):
            assert float(row["score"]) == pytest.approx(score)
            assert (row["probability"] == "") == (label == LABELS[2])
            assert row["probability"] == "" or float(row["probability"]) == pytest.approx(probability, abs=1e-6)
    raven = pandas.read_csv(tmp_path / "out" / "tables" / "raven.selections.txt", sep="\t")
    assert len(raven) == len(rows)
    assert raven["Probability"].isna().sum() == sum(row["probability"] == "" for row in rows)


def test_a_calibration_computes_nothing_again(archive, bundles, calibrated, command, tmp_path):
    out = tmp_path / "out"
    command("run", bundles["plain"], archive, "--out", out)
    plain = table(out)
    assert "probability" not in plain[0]
    code, lines = command("run", calibrated, archive, "--out", out)
    assert (code, lines[-1]) == (1, "0 computed, 5 known, 1 failed")
    rows = table(out)
    assert {row["version"] for row in rows} == {"2"}
    assert len(rows) != len(plain), "the thresholds are others"
    # The same from the store alone, and as before with the other version.
    content = (out / "tables" / "detections.csv").read_bytes()
    command("tables", out)
    assert (out / "tables" / "detections.csv").read_bytes() == content
    command("run", bundles["plain"], archive, "--out", out)
    assert table(out) == plain


def test_the_same_scores_twice_are_refused(archive, bundles, calibrated, tmp_path, capsys):
    assert main(["run", str(bundles["plain"]), str(calibrated), str(archive), "--out", str(tmp_path / "out")]) == 2
    assert "differ in their calibration only" in capsys.readouterr().err


def test_joined_windows(archive, calibrated, command, tmp_path):
    command("run", calibrated, archive, "--out", tmp_path / "out", "--threshold", "0")
    apart = [r for r in table(tmp_path / "out") if r["file"].endswith("dawn.wav") and r["label"] == LABELS[0]]
    scores = [float(row["score"]) for row in apart]
    with open_bundle(calibrated, "cpu") as engine:
        known = engine.calibrator().of_labels(2 * [LABELS[0]], [max(scores), np.mean(scores)])
    for how, joined in zip(("max", "mean"), known, strict=True):
        command("tables", tmp_path / "out", "--threshold", "0", "--merge", "0", "--merge-score", how)
        (row,) = [r for r in table(tmp_path / "out") if r["file"].endswith("dawn.wav") and r["label"] == LABELS[0]]
        assert float(row["probability"]) == pytest.approx(joined)


def test_reports_show_probabilities(archive, bundles, calibrated, command, tmp_path):
    out = tmp_path / "out"
    options = ("--threshold", "0", "--examples", "1")
    command("run", calibrated, archive, "--out", out, "--threshold", "0")
    command("report", out, *options)
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    best = {}
    for row in table(out):
        best[row["label"]] = max(best.get(row["label"], row), row, key=lambda row: float(row["score"]))
    assert "its probability" in page.texts("th")
    for label in LABELS:
        score, known = float(best[label]["score"]), best[label]["probability"]
        probability = f"{float(known):.3f}" if known else ""
        numbers = rf"<td .*?>{score:.3f}</td>\s*<td .*?>{probability}</td>"
        assert re.search(rf"<bdi>{label}</bdi></th>(?:<td .*?>\d+</td>\s*){{2}}{numbers}", text)
        begun = (
            f"{score:.3f}, probability {probability}, "
            if known
            else f"{score:.3f}, {float(best[label]['start']):.1f} to"
        )
        assert any(caption.startswith(begun) for caption in page.texts("figcaption"))
    command("run", bundles["plain"], archive, "--out", out)
    command("report", out, *options)
    assert "robability" not in Page((out / "report.html").read_text("utf-8")).text


def test_frames(archive, calibrated):
    frame = avex_serve.predict([archive / "dawn.wav"], calibrated, form="detections", threshold={LABELS[1]: 0.2})
    rows = expected(calibrated, archive / "dawn.wav", threshold={LABELS[1]: 0.2})
    assert list(frame.columns) == ["file", "start_time", "end_time", "label", "score", "probability"]
    assert list(frame["label"]) == [label for label, _, _ in rows]
    assert frame["probability"].to_numpy(float) == pytest.approx(
        np.array([p for _, _, p in rows], float), nan_ok=True
    )


# -- avex-serve calibrate -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def season(tmp_path_factory, bundles):
    """Recordings, the scores of a bundle for their windows, and reviews whose truth is a logistic of the logit."""
    folder = tmp_path_factory.mktemp("season")
    rng = np.random.default_rng(0)
    rows = []
    with open_bundle(bundles["plain"], "cpu") as engine:
        for i in range(40):
            wave = rng.uniform(-1, 1, 10 * 1600).astype(np.float32)
            soundfile.write(folder / f"{i:02}.wav", wave, SAMPLE_RATE, subtype="FLOAT")
            found = engine.infer_recording(wave, SAMPLE_RATE)["logits"]
            for j in range(10):
                for k in (0, 1):
                    truth = rng.random() < 1 / (1 + np.exp(-(1.5 * found[j, k] - 0.5)))
                    rows.append((f"{i:02}.wav", j * WINDOW, (j + 1) * WINDOW, LABELS[k], truth, found[j, k]))
    return folder, rows


def write(path, rows, header="file,start,end,label,decision", form=lambda row: "present" if row[4] else "absent"):
    lines = [",".join([row[0], f"{row[1]:.3f}", f"{row[2]:.3f}", row[3], form(row)]) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def calibrate(bundle, *arguments):
    return main(["calibrate", str(bundle), *map(str, arguments)])


def scales(bundle):
    (probe,) = read_bundle(bundle).manifest.probes
    return {each.label: each for each in probe.calibration.labels}


def test_reviewed_detections_make_a_new_version(season, bundles, tmp_path, capsys):
    folder, rows = season
    review = write(tmp_path / "reviews.csv", rows)
    with review.open("a") as file:  # the review page takes other labels too
        file.write(f"00.wav,0,0.1,{LABELS[2]},unsure\n00.wav,0,0.1,rain,present\n01.wav,0,0.1,rain,present\n")
    new = tmp_path / "new"
    assert calibrate(bundles["plain"], review, "--recordings", folder, "--output", new) == 0
    said = capsys.readouterr()
    assert LABELS[0] in said.out
    assert "left out: 2 reviews of 'rain', which the probe doesn't have" in said.err
    before, after = read_bundle(bundles["plain"]), read_bundle(new)
    assert (before.manifest.version, after.manifest.version) == ("1", "2")
    assert after.manifest.calibrates == before.digest
    for name, digest in before.manifest.files.items():
        assert after.manifest.files[name] == digest, "no graph changes"
    from sklearn.linear_model import LogisticRegression

    for label in LABELS[:2]:
        own = [row for row in rows if row[3] == label]
        x, y = np.array([[row[5]] for row in own]), np.array([row[4] for row in own])
        oracle = LogisticRegression(C=np.inf).fit(x, y)
        found = scales(new)[label]
        # Of 400 reviews, the prior moves little.
        assert found.scale.slope == pytest.approx(oracle.coef_[0, 0], rel=0.1)
        assert found.scale.offset == pytest.approx(oracle.intercept_[0], abs=0.1)
        assert (found.with_sound, found.without_sound) == (y.sum(), (~y).sum())
        assert found.scale.slope_interval[0] < 1.5 < found.scale.slope_interval[1]
    assert scales(new)[LABELS[2]].scale is None


def test_other_tables_give_the_same_fit(season, bundles, command, tmp_path):
    folder, rows = season
    plain = bundles["plain"]
    tables = {
        "decision": write(tmp_path / "a.csv", rows),
        "correct": write(
            tmp_path / "b.csv", rows, "file,start,end,label,correct", lambda row: "yes" if row[4] else "no"
        ),
        "absolute": write(tmp_path / "c.csv", [(f"{folder}/{row[0]}", *row[1:]) for row in rows]),
    }
    raven = [
        f"{i}\t1\t{row[1]}\t{row[2]}\t{folder}/{row[0]}\t{row[1]}\t{row[3]}\t{'yes' if row[4] else 'no'}"
        for i, row in enumerate(rows)
    ]
    header = "Selection\tChannel\tBegin Time (s)\tEnd Time (s)\tBegin Path\tFile Offset (s)\tLabel\tCorrect"
    tables["raven"] = tmp_path / "d.txt"
    tables["raven"].write_text("\n".join([header, *raven]) + "\n")
    scored = write(
        tmp_path / "e.csv",
        rows,
        "file,start,end,label,decision,score",
        lambda row: f"{'present' if row[4] else 'absent'},{1 / (1 + np.exp(-np.float64(row[5]))):.9f}",
    )
    command("run", plain, folder, "--out", tmp_path / "out")
    ways = {name: (table, "--recordings", folder) for name, table in tables.items()}
    ways |= {"store": (tables["decision"], "--run", tmp_path / "out"), "scores": (scored, "--table-scores")}
    found = {}
    for name, way in ways.items():
        assert calibrate(plain, *way, "--output", tmp_path / name) == 0
        found[name] = [scales(tmp_path / name)[label].scale for label in LABELS[:2]]
    for each in found.values():
        for scale, first in zip(each, found["decision"], strict=True):
            assert (scale.slope, scale.offset) == pytest.approx((first.slope, first.offset), rel=1e-4)
            assert scale.slope_interval == pytest.approx(first.slope_interval, rel=0.05)


def test_too_few_reviews_are_refused_with_what_is_missing(season, bundles, tmp_path, capsys):
    folder, rows = season
    few = [row for row in rows if row[3] == LABELS[0]][:15]
    present = sum(row[4] for row in few)
    review = write(tmp_path / "reviews.csv", few)
    assert calibrate(bundles["plain"], review, "--recordings", folder, "--output", tmp_path / "new") == 2
    said = capsys.readouterr().err
    for count, what in ((present, "with the sound"), (15 - present, "without it")):
        if count < 10:
            assert f"{10 - count} windows {what}" in said
    assert "1 recordings with it" in said
    assert "no label can be calibrated" in said
    assert not (tmp_path / "new").exists()


def test_labels_without_reviews_keep_their_calibration(season, calibrated, tmp_path):
    folder, rows = season
    review = write(tmp_path / "reviews.csv", [row for row in rows if row[3] == LABELS[0]])
    assert calibrate(calibrated, review, "--recordings", folder, "--output", tmp_path / "new") == 0
    before, after = scales(calibrated), scales(tmp_path / "new")
    assert after[LABELS[1]].scale == before[LABELS[1]].scale
    assert (after[LABELS[1]].source, after[LABELS[1]].target_precision) == ("a test", 0.9)
    assert after[LABELS[0]].scale != before[LABELS[0]].scale
    assert after[LABELS[0]].source is None
    manifest = read_bundle(tmp_path / "new").manifest
    assert manifest.version == "3"
    assert manifest.calibrates == read_bundle(calibrated).manifest.calibrates, "still the scores of the first"
    assert "400 reviewed detections of 40 recordings" in json.dumps(manifest.probes[0].calibration.source)


def test_scores_that_a_spreadsheet_has_shortened(season, bundles, tmp_path):
    """1.0000 becomes 1, which says no less than 0.9999."""
    _, rows = season
    scores = [np.clip(1 / (1 + np.exp(-8 * np.float64(row[5]))), 0, 1) for row in rows]
    found = {}
    for name, form in {"whole": "{:.4f}", "short": "{:.4g}"}.items():
        texts = iter([form.format(round(score, 4)) for score in scores])
        table = write(
            tmp_path / f"{name}.csv",
            rows,
            "file,start,end,label,decision,score",
            lambda row, texts=texts: f"{'present' if row[4] else 'absent'},{next(texts)}",
        )
        assert calibrate(bundles["plain"], table, "--table-scores", "--output", tmp_path / name) == 0
        found[name] = scales(tmp_path / name)
    assert ",1\n" in (tmp_path / "short.csv").read_text()
    assert ",1.0000\n" in (tmp_path / "whole.csv").read_text()
    assert found["short"] == found["whole"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,start,end,label\n00.wav,0,0.1,robin\n", (), "has no column decision"),
        (
            "file,start,end,label,decision\n00.wav,0,0.1,robin,maybe\n",
            (),
            "decision 'maybe' at 0 s; expected present",
        ),
        ("file,start,end,label,decision\n00.wav,0,0.1,owl,present\n", (), "'owl', which the probe doesn't have"),
        ("file,start,end,label,decision\nnone.wav,0,0.1,robin,present\n", (), "none.wav is not there (1 reviews)"),
        ("file,start,end,label,decision\n00.wav,5,6,robin,present\n", (), "1 reviews of 00.wav are after its end"),
        ("file,start,end,label,decision\n00.wav,0,1,robin,present\n", ("--table-scores",), "has the score ''"),
        ("file,start,end,label,decision\n00.wav,0,1,robin,present\n", ("--target-precision", "2"), "precision is 2"),
        ("file,start,end,label,decision\n00.wav,0,1,robin,present\n", ("--bundle-version", "1"), "is that of"),
    ],
)
def test_what_can_not_be_used_is_refused(season, bundles, tmp_path, capsys, text, options, message):
    folder, _ = season
    (tmp_path / "reviews.csv").write_text(text)
    recordings = () if options == ("--table-scores",) else ("--recordings", folder)
    assert calibrate(bundles["plain"], tmp_path / "reviews.csv", *recordings, *options) == 2
    assert message in capsys.readouterr().err


def test_the_bundle_itself_is_not_replaced(season, tmp_path, capsys):
    bundle = make_audio_bundle(tmp_path / "bundle")
    folder, rows = season
    review = write(tmp_path / "reviews.csv", rows)
    assert calibrate(bundle, review, "--recordings", folder, "--output", bundle) == 2
    assert "is the bundle itself" in capsys.readouterr().err
    assert calibrate(bundle, review, "--recordings", folder) == 0
    assert read_bundle(tmp_path / "bundle-2").manifest.version == "2"


def test_stretches_longer_than_windows_have_their_highest_score(season, bundles):
    """A row of joined windows has the score of the best of them, as tables show it."""
    folder, _ = season
    with open_bundle(bundles["plain"], "cpu") as engine:
        source = _Recordings(CalibrationRequest(bundles["plain"], (), recordings=folder), engine, "linear")
        scores = engine.score(*decode(folder / "00.wav")).scores[:, LABELS.index(LABELS[0])]
        for start, end, expected in (
            (0.2, 0.5, scores[2:5].max()),
            (0.31, 0.38, scores[3]),
            (0.55, 0.55, scores[5]),
        ):
            review = Review("00.wav", start, end, LABELS[0], "present")
            assert source.scores(folder / "00.wav", [review]) == [expected]


def test_recordings_of_one_name_in_two_folders_are_two(season, bundles, tmp_path, capsys):
    folder, rows = season
    seasons = [tmp_path / "2024", tmp_path / "2025"]
    for i, place in enumerate(seasons):
        place.mkdir()
        own = [row for row in rows if int(row[0][:2]) % 2 == i]
        names = {name: f"{n:02}.wav" for n, name in enumerate(dict.fromkeys(row[0] for row in own))}
        for name, here in names.items():
            shutil.copy(folder / name, place / here)
        write(place / "reviews.csv", [(names[row[0]], *row[1:]) for row in own])
    tables = [place / "reviews.csv" for place in seasons]
    assert calibrate(bundles["plain"], *tables, "--output", tmp_path / "new") == 0
    counts = scales(tmp_path / "new")[LABELS[0]]
    assert counts.with_sound + counts.without_sound == 400
    # Another table of the same windows replaces the first, also by other paths.
    windows = [(f"2024/{n:02}.wav", *row[1:4]) for n in range(20) for row in rows[:20]]
    again = write(tmp_path / "again.csv", windows, form=lambda _: "unsure")
    assert calibrate(bundles["plain"], *tables, again, "--output", tmp_path / "newer") == 0
    counts = scales(tmp_path / "newer")[LABELS[0]]
    assert counts.with_sound + counts.without_sound == 200
