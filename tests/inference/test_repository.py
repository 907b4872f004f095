"""Several bundles at once, and their exchange on disk while requests run."""

import shutil
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from avex_serve import open_bundle
from avex_serve.bundles.folders import check_any, find_bundles
from avex_serve.bundles.manifest import MANIFEST, ONNX
from avex_serve.errors import BundleError, InputError, NotFoundError, UnavailableError
from avex_serve.evidence.first import open_checked
from avex_serve.inference.repository import UNLOADED, ModelState, Repository
from tests.bundles import WINDOW, change_manifest, make_audio_bundle, make_embedding_bundle, proven

WINDOWS = np.ones((1, WINDOW), np.float32)


@pytest.fixture
def shelf(tmp_path):
    """A folder for bundles."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    return folder


@pytest.fixture
def opened():
    """Opens a repository, and closes it at the end."""
    with ExitStack() as stack:

        def repository(*roots):
            made = Repository(roots, open_checked)
            stack.callback(made.close)
            return made

        yield repository


def bundle(folder, name="tiny", version="1", activation="sigmoid"):
    """A bundle; those with another activation have other files, so that their engines can be told apart."""
    return change_manifest(make_audio_bundle(folder, name=name, activation=activation), version=version)


def served(repository):
    return [(state.name, state.version) for state in repository.index() if state.ready]


def version_of(repository, name=None, version=None):
    with repository.lease(name, version) as engine:
        assert len(engine.infer(WINDOWS)["logits"]) == 1
        return engine.manifest.version


def is_closed(engine):
    """Whether the engine takes no more work."""
    try:
        engine.infer(WINDOWS)
    except RuntimeError:
        return True
    return False


def test_where_bundles_are_found(shelf, tmp_path, audio_bundle):
    flat, first, second = (make_audio_bundle(shelf / place) for place in ("flat", "nested/1", "nested/2"))
    make_audio_bundle(shelf / "too" / "deep" / "down")
    make_audio_bundle(shelf / ".hidden")
    (shelf / "note.txt").write_text("no bundle")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_bundles([shelf, audio_bundle, flat, empty]) == [flat, first, second, audio_bundle, empty]


def test_several_bundles_and_versions(shelf, opened, embedding_bundle):
    for version in ("9", "10", "2"):
        bundle(shelf / "tiny" / version, version=version)
    bundle(shelf / "other", name="other", version="2024-05")
    repository = opened(shelf, embedding_bundle)
    assert served(repository) == [
        ("other", "2024-05"),
        ("tiny", "2"),
        ("tiny", "9"),
        ("tiny", "10"),
        ("tiny-offline", "1"),
    ]
    assert repository.versions("tiny") == ["2", "9", "10"]
    assert version_of(repository, "tiny") == version_of(repository, "tiny", "") == "10"
    assert version_of(repository, "tiny", "9") == "9"
    with repository.lease_those(lambda manifest: manifest.name.startswith("tiny")) as engines:
        leased = [(engine.manifest.name, engine.manifest.version) for engine in engines]
        assert leased == [("tiny", "10"), ("tiny", "9"), ("tiny", "2"), ("tiny-offline", "1")]
    with repository.lease_those(lambda _: True) as engines:
        assert [engine.manifest.name for engine in engines] == ["other", *["tiny"] * 3, "tiny-offline"]
    with pytest.raises(InputError, match="several models are served: 'other', 'tiny', 'tiny-offline'; name one"):
        version_of(repository)
    with pytest.raises(NotFoundError, match="no model 'nothing' here; this server has 'other', 'tiny'"):
        version_of(repository, "nothing")
    with pytest.raises(NotFoundError, match="model 'tiny' has no version '3'; it has '2', '9', '10'"):
        version_of(repository, "tiny", "3")


def test_the_only_model_needs_no_name(opened, audio_bundle):
    assert version_of(opened(audio_bundle)) == "1"


def test_versions_are_ordered_by_their_numbers(shelf, opened):
    ordered = ["0.9", "1.9", "1.10", "2-beta", "v9", "v10"]
    for version in ordered:
        bundle(shelf / version, version=version)
    assert opened(shelf).versions("tiny") == ordered


def test_a_bad_bundle_keeps_no_other_from_being_served(shelf, opened, caplog):
    bundle(shelf / "good")
    changed = bundle(shelf / "changed", name="changed")
    (changed / ONNX).write_bytes(b"changed")
    unreadable = bundle(shelf / "nested" / "7")
    (unreadable / MANIFEST).write_text("{")
    deep = bundle(shelf / "deep", name="deep")
    (deep / MANIFEST).write_text("[" * 100_000)
    repository = opened(shelf)
    assert served(repository) == [("tiny", "1")]
    states = {state.name: state for state in repository.index()}
    assert states["tiny"] == ModelState("tiny", "1", ready=True, reason="")
    assert "sha256 differs" in states["changed"].reason
    assert (states["nested"].version, states["nested"].ready) == ("7", False)
    assert "is not JSON" in states["nested"].reason
    assert caplog.text.count("not served:") == 3
    for name, reason in (("changed", "sha256 differs"), ("nested", "is not JSON"), ("deep", "is not JSON")):
        with pytest.raises(UnavailableError, match=reason):
            version_of(repository, name)


def test_nothing_that_can_be_served(shelf, tmp_path):
    for name in ("a", "b"):
        (bundle(shelf / name, name=name) / ONNX).unlink()
    nowhere = tmp_path / "nowhere"
    for attempt in (lambda roots: Repository(roots, open_bundle), check_any):
        with pytest.raises(BundleError, match=r"a lacks model.onnx.*; .*b lacks model.onnx.*; .*nowhere is not a"):
            attempt([shelf, nowhere])
    check_any([shelf, bundle(shelf / "c")])


def test_the_check_before_the_start_leaves_digests_to_the_process_that_opens_the_bundle(shelf):
    changed = bundle(shelf / "a")
    (changed / ONNX).write_bytes(b"another graph")
    check_any([shelf])
    with pytest.raises(BundleError, match="sha256 differs"):
        Repository([shelf], open_bundle)


def test_the_second_of_a_name_and_version_is_refused(shelf, opened):
    first, second = bundle(shelf / "a"), bundle(shelf / "b", activation="softmax")
    repository = opened(shelf)
    ready, refused = sorted(repository.index(), key=lambda state: not state.ready)
    assert (ready.name, ready.version) == (refused.name, refused.version) == ("tiny", "1")
    assert f"{second} holds tiny, version 1, which is served from {first}" in refused.reason
    shutil.rmtree(first)
    for _ in range(3):
        repository.refresh()
    with repository.lease() as engine:
        assert engine.bundle.directory == second
    assert [state.ready for state in repository.index()] == [True]


def test_a_damaged_copy_of_what_is_served_is_reported_as_damaged(shelf, opened, caplog):
    first, second = bundle(shelf / "a"), bundle(shelf / "b")
    (second / ONNX).write_bytes(b"cut off")
    repository = opened(shelf)
    (reason,) = [state.reason for state in repository.index() if not state.ready]
    assert reason.startswith(f"{second / ONNX} was changed after the export")
    assert f"Besides, {second} holds tiny, version 1, which is served from {first}" in reason
    assert reason in caplog.text


def test_a_folder_that_is_renamed_is_served_all_the_while(shelf):
    old, new = bundle(shelf / "old"), shelf / "new"
    served_meanwhile = []

    def open_engine(folder):
        if folder == new:
            served_meanwhile.append(served(repository))
        return open_bundle(folder)

    repository = Repository([shelf], open_engine)
    with repository.lease() as before:
        old.rename(new)
        for _ in range(3):
            repository.refresh()
            with repository.lease() as engine:
                assert engine.manifest.version == "1"
        assert engine.bundle.directory == new
        assert [(state.ready, state.reason) for state in repository.index()] == [(True, "")]
        assert not is_closed(before)
    assert is_closed(before)
    assert served_meanwhile == [[("tiny", "1")]]
    repository.close()
    assert is_closed(engine)


@pytest.mark.parametrize("places", [("frogs", "frogs/1"), ("frogs/1", "frogs")])
@pytest.mark.parametrize("root", [".", "frogs"])
def test_a_folder_that_becomes_one_of_versions_is_served_all_the_while(shelf, opened, root, places):
    old, new = (shelf / place for place in places)
    bundle(old)
    repository = opened(shelf / root)
    with repository.lease() as before:
        old.rename(shelf / ".away")
        if new.parent == old:
            old.mkdir()
        else:
            new.rmdir()
        (shelf / ".away").rename(new)
        for _ in range(3):
            repository.refresh()
            with repository.lease() as engine:
                assert engine.manifest.version == "1"
        assert engine.bundle.directory == new
        assert [(state.ready, state.reason) for state in repository.index()] == [(True, "")]
        assert repository.changes["removed"] == 0
        assert not is_closed(before)
    assert is_closed(before)


def test_a_second_one_takes_over_when_the_first_is_removed(shelf, opened):
    first, second = bundle(shelf / "a"), bundle(shelf / "b", activation="softmax")
    repository = opened(shelf)
    for _ in range(2):
        repository.refresh()
    first.rename(shelf / ".away")
    repository.refresh()
    (shelf / ".away").rename(first)  # away for a moment
    for _ in range(2):
        repository.refresh()
        with repository.lease() as engine:
            assert engine.bundle.directory == first
    shutil.rmtree(first)
    for _ in range(2):
        repository.refresh()
        with repository.lease() as engine:
            assert engine.manifest.version == "1"
    assert engine.bundle.directory == second


def test_bundles_come_and_go(shelf, opened):
    bundle(shelf / "1", version="1")
    repository = opened(shelf)
    bundle(shelf / "2", version="2")
    repository.refresh()
    assert version_of(repository) == "2"
    shutil.rmtree(shelf / "2")
    repository.refresh()
    assert version_of(repository) == "2"  # it may be on its way back
    repository.refresh()
    assert version_of(repository) == "1"
    shutil.rmtree(shelf)
    for _ in range(2):
        repository.refresh()
    assert served(repository) == []
    with pytest.raises(UnavailableError, match="no model is served"):
        version_of(repository)
    bundle(shelf / "3", version="3")
    repository.refresh()
    assert version_of(repository) == "3"


def test_an_untouched_bundle_is_not_opened_again(shelf, opened):
    bundle(shelf / "a")
    repository = opened(shelf)
    with repository.lease() as before:
        for _ in range(3):
            repository.refresh()
        with repository.lease() as after:
            assert after is before


def test_a_replaced_bundle_takes_the_old_ones_place_when_its_requests_have_ended(shelf, opened):
    bundle(shelf / "a")
    repository = opened(shelf)
    with repository.lease() as old:
        with repository.lease() as also_old:
            assert also_old is old
            bundle(shelf / "a", version="2", activation="softmax")
            repository.refresh()
        with repository.lease() as new:
            assert (new.manifest.version, old.manifest.version) == ("2", "1")
        assert served(repository) == [("tiny", "2")]
        assert not is_closed(old)
    assert is_closed(old)
    repository.close()
    assert is_closed(new)


def test_no_request_fails_while_bundles_are_replaced(shelf, opened):
    bundle(shelf / "a")
    repository = opened(shelf)
    seen, failures, stop = set(), [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                with repository.lease("tiny") as engine:
                    engine.infer(WINDOWS)
                    seen.add(engine.manifest.version)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in ("2", "3", "4"):
        bundle(shelf / "a", version=version, activation="softmax")
        repository.refresh()
        deadline = time.monotonic() + 60
        while version not in seen and time.monotonic() < deadline:
            time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {"2", "3", "4"} <= seen


def test_an_editors_lock_keeps_no_bundle_from_being_replaced(shelf, opened):
    folder = bundle(shelf / "a")
    (folder / ".#lock").symlink_to("nowhere")
    repository = opened(shelf)
    bundle(folder, version="2")
    (folder / ".#lock").symlink_to("nowhere")
    repository.refresh()
    assert version_of(repository) == "2"


def test_what_can_not_be_looked_at_keeps_no_bundle_from_being_found(shelf):
    """As a folder that may not be entered, but that root can."""
    too_long = "x" * 300
    (shelf / "odd").symlink_to(too_long)
    (shelf / "versions").mkdir()
    (shelf / "versions" / MANIFEST).symlink_to(too_long)
    folder = bundle(shelf / "whole")
    assert find_bundles([shelf]) == [folder]


def test_a_bundle_that_is_still_being_copied_waits(shelf, opened, caplog, tmp_path):
    bundle(shelf / "a")
    repository = opened(shelf)
    new = bundle(tmp_path / "new", version="2", activation="softmax")
    parts = sorted(new.iterdir(), key=lambda path: path.name != MANIFEST)
    assert len(parts) > 2
    target = shelf / "a"
    for path in target.iterdir():
        path.unlink()
    repository.refresh()
    assert version_of(repository) == "1"
    for path in parts[:-1]:
        shutil.copy(path, target)
        repository.refresh()
        assert version_of(repository) == "1"
        assert "not served" not in caplog.text
    shutil.copy(parts[-1], target)
    repository.refresh()
    assert version_of(repository) == "2"


def test_a_replacement_that_turns_out_bad(shelf, opened, caplog):
    folder = bundle(shelf / "a")
    repository = opened(shelf)
    bundle(folder, version="2")
    (folder / ONNX).write_bytes(b"no graph")
    for _ in range(4):
        repository.refresh()
        assert version_of(repository) == "1"
    assert caplog.text.count("not served, the bundle before it goes on") == 1
    (state,) = repository.index()
    assert (state.version, state.ready) == ("1", True)
    assert "sha256 differs" in state.reason
    bundle(folder, version="3")
    repository.refresh()
    assert version_of(repository) == "3"
    assert [state.reason for state in repository.index()] == [""]


def test_a_graph_that_loads_and_does_not_answer(shelf, opened):
    """What warming up is for: the shapes of this manifest are not those of its graph."""
    bundle(shelf / "a", name="good")
    shutil.copytree(make_embedding_bundle(shelf.parent / "b"), shelf / "b")
    inputs = [{"name": "embedding", "dtype": "float32", "shape": [-1, 5]}]
    change_manifest(shelf / "b", inputs=inputs)
    repository = opened(shelf)
    assert served(repository) == [("good", "1")]
    with pytest.raises(UnavailableError, match="fails to answer for silence"):
        version_of(repository, "tiny-offline")


def test_a_bundle_that_answers_otherwise_takes_no_place(shelf, opened, caplog):
    folder = proven(bundle(shelf / "a"))
    repository = opened(shelf)
    proven(bundle(folder, version="2"), off=1e-2)
    for _ in range(3):
        repository.refresh()
        assert version_of(repository) == "1"
    assert caplog.text.count("not served, the bundle before it goes on: on this machine bundle tiny") == 1
    assert repository.changes == {"served": 1, "refused": 1, "removed": 0}
    (state,) = repository.index()
    assert (state.version, state.ready) == ("1", True)
    assert "answers otherwise than its evidence" in state.reason
    with pytest.raises(BundleError, match="answers otherwise than its evidence"):
        repository.load("tiny")
    proven(bundle(folder, version="3"))
    repository.refresh()
    assert version_of(repository) == "3"


def test_a_bundle_that_fails_in_a_way_nobody_thought_of(shelf, caplog):
    bundle(shelf / "bad", name="bad")
    bundle(shelf / "good", name="good")

    def open_engine(folder):
        if folder.name == "bad":
            raise MemoryError
        return open_bundle(folder)

    repository = Repository([shelf], open_engine)
    for _ in range(3):
        repository.refresh()
    assert served(repository) == [("good", "1")]
    assert caplog.text.count("unexpected error with the bundle in") == 1
    with pytest.raises(UnavailableError, match="bad can't be opened: MemoryError"):
        version_of(repository, "bad")
    repository.close()


def test_unloading_and_loading(shelf, opened):
    for version in ("1", "2"):
        bundle(shelf / "tiny" / version, version=version)
    bundle(shelf / "other", name="other")
    repository = opened(shelf)
    with repository.lease("tiny") as running:
        repository.unload("tiny")
        assert not is_closed(running)
    assert is_closed(running)
    bundle(shelf / "tiny" / "3", version="3")
    repository.refresh()
    assert served(repository) == [("other", "1")]
    reasons = {state.version: state.reason for state in repository.index() if state.name == "tiny"}
    assert reasons == dict.fromkeys(("1", "2", "3"), UNLOADED)
    with pytest.raises(UnavailableError, match="model 'tiny' is not served: unloaded"):
        version_of(repository, "tiny")
    repository.unload("tiny")
    repository.load("tiny")
    assert repository.versions("tiny") == ["1", "2", "3"]
    with repository.lease("tiny") as before:
        repository.load("tiny")
        with repository.lease("tiny") as after:
            assert after is not before
    assert is_closed(before)
    for change in (repository.load, repository.unload):
        with pytest.raises(NotFoundError, match="no model 'nothing'"):
            change("nothing")


def test_loading_what_is_bad(shelf, opened):
    bundle(shelf / "good", name="good")
    bad = bundle(shelf / "bad", name="bad")
    repository = opened(shelf)
    (bad / ONNX).write_bytes(b"changed")
    with pytest.raises(BundleError, match="sha256 differs"):
        repository.load("bad")
    assert version_of(repository, "bad") == "1"
    bundle(bad, name="bad", version="2")
    repository.load("bad")
    assert version_of(repository, "bad") == "2"


def test_links_to_releases(shelf, opened, tmp_path):
    releases = [bundle(tmp_path / f"release-{version}", version=version) for version in ("1", "2")]
    link = shelf / "current"
    link.symlink_to(releases[0])
    repository = opened(shelf)
    fresh = shelf / ".fresh"
    fresh.symlink_to(releases[1])
    fresh.replace(link)
    repository.refresh()
    with repository.lease() as engine:
        assert engine.bundle.directory == releases[1]


def test_watching(shelf, opened):
    bundle(shelf / "a")
    repository = opened(shelf)
    repository.watch(0.01)
    bundle(shelf / "b", version="2")
    deadline = time.monotonic() + 60
    while version_of(repository) != "2" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert version_of(repository) == "2"
