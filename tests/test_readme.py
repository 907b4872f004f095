"""What the README and the pages that continue it say is true: Python runs, commands exist, links lead to files."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avex_export.cli import _parser as export_parser
from avex_export.cli import main as export
from avex_serve.cli import _parser as serve_parser
from avex_serve.service.settings import DEMO_BUNDLE, Settings
from tests.service.conftest import running_server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README + SERVING, re.DOTALL)
PAGES = README + SERVING + (ROOT / "docs" / "exporting.md").read_text()
CARD = re.findall(r"```python\n(.*?)```", (DEMO_BUNDLE / "README.md").read_text(), re.DOTALL)
SHELL = re.findall(r"`(avex-(?:export|serve) [^`\n]+)`|^(avex-(?:export|serve) .+)$", PAGES, re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a recording in stereo, as recorders make them."""
    wave = 0.1 * np.random.default_rng(0).standard_normal((40000, 2))
    soundfile.write(tmp_path / "recording.wav", wave, 16000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_saving_and_opening(workplace):
    training, opening = PYTHON[:2]
    exec(compile(training, "README", "exec"), {})
    assert export(["--probe", "my_probe", "--format", "onnx"]) == 0
    names = {}
    exec(compile(opening, "README", "exec"), names)
    assert names["spans"].shape == (2, 2)
    assert {d.label for d in names["prediction"].detections} <= {"bat", "bee", "bird"}


def test_clients(workplace):
    with running_server(workplace / "server", AVEX_BUNDLE=str(DEMO_BUNDLE)) as server:
        by_bentoml, by_triton, by_card = {}, {}, {}
        for code, names in zip((*PYTHON[2:], CARD[0]), (by_bentoml, by_triton, by_card), strict=True):
            for old, new in (
                ("http://localhost:3000", server.url),
                ("localhost:3001", server.grpc),
                ('"my_probe"', '"linear_last"'),
            ):
                code = code.replace(old, new)
            exec(compile(code, "README", "exec"), names)
        by_bentoml["client"]._temp_dir.cleanup()  # which closing forgets
        by_triton["client"].close()
        by_card["client"].close()
    assert by_triton["scores"].shape == (2, 10)
    np.testing.assert_array_equal(by_card["scores"], by_triton["scores"])


@pytest.mark.parametrize("command", sorted({a or b for a, b in SHELL} - {"avex-serve predict", "avex-serve verify"}))
def test_commands_are_understood(command):
    program, *arguments = shlex.split(command.split("    #")[0])
    {"avex-export": export_parser, "avex-serve": serve_parser}[program]().parse_args(arguments)


def test_settings_are_documented():
    text = README + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for field in Settings.model_fields:
        assert f"`AVEX_{field.upper()}" in text


def test_links_lead_to_files():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        lost = [each for each in links if not each.startswith("https://") and not (page.parent / each).is_file()]
        assert not lost, page.name


def test_every_page_is_found_from_the_readme():
    pages = [ROOT / "README.md"]
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)", page.read_text()) if page.suffix == ".md" else []
        pages += {(page.parent / each).resolve() for each in links if not each.startswith("https://")} - set(pages)
    for folder in ("docs/*.md", "examples/*.py"):
        assert set(ROOT.glob(folder)) <= set(pages)


def test_the_readme_is_short():
    assert README.count("\n") <= 150
