"""A backbone as users have theirs: a YAML file and a checkpoint beside it."""

import pytest

from avex_export.cli import main
from avex_export.graph import Head
from tests.models.backbones import tiny_beats, tiny_spec, write_model

UNTRAINED = "avex-export: the head has random weights: its answers mean nothing\n"
LABELS = ("bat", "bee", "bird", "frog", "wind")


def head(probe):
    """The probe as a trained head with these labels."""
    return Head("x", probe, LABELS, trained=True, reads=None, pooled=None)


def row(name, rows):
    """How a row of the table of a verification begins."""
    return f"{name:26}{rows:7}  "


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of the YAML file; `tiny_beats(seed=5)` are its weights."""
    path = tmp_path_factory.mktemp("model") / "tiny.yml"
    return write_model(path, tiny_beats(seed=5), tiny_spec(), licence="CC0-1.0")


@pytest.fixture(scope="session")
def labels(tmp_path_factory):
    """Path of a label file."""
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    path.write_text("\n".join(LABELS))
    return path


@pytest.fixture
def export(capsys):
    """Run `avex-export` in this process: its exit code, standard output and standard error."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
