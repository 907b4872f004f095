"""A backbone as users have theirs: a YAML file and a checkpoint beside it."""

import pytest
import yaml
from safetensors.torch import save_file

from avex_export.cli import main
from tests.models.backbones import tiny_beats, tiny_spec

LABELS = ("bat", "bee", "bird", "frog", "wind")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of the YAML file; `tiny_beats(seed=5)` are its weights."""
    folder = tmp_path_factory.mktemp("model")
    weights = {n: t.clone() for n, t in tiny_beats(seed=5).state_dict().items()}
    save_file(weights, folder / "tiny.safetensors")
    content = {"model_spec": tiny_spec().model_dump(exclude_none=True), "checkpoint_path": "tiny.safetensors"}
    (folder / "tiny.yml").write_text(yaml.safe_dump({**content, "licence": "CC0-1.0"}))
    return folder / "tiny.yml"


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
