"""The site: pages of docs/, and a reference made from the code."""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from avex_serve.annotations.formats import FORMATS
from avex_serve.cli import COMMANDS
from avex_serve.service.settings import Settings

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_without_a_warning(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for command in (
        [sys.executable, ROOT / "scripts" / "make_docs.py", "--output", tmp_path / "build" / "docs"],
        [Path(sys.executable).with_name("zensical"), "build", "--strict"],
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "warning" not in (result.stdout + result.stderr).lower()
    pages = tmp_path / "build" / "docs" / "reference"
    named = {page.stem: page.read_text() for page in pages.glob("*.md")}
    assert all(f"`AVEX_{field.upper()}`" in named["settings"] for field in Settings.model_fields)
    for module in COMMANDS:
        assert f"### avex-serve {module.__name__.rpartition('.')[2]}\n" in named["command-line"]
    assert "## avex-export\n" in named["command-line"]
    assert all(format_ in named["formats"] for format_ in FORMATS)
    assert "`POST /predict`" in named["routes"]
    assert "`target_layers`" in named["configuration"]
    assert "### open_bundle" in named["python"]
    assert (tmp_path / "build" / "site" / "reference" / "python" / "index.html").is_file()
    pages = {
        str(page.relative_to(tmp_path / "build" / "docs")) for page in (tmp_path / "build" / "docs").rglob("*.md")
    }
    assert sorted(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(
        pages - {"CONTRIBUTING.md", "CHANGELOG.md"}
    )


def listed(nav):
    """The pages of a navigation, which has sections in sections."""
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in listed(each)]
