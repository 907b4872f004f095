import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from avex_serve.models.files import find_local, resolve_file
from tests.hub import REVISION, hub_cache, use_cache

# fsspec's filesystems by scheme; `fsspec.registry` is a read-only view of it that hides the module.
IMPLEMENTATIONS = sys.modules["fsspec.registry"]._registry


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Cloud storage: the filesystem that fsspec keeps in memory, under the schemes of the real ones."""

    class Cloud(MemoryFileSystem):
        protocol = ("s3", "gs")
        store = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012
        downloads = 0

        def get_file(self, *arguments, **options):
            type(self).downloads += 1
            super().get_file(*arguments, **options)

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.partition("://")[2] or path)

    for scheme in ("s3", "gs"):
        monkeypatch.setitem(IMPLEMENTATIONS, scheme, Cloud)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Cloud()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_file_in_cloud_storage_is_downloaded_once(cloud, scheme, tmp_path):
    cloud.pipe_file("/bucket/a/weights.pt", b"content")
    uri = f"{scheme}://bucket/a/weights.pt"
    path = resolve_file(uri)
    assert path.name == "weights.pt"
    assert path.read_bytes() == b"content"
    assert path.is_relative_to(tmp_path / "cache")
    assert resolve_file(uri) == path
    assert cloud.downloads == 1
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_remote_file_that_changed_is_downloaded_again(cloud):
    cloud.pipe_file("/bucket/weights.pt", b"old")
    assert resolve_file("s3://bucket/weights.pt").read_bytes() == b"old"
    cloud.pipe_file("/bucket/weights.pt", b"newer")
    assert resolve_file("s3://bucket/weights.pt").read_bytes() == b"newer"


def test_a_broken_download_leaves_nothing_behind(cloud, monkeypatch, tmp_path):
    cloud.pipe_file("/bucket/weights.pt", b"content")
    whole = type(cloud).get_file

    def breaks(self, remote, local, **options):
        with open(local, "wb") as file:  # noqa: PTH123
            file.write(b"con")
        raise ConnectionError("gone")

    monkeypatch.setattr(type(cloud), "get_file", breaks)
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/weights\.pt can't be read .*gone"):
        resolve_file("s3://bucket/weights.pt")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    monkeypatch.setattr(type(cloud), "get_file", whole)
    assert resolve_file("s3://bucket/weights.pt").read_bytes() == b"content"


def test_a_file_that_is_not_in_cloud_storage(cloud):
    with pytest.raises(FileNotFoundError, match=r"Checkpoint not found: gs://bucket/other\.pt"):
        resolve_file("gs://bucket/other.pt")


@pytest.mark.parametrize(("uri", "package"), [("s3://bucket/x.pt", "s3fs"), ("gs://bucket/x.pt", "gcsfs")])
def test_cloud_storage_without_its_package_names_the_extra(monkeypatch, uri, package):
    monkeypatch.delitem(IMPLEMENTATIONS, uri.partition(":")[0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, .* pip install 'avex-serve\[cloud\]'"):
        resolve_file(uri)


@pytest.mark.parametrize(
    "uri", ["hf://owner", "hf://owner/repo", "hf://owner/repo/", "hf://owner/repo/file@", "hf://owner/repo@/file"]
)
def test_a_malformed_hub_uri(uri):
    with pytest.raises(ValueError, match=r"expected hf://owner/repository/file\[@revision\]"):
        resolve_file(uri)


def test_what_is_on_this_machine_is_found_without_network(tmp_path, monkeypatch):
    hub_cache(tmp_path, "owner/repo", "sub/labels.json", lambda path: (path.parent.mkdir(), path.write_text("{}")))
    use_cache(monkeypatch, tmp_path)
    found = find_local("hf://owner/repo/sub/labels.json")
    assert found == resolve_file("hf://owner/repo/sub/labels.json")
    assert found == find_local(f"hf://owner/repo/sub/labels.json@{REVISION}")
    assert find_local(str(found)) == find_local(f"file://{found}") == found
    for uri in ("hf://owner/repo/other.json", "hf://owner/other/x", "s3://bucket/x", str(tmp_path / "other")):
        assert find_local(uri) is None
