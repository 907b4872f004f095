"""Tables over HTTP have the bytes that `avex-serve run` and `tables` write for the same recording."""

import json

import numpy as np
import pytest
import soundfile

from avex_serve.cli import main
from avex_serve.service.http.forms import NAMES, TABLES
from tests.bundles import (
    FINGERPRINT,
    LABELS,
    change_manifest,
    make_backbone_bundle,
    make_embedding_bundle,
    make_probes_bundle,
)
from tests.service.conftest import running_server

NAME = "2MA05258_20240903_193130.wav"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A recording with a time in its name, a comma, and more than mono."""
    folder = tmp_path_factory.mktemp("season, first") / "north"
    folder.mkdir()
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, (13000, 2))
    soundfile.write(folder / NAME, wave, 22050)
    return folder / NAME


@pytest.fixture(scope="module")
def stores(tmp_path_factory, audio_bundle, recording):
    """The store of a run with these options of the cut."""
    made = {}

    def make(*cut):
        if cut not in made:
            made[cut] = tmp_path_factory.mktemp("store") / "out"
            assert main(["run", str(audio_bundle), str(recording), "--out", str(made[cut]), *cut]) == 0
        return made[cut]

    return make


def table(store, target, name, *options):
    assert main(["tables", str(store), "--format", name, "--output", str(target), *options]) == 0
    return (target / f"{NAME}.txt" if name == "audacity" else target).read_bytes()


@pytest.mark.parametrize("name", TABLES)
def test_the_bytes_of_each_format(audio_server, stores, recording, tmp_path, name):
    options = {"format": name, "file": str(recording)}
    answer = audio_server.post("/predict", content=recording.read_bytes(), params=options)
    assert answer.content == table(stores(), tmp_path / "table", name)
    assert answer.headers["content-type"].partition(";")[0] == TABLES[name].media_type
    assert answer.content.count(b"\n") > 1 or name in ("aoef", "parquet")


@pytest.mark.parametrize(
    ("cut", "chosen"),
    [
        ([], ["--threshold", "0.6", "--top-k", "1"]),
        (["--overlap", "0.04"], ["--label", LABELS[2], "--label", LABELS[0], "--top-k", "1"]),
        (["--hop", "0.03"], ["--merge", "0.01", "--merge-score", "mean"]),
        (["--final-clip", "extend"], ["--merge", "0", "--threshold", "0.4"]),
        (["--final-clip", "none", "--channel", "2"], ["--timezone", "Australia/Brisbane"]),
    ],
)
@pytest.mark.parametrize("name", ["csv", "aoef"])
def test_the_same_options_mean_the_same(audio_server, stores, recording, tmp_path, name, cut, chosen):
    pairs = zip([*cut, *chosen][::2], [*cut, *chosen][1::2], strict=True)
    options = [(option.removeprefix("--").replace("-", "_"), each) for option, each in pairs]
    options += [("format", name), ("file", str(recording))]
    answer = audio_server.post("/predict", content=recording.read_bytes(), params=options)
    assert answer.content == table(stores(*cut), tmp_path / "table", name, *chosen)


def test_a_head_that_reads_embeddings(tmp_path, recording):
    shelf = tmp_path / "shelf"
    bundles = make_backbone_bundle(shelf / "backbone"), make_embedding_bundle(shelf / "head", reads=FINGERPRINT)
    assert main(["run", *map(str, bundles), str(recording), "--out", str(tmp_path / "out")]) == 0
    options = {"format": "aoef", "file": str(recording), "model": "tiny-offline"}
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(shelf)) as server:
        answer = server.post("/predict", content=recording.read_bytes(), params=options)
    assert answer.content == table(tmp_path / "out", tmp_path / "table", "aoef")


def test_a_head_that_is_a_version_of_the_bundle_that_it_reads(tmp_path, recording):
    shelf = tmp_path / "shelf"
    make_probes_bundle(shelf / "frogs" / "1", "frogs")
    head = make_embedding_bundle(shelf / "frogs" / "2", "frogs", reads=FINGERPRINT)
    change_manifest(head, version="2")
    with running_server(tmp_path / "server", AVEX_BUNDLE=str(shelf)) as server:
        for version in ("1", "2"):
            asked = {"format": "aoef", "model": "frogs", "version": version}
            described = {"name": NAME, "digest": "0" * 64, "duration": 1, "labels": [LABELS[0]]}
            columns = {"label": [0], "start": [0], "end": [0.1], "score": [0.9]}
            for answer in (
                server.post("/predict", content=recording.read_bytes(), params={**asked, "top_k": 1}),
                server.post("/tables", json={**asked, "recordings": [{**described, **columns}]}),
            ):
                (results,) = json.loads(answer.json()["data"]["description"])["results"]
                assert (results["bundle"], results["version"]) == ("frogs", version)


@pytest.mark.parametrize(
    ("accept", "name"),
    [
        ("text/csv", "csv"),
        ("text/tab-separated-values", "raven"),
        ("application/json;q=0.5, text/csv", "csv"),
        ("application/vnd.apache.parquet", "parquet"),
    ],
)
def test_a_table_by_accept(audio_server, wav, accept, name):
    answer = audio_server.post("/predict", content=wav, headers={"Accept": accept})
    assert answer.content == audio_server.post("/predict", content=wav, params={"format": name}).content
    assert answer.headers["content-type"].partition(";")[0] == TABLES[name].media_type


def test_the_name_of_the_recording(audio_server, wav):
    def files(**arguments):
        rows = audio_server.post("/predict", **arguments, headers={"Accept": "text/csv"}).text.splitlines()[1:]
        return {row.partition(",")[0] for row in rows}

    assert files(content=wav) == {"recording"}
    assert files(files={"audio": ("dawn.wav", wav)}) == {"dawn.wav"}
    assert files(files={"audio": ("dawn.wav", wav)}, data={"file": "/season/dusk.wav"}) == {"/season/dusk.wav"}


def test_a_bare_name_in_formats_with_folders(audio_server, wav):
    options = {"format": "kaleidoscope", "file": "dawn.wav", "top_k": 1}
    _, row, *_ = audio_server.post("/predict", content=wav, params=options).text.splitlines()
    assert row.startswith(",,dawn.wav,0.000,")


def test_times_of_the_name(audio_server, recording):
    options = {"format": "csv", "file": NAME, "timezone": "+10:00", "top_k": 1}
    _, row, *_ = audio_server.post("/predict", content=recording.read_bytes(), params=options).text.splitlines()
    assert "2024-09-03T19:31:30.000+10:00" in row


def test_warnings_of_a_table_are_in_a_header(audio_server, wav):
    answer = audio_server.post("/predict", content=wav[: len(wav) // 2], params={"format": "raven"})
    assert "ends" in json.loads(answer.headers["avex-warnings"])[0]
    assert "avex-warnings" not in audio_server.post("/predict", content=wav, params={"format": "raven"}).headers


@pytest.mark.parametrize("name", ["xlsx", "camtrap-dp", "CSV", "json,csv"])
def test_an_unknown_format(audio_server, wav, name):
    answer = audio_server.post("/predict", content=wav, params={"format": name})
    assert answer.status_code == 400
    assert all(each in answer.json()["error"] for each in (repr(name), *NAMES))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([("format", "csv"), ("format", "csv")], "format is given more than once"),
        ([("format", "csv"), ("timezone", "Mars")], "timezone"),
        ([("format", "csv"), ("file", "a" * 5000)], "4096"),
        ([("format", "csv"), ("merge", "-1")], "gap"),
        ([("format", "csv"), ("merge_score", "median")], "expected max, mean"),
        ([("format", "csv"), ("hop", "5")], "hop is 5"),
        ([("format", "csv"), ("hop", "0.1"), ("overlap", "0.1")], "one of them"),
    ],
)
def test_options_that_can_not_be(audio_server, wav, options, reason):
    answer = audio_server.post("/predict", content=wav, params=options)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
