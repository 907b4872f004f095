"""`report.html`: the figures of evaluation.json, on a page that needs nothing else."""

import io
import itertools

import numpy as np
import pytest
import soundfile
from PIL import Image

from avex_serve.training import files
from avex_serve.training.page import MOST_MISTAKES, make_page
from tests.archive.test_report import Page, check_policy, media
from tests.training.reports import RATE, make_windows, write

LABELS = ("robin", "<b>wren</b>", '{{ 7 * 7 }}" onload=x')


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report, its parsed page, and its windows."""
    tmp_path = tmp_path_factory.mktemp("made")
    windows = make_windows(tmp_path / "data", LABELS, name="<i>{:02} & more.wav")
    noise = {"silence": np.tile([5.0, -5.0, -5.0], (20, 1)), "hum": np.full((20, 3), -9.0)}
    evaluation, _ = write(tmp_path / "report", windows, LABELS, noise=noise, page=True, problems=["<script>x"])
    page = Page((tmp_path / "report" / "report.html").read_text("utf-8"))
    check_policy(page)
    return evaluation, page, windows


def shown(measure):
    return f"{measure.value:.3f} ({measure.low:.3f}–{measure.high:.3f})"


def test_the_page_has_the_figures_of_the_report(made):
    evaluation, page, _ = made
    assert page.texts("h1") == ["Evaluation of p on m"]
    text = page.text
    assert f"mean average precision{shown(evaluation.macro.average_precision)}" in text
    cells = page.texts("td")
    for figures in evaluation.labels.values():
        for name in ("average_precision", "auroc", "precision", "f1", "recall_at_threshold", "calibration_error"):
            assert shown(getattr(figures, name)) in cells
        assert f"{figures.threshold_score:.3f}" in cells
    total = sum(sum(row.values()) for row in evaluation.confusion.values())
    [confusion] = [table for table in page.texts("table") if table.startswith("true")]
    assert sum(int(word) for word in confusion.split() if word.isdigit()) >= total
    for mistake in evaluation.worst[:MOST_MISTAKES]:
        assert f"score {mistake.score:.3f}, {mistake.start:.1f} to {mistake.end:.1f} s" in text


def test_a_mean_says_how_many_labels_have_a_value(tmp_path):
    windows = make_windows(tmp_path / "data", LABELS)
    windows.targets[:, 1] = 0  # never there
    evaluation, _ = write(tmp_path / "report", windows, LABELS, page=True)
    text = Page((tmp_path / "report" / "report.html").read_text("utf-8")).text
    mean = f"{shown(evaluation.macro.average_precision)}, of 2 of 3 labels"
    assert f"mean average precision{mean}" in text
    assert text.count(mean) == 2, "at the top and below the labels"
    assert f"{shown(evaluation.macro.precision)}, of" not in text


def test_noise_that_is_detected_is_loud(made):
    _, page, _ = made
    headings = page.texts("h2")
    assert headings.index("The noise check failed") < headings.index("Figures by label")
    [alarm] = [text for attributes, text in page.all("div") if attributes.get("class") == "alarm"]
    assert "robin: 3600 detections an hour in silence" in alarm


def test_names_are_text_and_pictures_have_descriptions(made):
    evaluation, page, _ = made
    assert not {"b", "i", "script"} & {tag for tag, _, _ in page.elements}
    assert set(LABELS) <= set(page.texts("bdi"))
    assert "<i>00 & more.wav" in page.text or evaluation.worst[0].file in page.text
    assert "<script>x" in page.text
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    assert len({attributes["alt"] for attributes, _ in page.all("img")}) > len(LABELS)
    levels = [int(tag[1]) for tag, _, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") for attributes, _ in page.all("th"))
    assert page.all("html")[0][0]["lang"] == "en"


def test_mistakes_have_picture_and_sound(made):
    evaluation, page, _ = made
    sounds = media(page, "audio")
    assert len(sounds) == min(len(evaluation.worst), MOST_MISTAKES) > 5
    for kind, content in sounds:
        assert kind == "audio/mpeg"
        wave, rate = soundfile.read(io.BytesIO(content))
        assert 2 * RATE <= wave.size * RATE / rate <= 3.2 * RATE, "a second, and one before and after it"
    pictures = media(page, "img")
    assert len(pictures) == len(sounds) + len(LABELS)
    Image.open(io.BytesIO(pictures[0][1])).verify()


def test_a_recording_that_has_gone_is_said(made, tmp_path):
    evaluation, _, windows = made
    page = Page(make_page(evaluation, {recording.name: tmp_path / "gone.wav" for recording in windows.recordings}))
    assert not media(page, "audio")
    assert "The recording can't be read" in page.text


def test_without_the_extra_the_report_has_no_page_and_says_so(tmp_path, monkeypatch):
    def missing():
        raise files.DependencyError("matplotlib is not installed; pip install 'avex-serve[plot]'")

    monkeypatch.setattr(files, "check_installed", missing)
    said = []
    assert not files.can_make_page(said.append)
    assert said == ["the report has no report.html: matplotlib is not installed; pip install 'avex-serve[plot]'"]
    windows = make_windows(tmp_path / "data", LABELS)
    write(tmp_path / "report", windows, LABELS, page=False)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "evaluation.json",
        "evaluation.csv",
        "evaluation.parquet",
    }


def test_many_labels_are_confused_as_a_list(tmp_path):
    labels = tuple(f"label {i}" for i in range(25))
    windows = make_windows(tmp_path / "data", labels, recordings=30)
    windows.targets[:] = np.eye(25, dtype=np.int8)[np.arange(len(windows.targets)) % 25]
    evaluation, _ = write(tmp_path / "report", windows, labels, skill=0.3)
    page = Page(make_page(evaluation, {recording.name: tmp_path / "gone.wav" for recording in windows.recordings}))
    [table] = [text for text in page.texts("table") if text.startswith("truehighest scorewindows")]
    (true, named), count = max(
        (((a, b), n) for a, row in evaluation.confusion.items() for b, n in row.items() if a != b),
        key=lambda pair: pair[1],
    )
    assert f"{count}" in table
    assert true in table
    assert named in table
