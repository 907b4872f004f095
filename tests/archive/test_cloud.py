"""Recordings and results in object stores: fsspec's store in memory, and S3 by moto's server."""

import json
import shutil

import fsspec
import numpy as np
import pytest
import soundfile

from avex_serve.archive import cloud
from avex_serve.bundles import remote
from tests.archive.test_run import content, main_fails


@pytest.fixture(params=["memory", "s3"])
def bucket(request, monkeypatch):
    """The URL of an empty bucket."""
    if request.param == "memory":
        monkeypatch.setitem(remote.STORES, "memory", "fsspec")
        fsspec.filesystem("memory").store.clear()
        return "memory:///bucket"
    pytest.importorskip("s3fs", reason="pip install 'avex-serve[cloud]'")
    server = request.getfixturevalue("s3")
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"bucket-{request.node.name.partition('[')[0]}"[:63].replace("_", "-").rstrip("-")
    store.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def s3():
    """The address of a server that speaks S3."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def upload(folder, url):
    store, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def download(url, folder):
    store, root = fsspec.core.url_to_fs(url)
    for path in store.find(root):
        target = folder / path[len(root) :].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.cat_file(path))
    return content(folder)


def same(local, archive, url):
    """A store with the paths of recordings replaced; those of the tables and of the journal."""
    return {
        name: bytes_.replace(f"{archive}/".encode(), f"{url}/".encode())
        for name, bytes_ in local.items()
        if not name.endswith("recordings.parquet")
    }


def without_times(store):
    """The content of a store without the times of files, which differ in an object store."""
    journal = [json.loads(line) for line in store.pop("journal.ndjson").decode().splitlines()]
    store.pop("recordings.parquet", None)
    return store, [{key: value for key, value in entry.items() if key != "modified"} for entry in journal]


def test_recordings_and_results_in_a_bucket(archive, bundles, command, tmp_path, bucket):
    upload(archive, f"{bucket}/archive")
    options = ("--embeddings", "--format", "csv", "--format", "raven", "--format", "audacity")
    command("run", bundles["probes"], archive, "--out", tmp_path / "local", *options)
    out = f"{bucket}/results"
    code, lines = command("run", bundles["probes"], f"{bucket}/archive", "--out", out, *options)
    assert (code, lines[-1]) == (1, "5 computed, 0 known, 1 failed")
    assert lines[0] == f"{out}/tables/detections.csv"
    expected, entries = without_times(same(content(tmp_path / "local"), archive, f"{bucket}/archive"))
    found, theirs = without_times(download(out, tmp_path / "copy"))
    assert found == expected
    assert theirs == json.loads(json.dumps(entries).replace(f"{archive}/", f"{bucket}/archive/"))
    code, lines = command("run", bundles["probes"], f"{bucket}/archive", "--out", out, *options)
    assert (code, lines[-1]) == (1, "0 computed, 5 known, 1 failed")
    status = json.loads(command("status", out, "--json")[1][0])
    assert (status["recordings"], status["done"], list(status["failed"])) == (6, 5, [f"{bucket}/archive/broken.wav"])
    command("tables", out, "--output", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == found["tables/detections.csv"]


def test_what_is_there_is_never_replaced(archive, bundles, command, tmp_path, bucket):
    upload(archive, f"{bucket}/archive")
    arguments = ("run", bundles["plain"], f"{bucket}/archive", "--out", f"{bucket}/results")
    command(*arguments)
    before = download(f"{bucket}/results", tmp_path / "before")
    store, root = fsspec.core.url_to_fs(bucket)
    store.rm_file(f"{root}/results/journal.ndjson")  # as if the run had been killed before it was uploaded
    writes = []
    put = cloud.Remote.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloud.Remote, "create", lambda *given: writes.append(given[2]) or put(*given))
        assert command(*arguments)[1][-1] == "5 computed, 0 known, 1 failed"
    assert writes, "they were computed again, and their names were taken"
    assert download(f"{bucket}/results", tmp_path / "after") == before


def test_only_what_is_missing_is_computed(archive, bundles, command, bucket):
    upload(archive, f"{bucket}/archive")
    arguments = ("run", bundles["plain"], f"{bucket}/archive/*.wav", f"{bucket}/archive/site b")
    out = ("--out", f"{bucket}/results")
    assert command(*arguments, *out)[1][-1] == "4 computed, 0 known, 1 failed"
    store, root = fsspec.core.url_to_fs(bucket)
    store.pipe_file(f"{root}/archive/new.wav", (archive / "silent.wav").read_bytes() + b"junk")
    store.rm_file(f"{root}/archive/broken.wav")
    assert command(*arguments, *out)[1][-1] == "1 computed, 4 known, 0 failed"
    store.mv(f"{root}/archive/dawn.wav", f"{root}/archive/renamed.wav")
    assert command(*arguments, *out)[1][-1] == "1 computed, 4 known, 0 failed"


def test_shards_in_a_bucket(archive, bundles, command, tmp_path, bucket):
    out = f"{bucket}/parts"
    for index in (1, 2):
        command("run", bundles["plain"], archive, "--out", out, "--shard", f"{index}/2")
    assert command("merge", out, "--out", tmp_path / "merged")[0] == 1
    assert command("merge", out, "--out", f"{bucket}/merged")[0] == 1
    command("run", bundles["plain"], archive, "--out", tmp_path / "whole")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    shutil.rmtree(tmp_path / "merged")
    assert download(f"{bucket}/merged", tmp_path / "merged") == content(tmp_path / "whole")


def test_what_is_not_there(archive, bundles, command, tmp_path, bucket, capsys):
    out = tmp_path / "out"
    run = ("run", bundles["plain"])
    assert main_fails(*run, f"{bucket}/none", "--out", out, says="no recordings there", capsys=capsys)
    assert main_fails(*run, "ftp://host/a.wav", "--out", out, says="ftp:// is not known", capsys=capsys)
    assert main_fails(*run, archive, "--out", "ftp://host/out", says="ftp:// is not known", capsys=capsys)
    assert main_fails("status", f"{bucket}/none", says=f"{bucket}/none holds no store.json", capsys=capsys)
    upload(archive, f"{bucket}/archive")
    assert main_fails(*run, archive, "--out", f"{bucket}/archive", says="holds no results of", capsys=capsys)
    code, lines = command("predict", bundles["plain"], f"{bucket}/archive", "--json")
    assert code == 2
    assert "use avex-serve run" in json.loads(lines[0])["error"]


def test_an_object_that_can_not_be_read_does_not_end_the_run(archive, bundles, command, bucket, tmp_path, status):
    upload(archive, f"{bucket}/archive")
    store, root = fsspec.core.url_to_fs(bucket)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    store.pipe_file(f"{root}/archive/nan.wav", (tmp_path / "nan.wav").read_bytes())
    assert command("run", bundles["plain"], f"{bucket}/archive", "--out", tmp_path / "out")[0] == 1
    failed = status(tmp_path / "out")["failed"]
    assert set(failed) == {f"{bucket}/archive/broken.wav", f"{bucket}/archive/nan.wav"}
    assert all(path in reason for path, reason in failed.items()), "messages name the object and not its copy"
