"""`avex_serve.predict`, and the page that shows it."""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest

import avex_serve
from avex_serve import open_bundle
from avex_serve.audio.reader import decode
from avex_serve.errors import InputError, NotFoundError
from tests.bundles import LABELS, make_audio_bundle

PAGE = Path(__file__).parents[2] / "docs" / "archives.md"


def test_windows_have_opensoundscapes_shape(archive, bundles):
    files = [archive / "dusk.flac", archive / "silent.wav"]
    frame = avex_serve.predict(files, bundles["plain"], overlap=0.02)
    assert frame.index.names == ["file", "start_time", "end_time"]
    assert list(frame.columns) == list(LABELS)
    assert frame.attrs == {"failed": {}}
    with open_bundle(bundles["plain"]) as engine:
        for file in files:
            spans, scores = engine.score(*decode(file), overlap=0.02)
            part = frame.loc[str(file)]
            np.testing.assert_array_equal(part.to_numpy(), scores)
            np.testing.assert_array_equal(np.array(part.index.to_list()), spans)
        pandas.testing.assert_frame_equal(avex_serve.predict(files, engine, overlap=0.02), frame)


def test_detections(archive, bundles):
    with open_bundle(bundles["probes"]) as engine:
        frame = avex_serve.predict([archive / "dawn.wav"], engine, form="detections", probe="noise", top_k=1)
        expected = engine.predict(*decode(archive / "dawn.wav"), probe="noise", top_k=1).detections
    assert list(frame.columns) == ["file", "start_time", "end_time", "label", "score"]
    assert [tuple(row) for row in frame.itertuples(index=False)] == [
        (str(archive / "dawn.wav"), one.start, one.end, one.label, one.score) for one in expected
    ]


def test_files_that_cant_be_read_are_named(archive, bundles):
    with pytest.warns(UserWarning, match="left out: ") as caught:
        frame = avex_serve.predict([archive / "broken.wav", archive / "no.wav"], bundles["plain"])
    assert len(caught) == 2
    assert frame.empty
    assert list(frame.columns) == list(LABELS)
    assert set(frame.attrs["failed"]) == {str(archive / "broken.wav"), str(archive / "no.wav")}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"form": "wide"}, InputError),
        ({"overlap": 9.0}, InputError),
        ({"top_k": 0}, InputError),
        ({"probe": "owls"}, NotFoundError),
    ],
    ids=str,
)
def test_bad_options(archive, bundles, options, error):
    with pytest.raises(error):
        avex_serve.predict([archive / "dawn.wav"], bundles["plain"], **options)


def test_the_page(archive, tmp_path, monkeypatch):
    make_audio_bundle(tmp_path / "export" / "bundles" / "my_probe")
    (tmp_path / "recording.wav").write_bytes((archive / "dawn.wav").read_bytes())
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(compile(code.replace("overlap=1.0", "overlap=0.05"), "archives.md", "exec"), names)
    assert len(names["frame"]) > len(names["detections"]) > 0
