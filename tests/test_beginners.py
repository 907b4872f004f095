"""docs/without-python.md and docs/for-operators.md run as written, with the demo backbone and made-up sounds."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_clip, make_recording
from tests.service.conftest import running_server

DOCS = Path(__file__).parents[1] / "docs"
BIOLOGIST = (DOCS / "without-python.md").read_text()
OPERATOR = (DOCS / "for-operators.md").read_text()
SERVE = "bentoml serve avex_serve.service:AvexService"


def commands(page):
    return [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


def test_without_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, sounds in {"buzz": ["buzz"], "trill": ["trill"], "noise": []}.items():
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number in range(20):
            soundfile.write(f"clips/{name}/{number}.wav", make_clip(random, sounds, snr_db=15), 16000)
    (tmp_path / "recordings").mkdir()
    recording, events = make_recording(0, seconds=40)
    soundfile.write("recordings/dawn.wav", recording, 16000)

    said = []
    for command in commands(BIOLOGIST):
        program, *arguments = shlex.split(command.replace("esp_aves2_effnetb0_all", "avex_demo"))
        assert program == "avex-serve"
        if arguments[0] == "fit":
            arguments += ["--cache", "cache"]
        assert main(arguments) == 0, (command, capsys.readouterr())
        said.append(capsys.readouterr().out)
    assert f"`{said[0].splitlines()[0]}`" in BIOLOGIST
    report = (tmp_path / "my_probe" / "report.html").read_text()
    assert "buzz" in report
    assert (tmp_path / "results" / "report.html").is_file()
    header, *rows = (tmp_path / "detections.csv").read_text(encoding="utf-8").splitlines()
    assert {"file", "start", "end", "label", "score", "probability"} <= set(header.split(","))
    played = {event.label for event in events} & {"buzz", "trill"}
    assert played <= {row.split(",")[3] for row in rows}
    assert "Begin Path" in (tmp_path / "recordings.selections.txt").read_text(encoding="utf-8")

    bundle = "export/bundles/my_probe"
    assert f"AVEX_BUNDLE={bundle} {SERVE} --host 127.0.0.1" in BIOLOGIST
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(tmp_path / bundle)) as server:
        assert "<html" in server.client.get("/", headers={"Accept": "text/html"}).text
        assert server.client.post("/predict", content=Path("recordings/dawn.wav").read_bytes()).json()["detections"]

    # The messages of the last table.
    Path("recordings/dawn.wav").write_text("no sound")
    (tmp_path / "few" / "trill").mkdir(parents=True)
    for number in range(4):
        shutil.copy(f"clips/trill/{number}.wav", "few/trill")
    shutil.copytree("clips/noise", "few/noise")
    messages = {
        "no such file or folder": "fit clipz --check",
        "holds no manifest.json; it is a saved probe": "run my_probe recordings --out other",
        "can't be decoded": f"predict {bundle} recordings/dawn.wav",
        "too few labels to calibrate": "fit few --output few_probe --cache cache",
    }
    for message, command in messages.items():
        assert f"`{message}`" in BIOLOGIST
        main(command.split())
        captured = capsys.readouterr()
        assert message in captured.out + captured.err


def test_for_operators(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    soundfile.write("recording.wav", make_recording(0)[0], 16000)
    serve, *others = commands(OPERATOR)
    assert serve == SERVE
    answers = {}
    with running_server(tmp_path / "server", AVEX_MAX_BODY_BYTES="1MB") as server:
        assert server.client.post("/predict", content=bytes(1_000_001)).status_code == 413
        assert "this is the demo bundle" in server.log
        for command in others:
            program, *arguments = shlex.split(
                command.replace("http://localhost:3000", server.url).replace(
                    "export/bundles/my_probe", shlex.quote(str(DEMO_BUNDLE))
                )
            )
            if program == "avex-serve":
                assert main(arguments) == 0, command
                answers[command] = capsys.readouterr().out
            else:
                done = subprocess.run(
                    ["curl", "-sS", "--fail-with-body", *arguments],
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                )
                answers[command] = done.stdout
    metrics = next(text for command, text in answers.items() if command.endswith("/metrics"))
    named = set(re.findall(r"`(avex_\w+)`", OPERATOR))
    assert named
    assert not {name for name in named if f"# TYPE {name.removesuffix('_total')}" not in metrics}
    assert '"detections":[{' in next(text for command, text in answers.items() if "/predict" in command)


def test_a_misspelt_setting(monkeypatch, capsys):
    monkeypatch.setenv("AVEX_BUNDEL", "x")
    assert main(["settings"]) != 0
    assert "AVEX_BUNDEL is no setting; did you mean AVEX_BUNDLE" in capsys.readouterr().err


@pytest.mark.parametrize("page", [BIOLOGIST, OPERATOR], ids=["without-python", "for-operators"])
def test_the_pages_are_short(page):
    assert page.count("\n") <= 110
