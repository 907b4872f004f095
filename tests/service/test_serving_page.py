"""What docs/serving-models.md says is true: its commands and its program run against the bundles that it shows."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import httpx
import pytest

from avex_export.cli import _parser as export_parser
from tests.bundles import (
    FINGERPRINT,
    change_manifest,
    make_audio_bundle,
    make_backbone_bundle,
    make_embedding_bundle,
)
from tests.service.conftest import running_server

PAGE = (Path(__file__).parents[2] / "docs" / "serving-models.md").read_text()
COMMANDS = re.findall(r"^(?:curl|avex-export|AVEX_BUNDLE=).*$", PAGE, re.MULTILINE)
SERVE, OF_A_STORE, OF_THE_HUB = [line for line in COMMANDS if line.startswith("AVEX_BUNDLE=")]
CURL = [line for line in COMMANDS if line.startswith("curl")]
EXPORT = [line for line in COMMANDS if line.startswith("avex-export")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, wav):
    """The folder of the page: its bundles and a recording."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "recording.wav").write_bytes(wav)
    bundles = folder / "bundles"
    make_backbone_bundle(bundles / "birds", name="birds")
    for version in ("1", "2"):
        change_manifest(make_audio_bundle(bundles / "frogs" / version, name="frogs"), version=version)
    make_embedding_bundle(bundles / "owls", name="owls", reads=FINGERPRINT)
    return folder


@pytest.fixture(scope="module")
def server(workplace):
    """A server as the page starts it, which allows loading."""
    setting, *command = shlex.split(SERVE)
    assert command == ["bentoml", "serve", "avex_serve.service:AvexService"]
    variables = {"AVEX_BUNDLE": setting.partition("=")[2], "AVEX_MODEL_CONTROL": "explicit"}
    with running_server(workplace / "server", cwd=workplace, **variables) as server:
        yield server


def test_there_are_commands():
    assert OF_A_STORE.startswith("AVEX_BUNDLE=s3://")  # test_remote.py serves one
    assert OF_THE_HUB.startswith("AVEX_BUNDLE=hf://")  # test_hub.py serves one
    assert len(CURL) >= 8
    assert EXPORT


@pytest.mark.parametrize("command", CURL)
def test_requests(workplace, server, command):
    line = command.replace("http://localhost:3000", server.url)
    done = subprocess.run(["curl", "-sS", *shlex.split(line)[1:]], cwd=workplace, capture_output=True, check=True)
    answer = json.loads(done.stdout)
    assert "error" not in answer
    if "predict_all" in command:
        assert [each["bundle"] for each in answer["predictions"]] == ["owls"]
    if "version=1" in command:
        assert answer["version"] == "1"
    if "index" in command:
        assert {"name": "birds", "version": "1", "state": "READY", "reason": ""} in answer


@pytest.mark.parametrize("command", [*EXPORT, *re.findall(r"`(avex-export [^`]+)`", PAGE)])
def test_exports_are_understood(command):
    export_parser().parse_args(shlex.split(command)[1:])


def test_program(workplace, server, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(workplace)
    names = {}
    exec(compile(program.replace("localhost:3000", server.http), "page", "exec"), names)
    names["client"].close()
    assert names["rows"].shape == (4, 2)
    assert re.search(r"\['0\.\d+:\d:\w+', '0\.\d+:\d:\w+'\]", capsys.readouterr().out)


def test_statuses(server):
    paths = {"/v2/models/nothing": 404, "/v2/models/stats": 400}
    assert {path: httpx.get(server.url + path).status_code for path in paths} == paths


def test_its_links_lead_somewhere():
    contents = dict(re.findall(r"^- \[(.+?)\]\(#(.+?)\)", PAGE, re.MULTILINE))
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert list(contents) == headings
    for heading, anchor in contents.items():
        assert anchor == re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
