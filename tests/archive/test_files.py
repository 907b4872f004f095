"""From arguments to recordings. The files are empty: nothing here opens them."""

import io
import os
import sys

import pytest

from avex_serve.archive.files import find_recordings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Recordings as recorders and computers leave them; relative paths mean these."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *("b.wav", "a.WAV", "notes.txt", "._a.wav", "site 1/c: dawn.flac", "site 1/deep/d.mp3", "site 1/.e.ogg"),
        *(".trash/f.wav", "raw/g.dat", "odd[1].wav", "list/h.txt"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(*arguments):
    recordings, hidden, _ = find_recordings(arguments)
    faults = {path: str(error) for path, error in recordings.items() if error is not None}
    return [path for path in recordings if path not in faults], hidden, faults


def test_files_in_their_order_each_once():
    assert found("b.wav", "raw/g.dat", "a.WAV", "b.wav") == (["b.wav", "raw/g.dat", "a.WAV"], [], {})


def test_a_folder_at_any_depth_without_hidden_files():
    assert found("site 1") == (["site 1/c: dawn.flac", "site 1/deep/d.mp3"], ["site 1/.e.ogg"], {})


def test_a_trailing_slash_and_the_current_folder():
    assert found("site 1/")[0] == found("site 1")[0]
    recordings, hidden, _ = found(".")
    assert "./a.WAV" in recordings
    assert not any("trash" in path or path.endswith((".txt", ".dat")) for path in recordings)
    assert hidden == ["./._a.wav", "./site 1/.e.ogg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.wav", ["b.wav", "odd[1].wav"]),
        ("*.[wW]*", ["a.WAV", "b.wav", "odd[1].wav"]),
        ("**/*.mp3", ["site 1/deep/d.mp3"]),
        ("site*/**", ["site 1/c: dawn.flac", "site 1/deep/d.mp3"]),
        ("s*", ["site 1/c: dawn.flac", "site 1/deep/d.mp3"]),
        ("raw/*", []),
        ("raw/*.dat", ["raw/g.dat"]),
    ],
)
def test_patterns(pattern, expected):
    assert found(pattern)[0] == expected


def test_a_pattern_counts_hidden_files_unless_it_names_them():
    assert found("*.wav")[1] == ["._a.wav"]
    assert found("._*.wav") == (["._a.wav"], [], {})
    assert found("._a.wav") == (["._a.wav"], [], {})


def test_an_existing_file_is_no_pattern():
    assert found("odd[1].wav") == (["odd[1].wav"], [], {})


@pytest.mark.parametrize(
    "text", ["b.wav\nsite 1\n", "\ufeffb.wav\r\nsite 1\r\n\r\n", "b.wav\nsite 1/*.flac\n**/d.mp3"]
)
def test_a_list(folder, text):
    (folder / "list.txt").write_bytes(text.encode())
    assert found("@list.txt")[0] == ["b.wav", "site 1/c: dawn.flac", "site 1/deep/d.mp3"]


def test_a_list_on_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b.wav\na.WAV\n")))
    assert found("@-")[0] == ["b.wav", "a.WAV"]


def test_a_name_that_is_no_text(folder):
    name = os.fsdecode(b"gr\xfcn.wav")
    (folder / name).touch()
    (folder / "list.txt").write_bytes(b"gr\xfcn.wav\n")
    assert found("@list.txt")[0] == [name]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("nowhere.wav", "nowhere.wav: no such file"),
        ("*.aiff", "'*.aiff': no such file, and nothing matches it as a pattern"),
        ("list", "list: no recordings in this folder; expected files named .wav, "),
        ("@nowhere.txt", "the list nowhere.txt can't be read: No such file"),
    ],
)
def test_an_argument_without_recordings_is_named_and_stops_no_other(argument, expected):
    recordings, _, faults = found("b.wav", argument, "a.WAV")
    assert recordings == ["b.wav", "a.WAV"]
    assert list(faults) == [argument]
    assert faults[argument].startswith(expected)


def test_a_list_in_utf_16(folder):
    (folder / "list.txt").write_bytes("b.wav\r\n".encode("utf-16"))
    assert "save it as UTF-8" in found("@list.txt")[2]["@list.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cant_be_read(folder):
    (folder / "site 1/deep").chmod(0)
    recordings, _, faults = found("site 1")
    assert (recordings, list(faults)) == (["site 1/c: dawn.flac"], ["site 1/deep"])


def test_a_note_about_hidden_files():
    assert find_recordings(["b.wav"]).note() is None
    assert find_recordings(["*.wav"]).note() == "1 hidden file was left out, e.g. ._a.wav"
    assert find_recordings(["."]).note() == "2 hidden files were left out, e.g. ./._a.wav"
