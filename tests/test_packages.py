"""The wheel and the sdist: all files are in them, the version is the tag's, and they run where nothing else is."""

import importlib.metadata
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment

pytest.importorskip("build")
pytest.importorskip("hatch_vcs")
pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What each extra is for: modules that need its packages.
MODULES = {
    "export": ["avex_export.export", "avex_serve.training.fit", "huggingface_hub"],
    "hub": ["huggingface_hub"],
    "cloud": ["s3fs", "gcsfs"],
    "cuda": ["avex_serve.inference.torch"],
    "formats": ["av"],
    "openvino": ["avex_serve.inference.openvino"],
    "plot": ["avex_serve.seeing.pictures", "avex_serve.archive.report"],
    "ray": ["ray"],
    "tracing": ["opentelemetry.exporter.otlp.proto.http"],
}


def run(*command, cwd, **options):
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked():
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The tracked files as they are here, without git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("archive")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def packages(archive, tmp_path_factory):
    """The folder of the sdist, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=archive)
    return folder


@pytest.fixture(scope="module")
def wheel(packages):
    (path,) = packages.glob("*.whl")
    return path


def test_every_file_is_in_them(packages, wheel):
    ours = [name for name in tracked() if name.startswith(("avex_serve/", "export/avex_export/"))]
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert packed == {name.removeprefix("export/") for name in ours} | {"avex_serve/_version.py"}
    (sdist,) = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert packed >= {*ours, "README.md", "LICENSE", "bentofile.yaml", "deploy/requirements.txt", "PKG-INFO"}


def version(folder):
    return run(sys.executable, "-m", "hatchling", "version", cwd=folder).strip()


def test_the_version_is_the_tags(archive, tmp_path, wheel):
    assert "-0.0.0-" in wheel.name
    folder = tmp_path / "checkout"
    shutil.copytree(archive, folder, ignore=shutil.ignore_patterns("_version.py"))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    run(*git, "init", "--quiet", cwd=folder)
    run(*git, "add", "--all", cwd=folder)
    run(*git, "commit", "--quiet", "--message", "first", cwd=folder)
    assert version(folder).startswith("0.0.1.dev1+g")  # a clone without tags
    run(*git, "tag", "v9.8.7", cwd=folder)
    assert version(folder) == "9.8.7"
    run("git", "archive", "--output", tmp_path / "archive.zip", "HEAD", cwd=folder)
    shutil.unpack_archive(tmp_path / "archive.zip", tmp_path / "unpacked")
    assert version(tmp_path / "unpacked") == "9.8.7"
    run(*git, "commit", "--quiet", "--allow-empty", "--message", "second", cwd=folder)
    assert version(folder).startswith("9.8.8.dev1+g")


def required(extra=None):
    """The packages that the base install needs, or it and an extra, in this environment."""
    wanted = PROJECT["dependencies"] + (EXTRAS[extra] if extra else [])
    if "avex-serve[hub]" in wanted:
        wanted = [each for each in wanted if each != "avex-serve[hub]"] + EXTRAS["hub"]
    return runpy.run_path(str(ROOT / "scripts" / "lock.py"))["required"](wanted, default_environment())


def with_packages(folder, names, *, pip=False):
    """A new environment that has the packages of these names and no others: its Python, and where they are."""
    venv.create(folder, with_pip=pip)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name in names:
        for file in importlib.metadata.files(name):
            if ".." not in file.parts and "__pycache__" not in file.parts and not (packages / file).exists():
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                (packages / file).symlink_to(file.locate())
    return folder / "bin" / "python", packages


def test_the_base_install_answers(wheel, tmp_path):
    python, _ = with_packages(tmp_path / "bare", required(), pip=True)
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    shown = run(python, "-P", ROOT / "tests" / "packaged.py", cwd=tmp_path, timeout=300)
    assert "avex-serve 0.0.0 runs on Python" in shown


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev"}))
def test_an_extra_has_what_it_needs(wheel, tmp_path, extra):
    try:
        names = required(extra)
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    python, packages = with_packages(tmp_path / extra, names)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(packages)
    run(python, "-P", "-c", f"import {', '.join(MODULES[extra])}", cwd=tmp_path, timeout=300)
