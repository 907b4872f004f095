"""`avex-serve plot`: what is in the picture is known from the sounds and the detections."""

import io
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import numpy as np
import pytest
import soundfile
from PIL import Image

from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.cli import main
from avex_serve.seeing import clips, pictures

RATE = 16000


@pytest.fixture
def tone(tmp_path):
    """Three seconds of quiet noise, with a tone of 2 kHz in the middle one."""
    wave = 1e-4 * np.random.default_rng(0).standard_normal(3 * RATE)
    wave[RATE : 2 * RATE] += 0.5 * np.sin(2 * np.pi * 2000 * np.arange(RATE) / RATE)
    soundfile.write(tmp_path / "tone.wav", wave, RATE)
    return tmp_path / "tone.wav"


@pytest.fixture
def noise(tmp_path):
    """Two seconds of noise, in which the tiny bundle detects much."""
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-1, 1, 2 * RATE), RATE)
    return tmp_path / "noise.wav"


@pytest.fixture
def drawn(monkeypatch):
    """The marks of the pictures that are drawn."""
    marks = []
    draw = pictures.draw_recording
    monkeypatch.setattr(pictures, "draw_recording", lambda *given: marks.append(given[1]) or draw(*given))
    return marks


def plot(*arguments):
    return main(["plot", *map(str, arguments)])


def test_a_tone_is_where_it_sounds(tone):
    blocks = np.array_split(decode(tone).wave, 7)
    spectrogram = pictures.make_spectrogram(blocks, RATE, start=10.0)
    row, column = np.unravel_index(spectrogram.levels.argmax(), spectrogram.levels.shape)
    assert row * RATE / 2 / (len(spectrogram.levels) - 1) == pytest.approx(2000, abs=RATE / 256)
    loud = spectrogram.first + spectrogram.step * np.flatnonzero(spectrogram.levels[row] > -10)
    assert (loud[0], loud[-1]) == (pytest.approx(11, abs=0.02), pytest.approx(12, abs=0.02))
    assert spectrogram.levels.max() == pytest.approx(-6, abs=0.1)  # dB, half of full scale
    assert spectrogram.span == (10.0, 13.0)
    assert 10 < spectrogram.first + spectrogram.step * column < 13


def test_a_long_recording_takes_no_more_columns(tone):
    wave = decode(tone).wave
    spectrogram = pictures.make_spectrogram((wave for _ in range(100)), RATE)
    assert pictures.COLUMNS / 2 <= spectrogram.levels.shape[1] <= pictures.COLUMNS
    tones = spectrogram.levels[32] > -20  # a third of each three seconds
    assert tones.mean() == pytest.approx(1 / 3, abs=0.1)
    assert np.diff(tones.astype(int)).clip(0).sum() == pytest.approx(100, abs=1)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_with_a_bundle_it_predicts(audio_bundle, noise, tmp_path, drawn, capsys, kind):
    target = tmp_path / f"out.{kind}"
    assert plot(noise, "--bundle", audio_bundle, "--threshold", "0.6", "--output", target) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with open_bundle(audio_bundle) as engine:
        expected = engine.predict(*decode(noise), threshold=0.6).detections
    assert expected
    assert drawn == [[pictures.Mark(each.start, each.end, each.label, each.score) for each in expected]]
    if kind == "png":
        assert matplotlib.image.imread(target).shape[1] == 1100
        Image.open(target).verify()
    else:
        assert ElementTree.parse(target).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        before = target.read_bytes()
        plot(noise, "--bundle", audio_bundle, "--threshold", "0.6", "--output", target)
        assert target.read_bytes() == before


def test_from_a_store(audio_bundle, noise, tmp_path, drawn, monkeypatch):
    soundfile.write(tmp_path / "other.wav", np.zeros(RATE), RATE)
    main(["run", str(audio_bundle), str(noise), str(tmp_path / "other.wav"), "--out", str(tmp_path / "out")])
    monkeypatch.chdir(tmp_path)
    assert plot("noise.wav", "--bundle", audio_bundle) == 0
    assert plot("noise.wav", "--detections", "out") == 0
    assert drawn[0] == drawn[1] != []
    assert (tmp_path / "noise.png").is_file()
    assert plot("noise.wav", "--detections", "out", "--label", "robin", "--start", "1", "--end", "1.5") == 0
    assert {mark.label for mark in drawn[2]} == {"robin"}
    assert min(mark.start for mark in drawn[2]) >= 1
    assert max(mark.end for mark in drawn[2]) <= 1.5


def test_from_a_store_without_the_recording(audio_bundle, noise, tmp_path, capsys):
    soundfile.write(tmp_path / "other.wav", np.zeros(RATE), RATE)
    main(["run", str(audio_bundle), str(tmp_path / "other.wav"), "--out", str(tmp_path / "out")])
    assert plot(noise, "--detections", tmp_path / "out", "--output", tmp_path / "a.png") == 2
    assert "has no results of" in capsys.readouterr().err


def test_from_tables(tone, tmp_path, drawn):
    table = tmp_path / "labels.csv"
    table.write_text("file,start,end,label,score\ntone.wav,1,2,tone,0.9\ntone.wav,0,1,no,0.1\nx.wav,0,1,other,1\n")
    assert plot(tone, "--detections", table, "--threshold", "0.5", "--output", tmp_path / "a.png") == 0
    (tmp_path / "labels.txt").write_text("0.5\t1.5\t$\\frac{$ <b>\n")
    assert plot(tone, "--detections", tmp_path / "labels.txt", "--output", tmp_path / "a.png") == 0
    assert drawn == [[pictures.Mark(1, 2, "tone", 0.9)], [pictures.Mark(0.5, 1.5, "$\\frac{$ <b>", None)]]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_names_are_text(tone, tmp_path, kind):
    names = ["$\\frac{$", "a\nb\x00\x1b", "--><script>", "\udcff", "鳥 🐦", "x" * 300, "‮evil", ""]
    with clips.open_span(tone) as stream:
        spectrogram = pictures.make_spectrogram(stream.blocks, RATE)
    marks = [pictures.Mark(0, 1, name, 1.0) for name in names]
    for name in names:
        picture = pictures.draw_recording(spectrogram, marks, name, kind)
        if kind == "svg":
            assert "<script>" not in picture.decode().replace("<!-- --><script>", "<script>")
            ElementTree.fromstring(picture)
        else:
            Image.open(io.BytesIO(picture)).verify()


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.zeros(1), np.ones(5)], ids=["silent", "1", "5"])
def test_silence_and_a_few_samples(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    assert plot(tmp_path / "a.wav", "--output", tmp_path / "a.png") == 0
    Image.open(tmp_path / "a.png").verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "a.gif"), "neither .png nor .svg"),
        (("--start", "2", "--end", "1"), "from 2.0 to 1.0 s"),
        (("--start", "-1"), "from -1.0 to inf s"),
        (("--start", "nan"), "from nan"),
        (("--start", "5"), "ends before 5.0 s"),
        (("--detections", "nothing.csv"), "nothing.csv: no such file"),
    ],
)
def test_what_is_refused(tone, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert plot(tone, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra(tone, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for command in (["plot", str(tone), "--output", str(tmp_path / "a.png")], ["report", str(tmp_path)]):
        assert main(command) == 3
        assert "pip install 'avex-serve[plot]'" in capsys.readouterr().err
