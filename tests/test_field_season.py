"""docs/field-season.md runs as it is written, on a season that is made up here."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from tests.bundles import LABELS, make_loudness_bundle

PAGE = (Path(__file__).parents[1] / "docs" / "field-season.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SWIFT = "east/SwiftOne_20240511_053000_+0930.wav"
FRONTIER = "east/20240512T040000+1000_Rec2_-27.4700+153.0200.flac"
SILENT = "north/2MA05258_20240511_040000.wav"
AFTER = "north/2MA05258_20240511_050000.wav"  # the silent one
BROKEN = "north/2MA05258_20240512_040000.wav"
LONG = "north/SMM04200_20240513_180000.wav"
HOURS = 6
LONG_RATE = 1000


@pytest.fixture(scope="module")
def season(tmp_path_factory):
    """Recordings of several recorders, with sounds at known places in three of them."""
    folder = tmp_path_factory.mktemp("season")
    (folder / "season" / "east").mkdir(parents=True)
    (folder / "season" / "north").mkdir()
    make_loudness_bundle(folder / "my_probe", rate=2000, samples=4000)
    events = {}
    for seed, (name, rate) in enumerate(((SWIFT, 32000), (FRONTIER, 44100), (AFTER, 48000))):
        random = np.random.default_rng(seed)
        wave = random.normal(0, 0.001, round(20.5 * rate))
        events[name] = [start + random.uniform(0, 2) for start in (1, 9, 16)]
        for start in events[name]:
            sound = slice(round(start * rate), round((start + 2) * rate))
            wave[sound] += 0.6 * np.sin(2 * np.pi * 500 * np.arange(2 * rate) / rate)
        soundfile.write(folder / "season" / name, wave, rate)
    soundfile.write(folder / "season" / SILENT, np.zeros(16000 * 10 + 7), 16000)
    (folder / "season" / BROKEN).write_bytes(b"RIFF\xff\xff\xff\x7fWAVEfmt ")
    hiss = np.random.default_rng(0).normal(0, 0.001, LONG_RATE * 60)
    with soundfile.SoundFile(folder / "season" / LONG, "w", LONG_RATE, 1, "PCM_16") as file:
        for _ in range(60 * HOURS):
            file.write(hiss)
    return folder, events


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_guide(season, monkeypatch, capsys):
    folder, events = season
    monkeypatch.chdir(folder)
    said = []
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "avex-serve"
        code = main(arguments)
        said.append(capsys.readouterr())
        assert code == (1 if arguments[0] in ("inventory", "run") else 0), (command, said[-1])
    inventory, first, status, _, _, _, _, again = said

    lines = {
        name: next(line for line in inventory.out.splitlines() if name in line) for name in (SWIFT, AFTER, LONG)
    }
    assert lines[SWIFT].startswith("2024-05-11T05:30:00     +09:30")
    assert lines[AFTER].startswith("2024-05-11T05:00:00     +10:00")
    assert f"{3600 * HOURS:.2f}" in lines[LONG]
    assert f"{BROKEN}" in inventory.out
    assert "5 computed, 0 known, 1 failed" in first.out
    assert "0 computed, 5 known, 1 failed" in again.out
    assert f"failed: {folder / 'season' / BROKEN}" in status.out
    assert f"warning: {folder / 'season' / SILENT}: the whole recording is digital silence" in status.out

    found = rows(folder / "detections.csv")
    for name, expected in events.items():
        mine = [row for row in found if row["file"].endswith(name)]
        assert {row["label"] for row in mine} == {LABELS[0]}
        for start in expected:
            assert any(float(row["start"]) < start + 2 and float(row["end"]) > start for row in mine), (name, start)
    assert {row["start_time"][-6:] for row in found if SWIFT in row["file"]} == {"+09:30"}
    assert {row["start_time"][-6:] for row in found if AFTER in row["file"]} == {"+10:00"}
    assert len(rows(folder / "birdnet.csv")) == len(found)

    # As a sequence in Raven: after the two recordings of the east and the silent one.
    before = sum(soundfile.info(folder / "season" / name).duration for name in (FRONTIER, SWIFT, SILENT))
    with (folder / "dawn.selections.txt").open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file, delimiter="\t") if row["Begin File"] == Path(AFTER).name]
    assert table
    for row in table:
        assert float(row["Begin Time (s)"]) - float(row["File Offset (s)"]) == pytest.approx(before, abs=0.001)
    assert SWIFT in (folder / "results" / "report.html").read_text()
