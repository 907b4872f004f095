"""`avex-serve tune`, and the service that uses what it has kept."""

import json

import msgspec
import numpy as np
import pytest

from avex_serve.cli import main
from avex_serve.evidence import tuning
from avex_serve.evidence.tuning import Measured, Setup, Tuning, keep, kept
from avex_serve.inference.onnx import OnnxBackend
from tests.bundles import make_audio_bundle, make_embedding_bundle, proven
from tests.service.conftest import running_server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_TURN_SECONDS", 0.01)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 3)
    monkeypatch.setenv("AVEX_BUNDLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path):
    return proven(make_audio_bundle(tmp_path / "bundle"))


def rows(text):
    """Format, threads and speed relative to the usual one, of each row of the table."""
    found = [line.split() for line in text.splitlines() if line.startswith(("onnx", "openvino", "torchscript"))]
    return [(words[0], int(words[1]), float(words[4])) for words in found]


def test_it_measures_what_there_is_and_names_the_rest(bundle, capsys):
    assert main(["tune", str(bundle)]) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert [threads for name, threads, _ in found if name == "onnx"] == [1, 2, 3]
    assert [times for name, threads, times in found if (name, threads) == ("onnx", 3)] == [1.0]
    assert all(times > 0 for *_, times in found)
    assert "not measured: cpu, int8:" in text
    assert "export it again with --quantize int8" in text
    assert "not measured: cuda, float32:" in text
    assert "\nset: AVEX_DEVICE=cpu AVEX_PRECISION=float32 AVEX_RUNTIME=" in text
    assert "kept" not in text


def test_a_bundle_of_embeddings_without_evidence(tmp_path, capsys):
    assert main(["tune", str(make_embedding_bundle(tmp_path / "bundle"))]) == 0
    assert rows(capsys.readouterr().out)


def test_what_answers_otherwise_is_left_out(bundle, capsys, monkeypatch):
    pytest.importorskip("openvino")
    answer = OnnxBackend.run
    wrong = lambda self, *inputs: {name: value + 0.1 for name, value in answer(self, *inputs).items()}  # noqa: E731
    monkeypatch.setattr(OnnxBackend, "run", wrong)
    assert main(["tune", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert {name for name, *_ in rows(text)} == {"openvino"}
    assert "not measured: cpu, float32: on this machine bundle tiny, version 1, answers otherwise" in text
    assert "AVEX_RUNTIME=openvino" in text


def test_nothing_answers_as_the_evidence_says(tmp_path, capsys):
    bundle = proven(make_audio_bundle(tmp_path / "bundle"), off=0.5)
    assert main(["tune", str(bundle)]) == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing on this machine can serve the bundle" in captured.err
    assert "cpu, float32: on this machine bundle tiny, version 1, answers otherwise" in captured.err


def made(bundle, **rates):
    """A result with such rates of the formats, the first of which is the usual one."""
    from avex_serve.bundles.reading import read_bundle

    runtimes = {"onnx": "auto", "openvino": "openvino"}
    measured = [Measured(Setup("cpu", "float32", runtimes[name], 2), name, rates[name]) for name in rates]
    return Tuning(read_bundle(bundle), measured, measured[0], [])


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ((1.2, 1.2, 1.2), "openvino"),
        ((1.04, 1.04, 1.04), "onnx"),  # as small as the differences between days
        ((1.5, 1.5, 0.9), "onnx"),  # not in each round
        ((0.5, 0.5, 0.5), "onnx"),
    ],
)
def test_the_usual_engine_stays_unless_another_is_clearly_faster(bundle, rates, best):
    assert made(bundle, onnx=(1.0, 1.0, 1.0), openvino=rates).best.format == best


def test_what_is_kept_is_of_the_bundle_and_the_processor(bundle, tmp_path, monkeypatch):
    other = make_embedding_bundle(tmp_path / "other")
    chosen = made(bundle, onnx=(1.0,), openvino=(2.0,))
    path = keep(chosen, tmp_path / "cache")
    keep(made(other, onnx=(1.0,)), tmp_path / "cache")
    assert kept(chosen.bundle, tmp_path / "cache") == Setup("cpu", "float32", "openvino", 2)
    assert [each.name for each in path.parent.iterdir()] == ["tuned.json"]
    machine = tuning.this_machine()
    monkeypatch.setattr(tuning, "this_machine", lambda: msgspec.structs.replace(machine, cpu="another"))
    assert kept(chosen.bundle, tmp_path / "cache") is None


def test_a_folder_that_cannot_be_written(bundle, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AVEX_BUNDLE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["tune", str(bundle), "--save"]) == 6
    captured = capsys.readouterr()
    assert "tuned.json can't be" in captured.err
    assert "checking" not in captured.err  # said before anything is measured


@pytest.mark.parametrize(
    ("settings", "served"),
    [({}, "openvino"), ({"AVEX_RUNTIME": "auto", "AVEX_PRECISION": "float32"}, "onnx")],
    ids=["left open", "set"],
)
def test_the_service_uses_what_is_kept_where_nothing_is_set(bundle, tmp_path, settings, served):
    pytest.importorskip("openvino")
    keep(made(bundle, onnx=(1.0,), openvino=(2.0,)), tmp_path / "cache")
    environment = {"AVEX_BUNDLE": str(bundle), "AVEX_BUNDLE_CACHE": str(tmp_path / "cache"), **settings}
    with running_server(tmp_path / "server", **environment) as server:
        assert server.get("/models/tiny").json()["format"] == served


def test_a_folder_that_cannot_be_read_stops_no_service(bundle, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert kept(made(bundle, onnx=(1.0,)).bundle, tmp_path / "file" / "cache") is None
    assert "can't be read" in caplog.text


def test_a_damaged_file_is_named_with_the_remedy(bundle, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tuned.json").write_text(json.dumps({"digest": np.pi}))
    assert main(["tune", str(bundle), "--save"]) == 2
    assert "delete it, and run avex-serve tune again" in capsys.readouterr().err
