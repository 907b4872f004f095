"""Bundles in object stores: a mirror over fsspec's file systems, and a service over S3."""

import hashlib
import shutil
import urllib.parse
from xml.sax.saxutils import escape

import fsspec
import pytest

from avex_serve.bundles import remote
from avex_serve.bundles.folders import find_bundles
from avex_serve.bundles.reading import read_bundle
from avex_serve.bundles.remote import Mirror
from avex_serve.errors import BundleError, InputError, UnavailableError
from tests.bundles import make_audio_bundle
from tests.clients import until
from tests.service.conftest import running_server
from tests.service.test_lifecycle import refused_start
from tests.standin import Handler, StandIn


@pytest.fixture
def store(monkeypatch, audio_bundle):
    """An empty store, in memory."""
    monkeypatch.setitem(remote.STORES, "memory", "fsspec")
    memory = fsspec.filesystem("memory")
    if memory.exists("/bundles"):
        memory.rm("/bundles", recursive=True)
    return memory


def put(store, folder, place):
    if store.exists(place):
        store.rm(place, recursive=True)
    for file in folder.iterdir():
        store.pipe(f"{place}/{file.name}", file.read_bytes())


def served(mirror):
    return {
        str(each.relative_to(mirror.folder)): read_bundle(each).manifest.name
        for each in find_bundles([mirror.folder])
    }


def test_a_bundle_or_a_folder_of_bundles(store, tmp_path, audio_bundle):
    put(store, audio_bundle, "/bundles/birds")
    put(store, audio_bundle, "/bundles/frogs/1")
    store.pipe("/bundles/.hidden/manifest.json", b"{}")
    one = Mirror("memory://bundles/birds/", tmp_path)
    one.refresh()
    assert served(one) == {"bundle": "tiny"}
    several = Mirror("memory://bundles", tmp_path)
    several.refresh()
    assert served(several) == {"birds": "tiny", "frogs/1": "tiny"}


def test_only_what_has_changed_is_fetched(store, tmp_path, audio_bundle, monkeypatch):
    put(store, audio_bundle, "/bundles/birds")
    Mirror("memory://bundles", tmp_path).refresh()
    fetched = []
    monkeypatch.setattr(Mirror, "_fetch", lambda *arguments: fetched.append(arguments[1]))
    mirror = Mirror("memory://bundles", tmp_path)  # another process, or a later one
    mirror.refresh()
    assert fetched == []
    put(store, make_audio_bundle(tmp_path / "new", activation="softmax"), "/bundles/birds")
    mirror.refresh()
    assert fetched == ["birds"]


def test_a_bundle_that_is_not_whole_stays_out(store, tmp_path, audio_bundle):
    put(store, audio_bundle, "/bundles/birds")
    mirror = Mirror("memory://bundles", tmp_path)
    mirror.refresh()
    before = read_bundle(mirror.folder / "birds").digest
    put(store, make_audio_bundle(tmp_path / "new", activation="softmax"), "/bundles/birds")
    store.pipe("/bundles/birds/model.onnx", b"half of it")
    with pytest.raises(BundleError, match=r"^memory://bundles/birds/model.onnx was changed after the export"):
        mirror.refresh()
    mirror.refresh()  # its files are the same: it is not fetched again
    assert read_bundle(mirror.folder / "birds").digest == before
    put(store, tmp_path / "new", "/bundles/birds")
    mirror.refresh()
    assert read_bundle(mirror.folder / "birds").digest == read_bundle(tmp_path / "new").digest


def test_what_is_gone_is_removed_but_never_all(store, tmp_path, audio_bundle):
    for place in ("birds", "frogs"):
        put(store, audio_bundle, f"/bundles/{place}")
    mirror = Mirror("memory://bundles", tmp_path)
    mirror.refresh()
    store.rm("/bundles/birds", recursive=True)
    mirror.refresh()
    assert served(mirror) == {"frogs": "tiny"}
    store.rm("/bundles/frogs", recursive=True)
    with pytest.raises(BundleError, match="holds no bundle; those that were fetched stay"):
        mirror.refresh()
    assert served(mirror) == {"frogs": "tiny"}


def test_a_bundle_becomes_a_version(store, tmp_path, audio_bundle):
    mirror = Mirror("memory://bundles", tmp_path)
    for before, after in (("frogs", "frogs/1"), ("frogs/1", "frogs")):
        put(store, audio_bundle, f"/bundles/{before}")
        mirror.refresh()
        store.rm("/bundles/frogs", recursive=True)
        put(store, audio_bundle, f"/bundles/{after}")
        mirror.refresh()
        assert served(mirror) == {after: "tiny"}


def test_a_store_that_does_not_answer(store, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(fsspec.core, "url_to_fs", broken)
    with pytest.raises(UnavailableError, match="memory://bundles can't be fetched: no route to host"):
        Mirror("memory://bundles", tmp_path).refresh()


def test_other_schemes_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^https://host/birds: scheme https:// is not known; expected a path, or"):
        Mirror("https://host/birds", tmp_path)
    assert "scheme https:// is not known" in refused_start(tmp_path, AVEX_BUNDLE="https://host/birds")


class Bucket(StandIn):
    """A bucket of S3: what a client needs to list it and to read objects, which are files of a folder."""

    def __init__(self, folder):
        class Answer(Handler):
            def do_GET(self):
                url = urllib.parse.urlsplit(self.path)
                query = dict(urllib.parse.parse_qsl(url.query))
                bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
                if "list-type" in query:
                    self.answer(listing(folder / bucket, query.get("prefix", "")), "application/xml")
                elif (folder / bucket / key).is_file():
                    content = (folder / bucket / key).read_bytes()
                    self.answer(content, "binary/octet-stream", hashlib.md5(content).hexdigest())
                else:
                    self.answer(b"<Error><Code>NoSuchKey</Code></Error>", "application/xml", status=404)

            do_HEAD = do_GET

            def answer(self, content, kind, etag=None, status=200):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                    self.send_header("Last-Modified", "Sat, 02 May 2026 06:12:09 GMT")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

        super().__init__(Answer)


def listing(folder, prefix):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    keys = [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-05-02T06:12:09.000Z</LastModified>"
        f'<ETag>"{hashlib.md5(content).hexdigest()}"</ETag><Size>{len(content)}</Size></Contents>'
        for key, content in keys
        if key.startswith(prefix)
    )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    ).encode()


def test_a_service_of_a_bucket(tmp_path, audio_bundle, wav):
    pytest.importorskip("s3fs", reason="pip install 'avex-serve[cloud]'")
    bucket = tmp_path / "store" / "models"
    shutil.copytree(audio_bundle, bucket / "birds")
    with Bucket(tmp_path / "store").running() as store:
        variables = {
            "AVEX_BUNDLE": "s3://models",
            "AVEX_RELOAD_SECONDS": "0.5",
            "AVEX_WORKERS": "2",
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        assert "s3://models/none holds no bundle" in refused_start(
            tmp_path, **{**variables, "AVEX_BUNDLE": "s3://models/none"}
        )
        with running_server(tmp_path / "server", **variables) as server:
            assert server.post("/predict", content=wav).json()["score_scale"] == "sigmoid"
            make_audio_bundle(tmp_path / "new", activation="softmax")
            shutil.copytree(tmp_path / "new", bucket / "birds", dirs_exist_ok=True)
            until(lambda: "in place of tiny, version 1" in server.log)
            assert server.post("/predict", content=wav).json()["score_scale"] == "softmax"
