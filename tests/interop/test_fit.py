"""From real recordings and their annotations to a served bundle, in one command."""

import csv
import json
import shutil

import pytest
import soundfile

from avex_serve.cli import main
from avex_serve.inference.backend import open_bundle
from tests.shared import shared

CHAFFINCH, PIPIT = "Common Chaffinch", "Tree Pipit"
DOVES = ("XC564654_Streptopelia_turtur.wav", "XC564654-200602-006_NR5N6_20h14_Sturtur.flac")
CICADA = "Diceroprocta_eugraphica_IN50366825_110124_cut.wav"
DAWN = "CHE_01_20190101_163410.wav"


@pytest.fixture(scope="module")
def audio():
    return shared("audio")


def annotations(audio):
    with (audio / "annotations.csv").open() as file:
        return list(csv.DictReader(file))


def as_tables(audio, folder):
    """The recordings, a Raven table next to the annotated one, and a CSV for those with one sound."""
    folder.mkdir()
    for name in (DAWN, *DOVES, CICADA):
        shutil.copy(audio / name, folder)
    rows = ["Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tSpecies"]
    for i, row in enumerate(annotations(audio), 1):
        for view in ("Waveform 1", "Spectrogram 1"):
            rows.append(f"{i}\t{view}\t1\t{row['start']}\t{row['end']}\t0\t12000\t{row['label:species']}")
    (folder / f"{DAWN.removesuffix('.wav')}.Table.1.selections.txt").write_text("\n".join(rows) + "\n")
    whole = [f"{name},Turtle Dove" for name in DOVES] + [f"{CICADA},Cicada"]
    (folder / "whole.csv").write_text("file,label\n" + "\n".join(whole) + "\n")
    return []


def as_folders(audio, folder):
    """A folder for each species; pieces of one recording, and recordings of one bird, stay together."""
    columns = []
    for i, row in enumerate(annotations(audio)):
        wave, rate = soundfile.read(audio / DAWN, dtype="float32")
        start, end = (int(float(row[name]) * rate) for name in ("start", "end"))
        columns.append((folder / row["label:species"] / f"{i}.wav", wave[start:end], rate, DAWN))
    for name in (*DOVES, CICADA):
        label = "Cicada" if name == CICADA else "Turtle Dove"
        columns.append((folder / label / f"{name}.wav", *soundfile.read(audio / name, dtype="float32"), name[:8]))
    lines = ["file,source"]
    for path, wave, rate, source in columns:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate)
        lines.append(f"{path.relative_to(folder)},{source}")
    (folder / "sources.csv").write_text("\n".join(lines) + "\n")
    return ["--group-by", "source"]


@pytest.mark.parametrize("prepare", [as_tables, as_folders])
def test_real_recordings_to_a_served_bundle(audio, tmp_path, capsys, prepare):
    options = prepare(audio, tmp_path / "data")
    bundle = tmp_path / "bundle"
    command = [
        "fit",
        tmp_path / "data",
        "--output",
        tmp_path / "probe",
        *options,
        "--cache",
        tmp_path,
        "--export",
        bundle,
    ]
    assert main(list(map(str, command))) == 0
    said = capsys.readouterr()
    report = json.loads((tmp_path / "probe" / "evaluation.json").read_text())
    assert set(report["labels"]) == {CHAFFINCH, PIPIT, "Eurasian Kestrel", "Turtle Dove", "Cicada"}
    assert report["evaluated"] == "cross-validation"
    # Few recordings are no ground for figures, and the report says so.
    assert "Cicada: one recording (or group) only" in said.out
    assert report["labels"]["Cicada"]["average_precision"]["value"] is None
    assert report["labels"][CHAFFINCH]["warning"]
    assert str(bundle) in said.out
    page = (tmp_path / "probe" / "report.html").read_text("utf-8")
    assert "Cicada" in page

    capsys.readouterr()
    assert main(["predict", str(bundle), str(audio / DAWN), "--top-k", "1", "--threshold", "0", "--json"]) == 0
    detections = json.loads(capsys.readouterr().out)["detections"]
    best = {found["start"]: found["label"] for found in detections}
    assert [best[start] for start in (22.0, 32.0, 42.0, 52.0)] == [CHAFFINCH] * 4
    with open_bundle(bundle, "cpu") as engine:
        assert set(engine.labels()) == set(report["labels"])
