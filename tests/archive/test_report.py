"""`avex-serve report`: the page is parsed; its counts are those of the table, its clips those of the recordings."""

import base64
import csv
import hashlib
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from PIL import Image

from avex_serve.audio.reader import decode
from avex_serve.seeing import clips
from tests.bundles import make_audio_bundle

VOID = {"meta", "img", "br"}
RATE = 16000


class Page(HTMLParser):
    """The elements of a page with their attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    def texts(self, tag):
        return [" ".join(text.split()) for _, text in self.all(tag)]

    @property
    def text(self):
        return self.texts("main")[0]

    @property
    def counts(self):
        """Detections and recordings by label."""
        rows = re.findall(
            r'<th scope="row"><bdi>(.*?)</bdi></th><td .*?>(\d+)</td>\s*<td .*?>(\d+)</td>', self.rawdata
        )
        return {label: (int(detections), int(recordings)) for label, detections, recordings in rows}


@pytest.fixture
def report(command, tmp_path):
    """Make a page; its parsed form."""

    def make(*arguments):
        code, lines = command("report", *arguments, "--output", tmp_path / "page.html")
        assert (code, lines) == (0, [str(tmp_path / "page.html")])
        text = (tmp_path / "page.html").read_text("utf-8")
        page = Page(text)
        page.rawdata = text
        check_policy(page)
        return page

    return make


def check_policy(page):
    """Nothing comes from elsewhere, and the policy allows no more than the page has."""
    [policy] = [attributes["content"] for attributes, _ in page.all("meta") if "http-equiv" in attributes]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    [(_, style)] = page.all("style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "media-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "svg"}
    assert all(attributes["href"].startswith("http://127.0.0.1:8766/?file=") for attributes, _ in page.all("a"))
    for _, attributes, _ in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
        assert attributes.get("src", "data:").startswith("data:")


def media(page, tag):
    """The files in the page, with the text for those who don't see them."""
    found = []
    for attributes, _ in page.all(tag):
        kind, content = re.fullmatch(r"data:(.*);base64,(.*)", attributes["src"]).groups()
        found.append((kind, base64.b64decode(content, validate=True)))
        assert tag == "audio" or attributes["alt"]
    return found


def tables(store):
    with (store / "tables" / "detections.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_of_an_archive(archive, bundles, command, report, tmp_path):
    choice = ("--threshold", "0.51")  # silence has scores of 0.5
    command("run", bundles["plain"], archive, "--out", tmp_path / "out", *choice)
    page = report(tmp_path / "out", *choice)
    rows = tables(tmp_path / "out")
    for label in {row["label"] for row in rows}:
        files = [row["file"] for row in rows if row["label"] == label]
        assert page.counts[label] == (len(files), len(set(files)))
    assert set(page.counts) == {row["label"] for row in rows}
    assert "failed: 1" in page.text
    assert f"{archive / 'broken.wav'} can't be decoded" in page.text
    assert "without detections: 1" in page.text
    assert str(archive / "silent.wav") in page.text
    assert "tiny" in page.texts("h3")[-1]
    assert "Hours and days are left out" in page.text
    pictures, sounds = media(page, "img"), media(page, "audio")
    assert len(pictures) == len(sounds) > len(page.counts)
    for kind, content in pictures:
        assert kind == "image/webp"
        Image.open(io.BytesIO(content)).verify()
    for kind, content in sounds:
        assert kind == "audio/mpeg"
        wave, _ = soundfile.read(io.BytesIO(content))
        assert np.abs(wave).max() > 0.3
    best = max(rows, key=lambda row: float(row["score"]))
    assert f"{float(best['score']):.3f}, {float(best['start']):.1f} to" in page.text
    again = (tmp_path / "page.html").read_bytes()
    report(tmp_path / "out", *choice)
    assert (tmp_path / "page.html").read_bytes() == again


def test_what_is_shown_is_chosen_as_in_tables(archive, bundles, command, report, tmp_path):
    choice = ("--threshold", "0.6", "--label", "robin", "--merge", "0")
    command("run", bundles["plain"], archive, "--out", tmp_path / "out", *choice)
    page = report(tmp_path / "out", *choice, "--examples", "1")
    assert {label: count for label, (count, _) in page.counts.items()} == {"robin": len(tables(tmp_path / "out"))}
    assert len(media(page, "img")) == 1
    assert not media(report(tmp_path / "out", "--examples", "0"), "img")


def test_hours_and_days(bundles, command, report, tmp_path):
    (tmp_path / "season").mkdir()
    noise = np.random.default_rng(0).uniform(-1, 1, 2 * RATE)
    for name in ("20240503_235959+1000", "20240504_055900", "whenever"):
        soundfile.write(tmp_path / "season" / f"{name}.wav", noise, RATE)
    command("run", bundles["plain"], tmp_path / "season", "--out", tmp_path / "out")
    page = report(tmp_path / "out", "--examples", "0")
    assert page.texts("h2")[:3] == ["Detections by label", "Detections by hour", "Detections by day"]
    assert "+10:00 (1), unknown (1). Without a known time, and left out: 1." in page.text
    assert "by hour, 00 to 23" in page.text
    assert "by day, 2024-05-03 to 2024-05-04" in page.text
    by_day = {}
    for row in tables(tmp_path / "out"):
        if row["start_time"]:
            by_day[row["start_time"][:10]] = by_day.get(row["start_time"][:10], 0) + 1
    assert f"most in 2024-05-04: {by_day['2024-05-04']}" in page.text
    assert len(media(page, "img")) == 2


def test_nothing_was_computed(archive, bundles, command, report, tmp_path):
    command("run", bundles["plain"], archive / "broken.wav", archive / "silent.wav", "--out", tmp_path / "out")
    (archive / "silent.wav").unlink()
    page = report(tmp_path / "out", "--threshold", "0.99")
    assert "There are no detections." in page.text
    assert not media(page, "img")


def test_a_store_without_scores(archive, bundles, command, report, tmp_path):
    command("run", bundles["backbone"], archive, "--out", tmp_path / "out", "--embeddings")
    assert "The store has no scores" in report(tmp_path / "out").text


def test_a_silent_file_with_detections(bundles, command, report, archive, tmp_path):
    command("run", bundles["plain"], archive / "silent.wav", "--out", tmp_path / "out", "--threshold", "0")
    sounds = media(report(tmp_path / "out", "--threshold", "0"), "audio")
    assert sounds
    assert all(np.abs(soundfile.read(io.BytesIO(content))[0]).max() < 0.01 for _, content in sounds)


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_recording_that_is_no_longer_there(bundles, command, report, archive, tmp_path, change):
    path = archive / "dawn.wav"
    command("run", bundles["plain"], path, "--out", tmp_path / "out")
    path.unlink() if change == "gone" else path.write_bytes(path.read_bytes() + b"\0")
    page = report(tmp_path / "out")
    assert page.counts
    assert not media(page, "audio")
    assert ("No such file" if change == "gone" else "The file has changed") in page.text


def test_hostile_names_are_text(command, report, tmp_path):
    labels = ("<script>alert(1)</script>", '{{ 7 * 7 }}" onload=x', "$\\frac{‮")
    bundle = make_audio_bundle(tmp_path / "bundle", labels=labels)
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    noise = np.random.default_rng(0).uniform(-1, 1, RATE)
    for name in ("\"'><script>&amp;\n.wav", "2024-05-04T05-00-00 a.wav", os.fsdecode(b"\xff.wav")):
        with (folder / name).open("wb") as file:
            soundfile.write(file, noise, RATE, format="WAV")
    (folder / "<b>no.wav").write_bytes(b"no audio")
    command("run", bundle, folder, "--out", tmp_path / "out", "--threshold", "0.01")
    page = report(tmp_path / "out", "--threshold", "0.01")
    shown = [label.replace("‮", "\\u202e") for label in labels]
    assert set(shown) == set(page.texts("h3")[:-1])
    text = page.text
    assert "\"'><script>&amp;\\n.wav" in text
    assert "<b>no.wav" in text
    assert "\\xff.wav: the name is not UTF-8" in text
    assert not page.all("b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--examples", "-1"), "--examples is -1"),
        (("--label", "robbin"), "no probe has the label 'robbin'"),
        (("--output", "."), "is a folder"),
    ],
)
def test_what_is_refused(archive, bundles, command, capsys, tmp_path, arguments, message):
    command("run", bundles["plain"], archive / "dawn.wav", "--out", tmp_path / "out")
    from avex_serve.cli import main

    assert main(["report", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


# -- clips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("channel", ["mix", 2])
def test_a_clip_is_a_part_of_the_recording(tmp_path, monkeypatch, kind, channel):
    random = np.random.default_rng(0)
    soundfile.write(tmp_path / kind, random.uniform(-0.5, 0.5, (5 * RATE, 2)), RATE)
    whole = decode(tmp_path / kind, channel).wave
    read = []
    monkeypatch.setattr(clips, "open_span", lambda *given: read.append(1) or open_span(*given))
    for frames in (whole.size, whole.size + 1, None):
        clip = clips.read_clip(tmp_path / kind, 1.25, 2.5, frames, channel)
        assert (clip.sample_rate, clip.start) == (RATE, 1.25)
        # libsndfile seeks in lossy files to within what a frame of them leaves open.
        tolerance = 1e-6 if kind in ("a.wav", "a.flac") or frames != whole.size else 1e-2
        np.testing.assert_allclose(clip.wave, whole[20000:40000], atol=tolerance)
    assert len(read) == 2
    assert clips.read_clip(tmp_path / kind, 4.5, 99, whole.size).wave.size == whole.size - 72000


open_span = clips.open_span


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 44100, 96000, 312500])
def test_the_sound_of_a_clip(rate):
    wave = 0.01 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    sound, encoded = soundfile.read(io.BytesIO(clips.as_mp3(clips.Clip(wave, rate, 0.0))))
    assert encoded == max(each for each in clips.RATES if each <= max(rate, 8000))
    assert np.abs(sound).max() == pytest.approx(clips.PEAK, rel=0.2)
    assert np.abs(np.fft.rfft(sound)).argmax() * encoded / sound.size == pytest.approx(1000, abs=5)
