"""What importing loads, and that serving works where torch is not installed."""

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

import avex_serve
from tests.answers import as_json
from tests.bundles import SAMPLE_RATE

# Put on the path, this module stops every import of torch as if it were not installed, and says who wanted it.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "avex_export"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""
HEAVY = {"torch", "onnxruntime", "bentoml", "grpc", "numpy", "soundfile", "pydantic", "avex_export"}


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """A recording of several windows."""
    path = tmp_path_factory.mktemp("audio") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 8000), SAMPLE_RATE)
    return path


@pytest.fixture(scope="session")
def blocker(tmp_path_factory):
    """A folder that blocks torch, as PYTHONPATH."""
    folder = tmp_path_factory.mktemp("blocker")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return folder


def python(*arguments, environment=None, code=0):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == code, result.stderr
    return result.stdout


def loaded(script, *arguments):
    """Which of the heavy modules are loaded at the end of the script."""
    script = f"import sys\n{textwrap.dedent(script)}\nprint(*sys.modules)"
    return HEAVY & set(python("-c", script, *arguments).split())


@pytest.fixture
def no_torch(monkeypatch, blocker):
    """The environment of a process where torch can't be imported."""
    monkeypatch.setenv("PYTHONPATH", str(blocker))


def test_one_module_knows_the_inside_of_bentoml():
    package = Path(avex_serve.__file__).parent
    knowing = [path.name for path in package.rglob("*.py") if "bentoml._internal" in path.read_text("utf-8")]
    assert knowing == ["bento.py"]


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import avex_serve; avex_serve.__version__; dir(avex_serve)") == set()


def test_importing_the_command_line_loads_no_runtime():
    assert loaded("import avex_serve.cli, avex_serve.bundles.reading") <= {"numpy", "soundfile", "pydantic"}


def test_the_service_loads_no_torch():
    assert not loaded("import avex_serve.service") & {"torch", "avex_export"}


def test_predicting_leaves_torch_unimported(audio_bundle, recording):
    script = """
        import avex_serve
        from avex_serve.audio.reader import decode
        for device in ("auto", "cpu"):
            with avex_serve.open_bundle(sys.argv[1], device) as engine:
                engine.predict(*decode(sys.argv[2]))
    """
    assert "onnxruntime" in (heavy := loaded(script, audio_bundle, recording))
    assert not heavy & {"torch", "avex_export", "bentoml", "grpc"}


def test_all_is_exact():
    assert avex_serve.__all__ == sorted(set(avex_serve.__all__))
    for name in set(avex_serve.__all__) - {"__version__"}:
        value = getattr(avex_serve, name)
        home = avex_serve._ELSEWHERE.get(name, avex_serve._REGISTRY)
        assert callable(value)
        assert (value.__name__, value.__module__) == (name, home), "a public name is where it is defined"
        assert value.__doc__
    assert set(avex_serve.__all__) <= set(dir(avex_serve))


def test_star_import():
    names = {}
    exec("from avex_serve import *", names)
    assert names.keys() - {"__builtins__"} == set(avex_serve.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'avex_serve' has no attribute 'open_bundel'"):
        _ = avex_serve.open_bundel
    assert not hasattr(avex_serve, "torch")


def test_the_blocker_blocks(no_torch):
    script = """
        from importlib import import_module
        for module in ("torch", "torch.nn", "avex_export", "avex_serve.inference.torch"):
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                print(error)
    """
    assert python("-c", textwrap.dedent(script)).count("is blocked") == 4


@pytest.mark.parametrize(
    "modules",
    [
        "avex_serve.service",
        "avex_serve.cli, avex_serve.bundles.reading, avex_serve.configs, avex_serve.inference.engine",
    ],
)
def test_imports_without_torch(no_torch, modules):
    python("-c", f"import {modules}, sys; assert not {{'torch', 'avex_serve.models'}} & sys.modules.keys()")


def test_serves_without_torch(no_torch, audio_bundle, recording):
    with avex_serve.open_bundle(audio_bundle) as engine:
        samples, rate = soundfile.read(recording, dtype="float32")
        answer = engine.predict(samples, rate)
    expected = as_json(answer)
    assert expected["detections"]
    script = """
        import json, sys
        from dataclasses import asdict
        from avex_serve import open_bundle
        from avex_serve.audio.reader import decode
        with open_bundle(sys.argv[1]) as engine:
            print(json.dumps(asdict(engine.predict(*decode(sys.argv[2])))))
    """
    by_library = python("-c", textwrap.dedent(script), audio_bundle, recording)
    by_command = python("-m", "avex_serve", "predict", audio_bundle, recording, "--json")
    assert json.loads(by_library) == json.loads(json.dumps(asdict(answer)))
    assert json.loads(by_command) == {"file": str(recording), **expected}


def test_a_first_answer_loads_what_it_needs_and_no_more(audio_bundle, recording):
    script = """
        import sys
        from avex_serve import open_bundle
        from avex_serve.audio.reader import decode
        with open_bundle(sys.argv[1]) as engine:
            assert engine.predict(*decode(sys.argv[2]), threshold=0).detections
        print({"pydantic", "bentoml", "torch", "onnx", "scipy"} & sys.modules.keys())
    """
    assert python("-c", textwrap.dedent(script), audio_bundle, recording) == "set()\n"


def test_the_training_side_says_that_torch_is_missing(no_torch):
    script = (
        "import avex_serve\ntry:\n avex_serve.load_model\nexcept ModuleNotFoundError as error:\n print(error.name)"
    )
    assert python("-c", script).strip() == "torch"


def test_the_exporter_says_that_torch_is_missing(tmp_path, monkeypatch):
    """The base install has the exporter, but not what it needs."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.replace('"torch", "avex_export"', '"torch",'))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "avex_export", "--list"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (3, 1)
    assert "torch is not installed; pip install 'avex-serve[export]'" in result.stderr
