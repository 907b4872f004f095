"""Bundles on the hub, against a server on this machine: pushed, fetched, checked, cached and served."""

import hashlib
import json
import shutil

import pytest

import avex_serve
from avex_export.cli import main as export
from avex_serve.bundles.reading import read_bundle
from avex_serve.cli import main
from avex_serve.service.settings import DEMO_BUNDLE
from tests.bundles import make_audio_bundle
from tests.clients import until
from tests.hub import READER, Hub, Repository, hub_variables, use_hub
from tests.service.conftest import running_server
from tests.service.test_lifecycle import refused_start

ADDRESS = "hf://reserve/birds"
# Said by the client of huggingface_hub, about an upload of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("AVEX_BUNDLE_CACHE", str(tmp_path / "cache"))
    with Hub().running() as server:
        use_hub(monkeypatch, server, tmp_path / "hf")
        yield server


def put(hub, folder, name="reserve/birds", **others):
    """The repository with the files of a folder, as if somebody had pushed them."""
    repository = hub.repositories.setdefault(name, Repository(private=False))
    repository.commit({file.name: file.read_bytes() for file in folder.iterdir()} | others)
    return repository


def output(capsys, *arguments, code=0, command=main):
    """What a command prints, in both streams."""
    assert command([str(each) for each in arguments]) == code
    return "".join(capsys.readouterr())


# -- pushed ---------------------------------------------------------------------------------------------------------


def push(capsys, folder, *options, code=0, address=ADDRESS):
    return output(capsys, "--push", address, "--output", folder, *options, code=code, command=export)


def test_a_bundle_is_exported_pushed_and_used_by_its_address(hub, tmp_path, capsys, wav):
    folder = tmp_path / "out"
    shown = output(
        capsys,
        *("--probe", "linear_last", "--format", "torchscript", "--output", folder, "--push", ADDRESS),
        command=export,
    )
    repository = hub.repositories["reserve/birds"]
    bundle = read_bundle(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: text for name, text in repository.files.items() if name != ".gitattributes"} == files
    assert len(repository.commits) == 2  # the hub's own, and one
    assert repository.message == "linear_last, version 1"
    assert not repository.private
    pinned = f"{ADDRESS}@{repository.head}"
    assert f"pushed {pinned}\nserve it: AVEX_BUNDLE={pinned} bentoml serve" in shown

    for address in (ADDRESS, pinned):
        assert bundle.digest in output(capsys, "info", address)
    assert output(capsys, "diff", ADDRESS, folder) == "the same bundle\n"
    assert "✓" in output(capsys, "verify", ADDRESS)
    (tmp_path / "recording.wav").write_bytes(wav)
    answers = [output(capsys, "predict", each, tmp_path / "recording.wav", "--json") for each in (folder, pinned)]
    assert answers[0] == answers[1]
    output(capsys, "run", pinned, tmp_path / "recording.wav", "--out", tmp_path / "store", "--progress", "none")
    with avex_serve.open_bundle(ADDRESS) as engine:
        assert engine.bundle.digest == bundle.digest


def test_a_second_push_replaces_the_bundle_and_nothing_else(hub, tmp_path, capsys):
    put(hub, DEMO_BUNDLE, LICENSE=b"ours")
    push(capsys, make_audio_bundle(tmp_path / "new"))
    repository = hub.repositories["reserve/birds"]
    assert set(repository.files) == {"LICENSE", *(file.name for file in (tmp_path / "new").iterdir())}
    before = len(repository.commits)
    push(capsys, tmp_path / "new")
    assert len(repository.commits) == before  # there was nothing to commit


def test_private(hub, tmp_path, capsys):
    folder = make_audio_bundle(tmp_path / "new")
    push(capsys, folder, "--private")
    assert hub.repositories["reserve/birds"].private
    hub.repositories["reserve/birds"].private = False
    assert "is public; make it private in its settings" in push(capsys, folder, "--private", code=2)
    assert "--private is for --push" in output(capsys, "--private", "--probe", "linear_last", code=2, command=export)


def test_pushes_that_are_refused(hub, tmp_path, capsys, monkeypatch):
    folder = make_audio_bundle(tmp_path / "new")
    hub.repositories["reserve/other"] = Repository(private=False)
    hub.repositories["reserve/other"].commit({"config.json": b"{}"})
    refused = push(capsys, folder, address="hf://reserve/other", code=2)
    assert "holds config.json and no manifest.json: not replaced" in refused
    assert "leave out @main" in push(capsys, folder, address=f"{ADDRESS}@main", code=2)
    assert "expected hf://owner/name" in push(capsys, folder, address="hf://birds", code=2)
    assert "reserve--birds" in push(capsys, folder, address="hf://reserve/reserve--birds", code=2)
    assert "give --probe to export one, or --output" in output(capsys, "--push", ADDRESS, code=2, command=export)
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", READER)
        assert "the hub refuses the token (403); set HF_TOKEN" in push(capsys, folder, code=2)
        patch.delenv("HF_TOKEN")
        assert "pushing needs a token that may write; set HF_TOKEN" in push(capsys, folder, code=2)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("HF_TOKEN", READER)
        assert "HF_HUB_OFFLINE" in push(capsys, folder, code=3)
    (folder / "model.onnx").write_bytes(b"changed")
    assert "model.onnx was changed after the export" in push(capsys, folder, code=3)
    assert "reserve/birds" not in hub.repositories


def test_what_arrived_changed_is_reported(hub, tmp_path, capsys, monkeypatch):
    folder = make_audio_bundle(tmp_path / "new")
    monkeypatch.setattr(hub, "info", lambda path, content: Hub.info(hub, path, content[1:]))
    refused = push(capsys, folder, code=3)
    assert "model.onnx" in refused
    assert "labels.json" in refused
    assert "arrived changed; push again" in refused


def test_a_push_at_the_same_time_is_not_overwritten(hub, tmp_path, capsys, monkeypatch):
    repository = put(hub, DEMO_BUNDLE)

    def other(repository, path):
        if path == "manifest.json":
            repository.commit(repository.files | {"news": b""})
        return Hub.mode(hub, repository, path)

    monkeypatch.setattr(hub, "mode", other)
    assert "changed by somebody else" in push(capsys, make_audio_bundle(tmp_path / "new"), code=3)
    assert repository.files["manifest.json"] == (DEMO_BUNDLE / "manifest.json").read_bytes()


# -- fetched --------------------------------------------------------------------------------------------------------


def test_without_network_the_cache_answers(hub, tmp_path, capsys, monkeypatch):
    repository = put(hub, DEMO_BUNDLE)
    pinned = f"{ADDRESS}@{repository.head}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused = output(capsys, "info", pinned, code=3)
    assert f"run 'hf download reserve/birds --revision {repository.head}' where there is network" in refused
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    online = output(capsys, "info", ADDRESS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.rmtree(tmp_path / "cache")  # what is left is the hub's own cache
    asked = len(hub.requests)
    assert output(capsys, "info", ADDRESS) == output(capsys, "info", pinned) == online
    assert len(hub.requests) == asked


def test_a_pinned_bundle_is_asked_for_once(hub, capsys):
    pinned = f"{ADDRESS}@{put(hub, DEMO_BUNDLE).head}"
    first = output(capsys, "info", pinned)
    asked = len(hub.requests)
    put(hub, DEMO_BUNDLE, news=b"")
    assert output(capsys, "info", pinned) == first
    assert len(hub.requests) == asked


def test_a_changed_bundle_is_fetched_again(hub, tmp_path, capsys):
    put(hub, DEMO_BUNDLE)
    assert "linear_last" in output(capsys, "info", ADDRESS)
    put(hub, make_audio_bundle(tmp_path / "new"))
    assert "tiny" in output(capsys, "info", ADDRESS)


def test_addresses_of_nothing(hub, tmp_path, capsys, monkeypatch):
    repository = put(hub, DEMO_BUNDLE)
    assert "no such repository, or no token" in output(capsys, "info", "hf://reserve/frogs", code=2)
    assert "no revision v9" in output(capsys, "info", f"{ADDRESS}@v9", code=2)
    assert "expected hf://owner/name" in output(capsys, "info", "hf://reserve/birds/model.onnx", code=2)
    hub.repositories["reserve/empty"] = Repository(private=False)
    assert "has no manifest.json; expected a bundle" in output(capsys, "info", "hf://reserve/empty", code=3)
    files = dict(repository.files)
    del files["model.onnx"]
    repository.commit(files)
    assert f"{ADDRESS} has no model.onnx" in output(capsys, "info", ADDRESS, code=3)
    repository.commit(files | {"manifest.json": b"{"})
    assert f"{ADDRESS}/manifest.json is not JSON" in output(capsys, "info", ADDRESS, code=3)
    hub.repositories["reserve/empty"].private = True
    monkeypatch.delenv("HF_TOKEN")
    assert "no token that may read it" in output(capsys, "info", "hf://reserve/empty", code=2)


def test_a_file_that_is_not_the_manifests(hub, tmp_path, capsys):
    repository = put(hub, DEMO_BUNDLE, **{"model.onnx": b"tampered with"})
    refused = output(capsys, "info", ADDRESS, code=3)
    assert f"{ADDRESS}/model.onnx was changed after the export" in refused
    assert "hf download reserve/birds --force-download" in refused
    assert str(tmp_path) not in refused
    repository.commit({file.name: file.read_bytes() for file in DEMO_BUNDLE.iterdir()})
    assert read_bundle(DEMO_BUNDLE).digest in output(capsys, "info", ADDRESS)


def test_without_its_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AVEX_BUNDLE_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refused = output(capsys, "info", ADDRESS, code=3)
    assert "needs huggingface_hub, which is not installed; pip install 'avex-serve[hub]'" in refused


def test_a_calibration_is_not_written_into_the_cache(hub, tmp_path, capsys):
    put(hub, DEMO_BUNDLE)
    (tmp_path / "labels.csv").write_text("file,start,end,label,decision\n")
    refused = output(capsys, "calibrate", ADDRESS, tmp_path / "labels.csv", code=2)
    assert f"{ADDRESS} is a URL; say by --output where" in refused


def test_a_service_of_a_repository(hub, tmp_path, wav):
    variables = hub_variables(hub, tmp_path / "hf", AVEX_BUNDLE=ADDRESS, AVEX_RELOAD_SECONDS="0.5", AVEX_WORKERS="2")
    assert f"{ADDRESS}: there is no such repository" in refused_start(tmp_path, **variables)
    repository = put(hub, make_audio_bundle(tmp_path / "old"))
    with running_server(tmp_path / "server", **variables) as server:
        assert server.post("/predict", content=wav).json()["score_scale"] == "sigmoid"
        put(hub, make_audio_bundle(tmp_path / "new", activation="softmax"))
        until(lambda: "in place of tiny, version 1" in server.log)
        assert server.post("/predict", content=wav).json()["score_scale"] == "softmax"
        repository.commit(repository.files | {"model.onnx": b"tampered with"})
        manifest = json.loads(repository.files["manifest.json"])
        manifest["files"]["model.onnx"] = hashlib.sha256(b"other").hexdigest()
        repository.commit(repository.files | {"manifest.json": json.dumps(manifest).encode()})
        until(lambda: "model.onnx was changed after the export" in server.log)
        assert server.post("/predict", content=wav).json()["score_scale"] == "softmax"
