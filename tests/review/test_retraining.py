"""From decisions about a run to another head: `avex-serve retrain`, and the same from the review page."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import time

import httpx
import numpy as np
import pandas as pd
import pytest
import soundfile
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score

from avex_serve.annotations.reviews import COLUMNS
from avex_serve.archive.store import Store
from avex_serve.cli import main
from avex_serve.errors import UnsupportedError
from avex_serve.inference.backend import open_bundle
from avex_serve.review.pool import Queue
from avex_serve.review.sources import list_probes, read_pool, read_scores
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_clip
from avex_serve.training.embed import known_outputs
from tests.browsing import check_accessible, opened
from tests.review.test_command import reviewing

LABELS = ("buzz", "trill")
ALL = ("buzz", "hoot", "trill")  # with those of other recordings
RATE = 16000
EACH = 11  # recordings of a label


@pytest.fixture(scope="module")
def season(tmp_path_factory):
    """A run of the demo bundle with embeddings, and decisions about both labels in all of its windows."""
    folder = tmp_path_factory.mktemp("season")
    rng = np.random.default_rng(0)
    truth = {}
    for i in range(2 * EACH):
        path = folder / "recordings" / f"site {i % 2}" / f"{i:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        label = LABELS[i // EACH]
        soundfile.write(path, np.concatenate([make_clip(rng, [label], snr_db=10) for _ in range(2)]), RATE)
        truth[str(path)] = label
    store = folder / "run"
    assert main(["run", str(DEMO_BUNDLE), str(folder / "recordings"), "--out", str(store), "--embeddings"]) == 0
    pool, _ = read_pool(Store(store))
    rows = [
        (path, *pool.spans[window].round(9), label, "present" if truth[path] == label else "absent", "bo", "", "")
        for window, path in enumerate(pool.sounds[place].path for place in pool.recording)
        for label in LABELS
    ]
    (store / "reviews").mkdir()
    with (store / "reviews" / "bo.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return store


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Labelled recordings that are not in the run, such as those that trained the first head."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(1)
    (folder / "hoot").mkdir()
    for i in range(EACH):
        soundfile.write(folder / "hoot" / f"{i}.wav", make_clip(rng, ["hoot"], snr_db=10), RATE)
    return folder


@pytest.fixture(scope="module")
def retrained(season, cache, labels, tmp_path_factory):
    """The same run after the command, and what it said."""
    store = shutil.copytree(season, tmp_path_factory.mktemp("retrained") / "run")
    arguments = [store, "--model", "avex_demo", "--labels", labels, "--cache", cache]
    command = [sys.executable, "-m", "avex_serve", "retrain", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "embedded 11 of 11 recordings" in done.stderr, "those of the run are stored"
    assert "retrained-1; review its scores by" in done.stdout
    return store


def test_the_head_is_that_of_fit_on_the_recordings(retrained, season, cache, labels, tmp_path):
    fit = ["fit", season / "reviews", labels, "--output", tmp_path / "retrained-1", "--cache", tmp_path / "empty"]
    shutil.copytree(cache / "bundles", tmp_path / "empty" / "bundles")
    assert main([str(each) for each in fit]) == 0
    folders = (retrained / "retrained" / "retrained-1", tmp_path / "retrained-1")
    heads = [load_file(folder / "model.safetensors") for folder in folders]
    assert heads[0].keys() == heads[1].keys()
    for name, expected in heads[1].items():  # two graphs made the embeddings: the run's, and that of fit
        np.testing.assert_allclose(heads[0][name], expected, rtol=1e-3, atol=1e-4)
    rows = [pd.read_parquet(folder / "evaluation.parquet") for folder in folders]
    keys = ["recording", "start", "end", "label", "target"]
    assert rows[0][keys].equals(rows[1][keys])
    assert rows[0]["logit"].to_numpy() == pytest.approx(rows[1]["logit"].to_numpy(), abs=1e-2)


def test_the_head_before_is_judged_by_its_stored_scores(retrained):
    folder = retrained / "retrained" / "retrained-1"
    before = pd.read_parquet(folder / "before" / "evaluation.parquet")
    after = pd.read_parquet(folder / "evaluation.parquet")
    keys = ["recording", "start", "label"]
    in_run = {entry.recording for entry in Store(retrained).journal().values()}
    assert not set(after["recording"]) <= in_run
    after = after[after["recording"].isin(in_run)].reset_index(drop=True)
    assert before[keys].equals(after[keys])
    assert before["target"].equals(after["target"])
    stored = pd.concat(pd.read_parquet(path) for path in retrained.glob("scores/*/*/*.parquet"))
    stored = stored[stored["probe"] != "retrained-1"]
    both = before.merge(stored, on=keys, validate="one_to_one")
    assert len(both) == len(before)
    comparison = pd.read_json(folder / "comparison.json", typ="series")
    assert comparison["labels"]["hoot"]["average_precision"]["a"] is None, "nothing is known of it in the run"
    for label, rows in both.dropna(subset="target").groupby("label"):
        expected = average_precision_score(rows["target"], rows["score"])
        assert comparison["labels"][label]["average_precision"]["a"] == pytest.approx(expected)


def test_what_a_retrained_head_was_trained_on_is_known_when_it_is_the_one_before(retrained, cache, tmp_path):
    store = shutil.copytree(retrained, tmp_path / "run")
    command = ["retrain", store, "--model", "avex_demo", "--probe", "retrained-1", "--cache", cache]
    assert main([*map(str, command)]) == 0
    first, second = (store / "retrained" / f"retrained-{i}" for i in (1, 2))
    evaluated = set(pd.read_parquet(second / "before" / "evaluation.parquet")["recording"])
    known = evaluated & set((first / "trained_on.txt").read_text().split())
    assert known == evaluated, "with so few recordings each is left out once, and all train the head that is kept"
    report = pd.read_json(second / "before" / "evaluation.json", typ="series")
    assert report["trained_on"] == len(known)
    (note,) = [each for each in pd.read_json(second / "comparison.json", typ="series")["notes"] if "trained" in each]
    assert f"{len(known)} of {len(evaluated)} recordings trained this head" in note


def test_the_run_has_the_scores_of_the_new_head(retrained):
    store = Store(retrained)
    pool, results = read_pool(store)
    (_, first), (new, probe) = list_probes(store, results)
    assert (first.name != probe.name, probe.name, probe.labels) == (True, "retrained-1", ALL)
    scored = read_scores(store, pool, new, probe)
    other, _ = read_pool(store, "retrained-1")
    for place in range(len(ALL)):
        windows, scores = scored.select(place, Queue())
        expected, values = other.select(place, Queue())
        assert np.array_equal(windows, expected)
        assert np.array_equal(scores, values)


@pytest.mark.parametrize("page", [False, True], ids=["command", "page"])
def test_labels_are_read_with_the_options_of_fit(page, season, cache, labels, tmp_path, monkeypatch):
    table = tmp_path / "calls.csv"
    owls = sorted((labels / "hoot").iterdir())
    half = tmp_path / "half.wav"  # nothing is annotated in its second window
    soundfile.write(half, np.concatenate([soundfile.read(owls[0])[0][::-1], np.zeros(2 * RATE)]), RATE)
    rows = [f"{path},0.1,1.9,{path.stem},owl" for path in (*owls, half)]
    table.write_text("\n".join(["file,start,end,label,species", *rows]) + "\n")
    options = ["--labels", table, "--label-column", "species", "--negative", "buzz", "--fully-annotated"]
    store = shutil.copytree(season, tmp_path / "run")
    if page:
        monkeypatch.setenv("HOME", str(tmp_path))
        shutil.copytree(cache / "bundles", tmp_path / ".cache" / "avex-serve" / "bundles")
        with reviewing(store, "--model", "avex_demo", *options) as address, httpx.Client(timeout=300) as client:
            retraining = f"{address.partition('?')[0]}api/retraining"
            assert client.get(address).status_code == 303
            assert client.post(f"{retraining}/start", json={}).status_code == 200
            while (state := client.get(retraining).json())["running"]:
                time.sleep(0.2)
            assert state["error"] is None
    else:
        assert (
            main([str(each) for each in ("retrain", store, "--model", "avex_demo", "--cache", cache, *options)]) == 0
        )
    head = store / "retrained" / "retrained-1"
    assert json.loads((head / "evaluation.json").read_text())["labels"].keys() == {"owl", "trill"}
    rows = pd.read_parquet(head / "evaluation.parquet")
    digest = hashlib.sha256(half.read_bytes()).hexdigest()
    assert rows[(rows["recording"] == digest) & (rows["label"] == "owl")]["target"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "avex_demo", "--variant", "nothing"], "no probe 'nothing'"),
        (["--model", "eagle"], "--model eagle"),
        (["--model", "avex_demo", "--reviews", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "avex_demo", "--probe", "eagle"], "has no scores of a probe 'eagle'"),
    ],
)
def test_what_cannot_be_retrained(season, cache, capsys, arguments, reason):
    assert main(["retrain", str(season), "--cache", str(cache), *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not (season / "retrained" / "retrained-1").exists()


def test_an_interruption_leaves_no_half_of_a_head(season, cache, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("avex_serve.training.retrain.run_exporter", interrupted)
    assert main(["retrain", str(season), "--model", "avex_demo", "--cache", str(cache)]) == 130
    assert not list((season / "retrained").glob("*"))


def test_embeddings_of_another_backbone_are_refused(archive, bundles, command, tmp_path):
    command("run", bundles["plain"], archive / "dawn.wav", "--out", tmp_path / "run", "--embeddings")
    with open_bundle(DEMO_BUNDLE, "cpu") as engine, pytest.raises(UnsupportedError, match="run it again"):
        known_outputs(Store(tmp_path / "run"), engine, ["embedding"], 0.0)


def test_from_the_page(browser, season, retrained, tmp_path, monkeypatch, cache):
    store = shutil.copytree(season, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(cache / "bundles", tmp_path / ".cache" / "avex-serve" / "bundles")
    with reviewing(store, "--model", "avex_demo") as address, opened(browser) as page:
        page.goto(f"{address}&annotator=bo&skip=none")
        page.click("text=Retrain and rescore")
        page.click("text=Cancel")
        page.wait_for_selector("text=Cancelled.")
        assert not (store / "retrained" / "retrained-1").exists()
        page.click("text=Retrain and rescore")
        page.wait_for_selector("text=Cancel")
        texts = (
            "Done: retrained-1 is trained",
            "Report of retrained-1",
        )  # a head that is not whole is not described
        shown = page.inner_text("body")  # read once: two readings may have the change between them
        while not all(found := [text in shown for text in texts]):
            assert not any(found), shown
            page.wait_for_timeout(100)
            shown = page.inner_text("body")
        check_accessible(page)
        table = page.text_content("table:has(caption:has-text('Average precision'))")
        assert all(label in table for label in (*LABELS, "mean of labels"))
        for name in ("Report of retrained-1", "Report of the head before retrained-1"):
            with page.expect_popup() as popup:
                page.click(f"text={name}")
            report = popup.value
            assert report.text_content("h1").startswith("Evaluation of")
            assert report.evaluate("[...document.images].every((each) => each.naturalWidth > 0)")
            report.set_viewport_size({"width": 1200, "height": 800})
            tables = "[...document.querySelectorAll('.wide')]"
            assert report.evaluate(f"{tables}.every((each) => each.scrollWidth <= each.clientWidth)")
            assert report.evaluate("document.styleSheets[0].cssRules.length > 0")
            check_accessible(report)
            report.close()
        page.click("text=Review the scores of retrained-1")
        page.wait_for_selector("label:has-text('Scores of')")
        assert page.input_value("label:has-text('Scores of') select") == "retrained-1"
        labels = page.query_selector_all("label:has-text('Label') select option")
        assert [each.text_content() for each in labels] == list(LABELS)


def test_the_densities_are_those_of_the_command(season, tmp_path):
    assert main(["density", str(season), str(season / "reviews"), "--output", str(tmp_path / "density.csv")]) == 0
    with reviewing(season) as address, httpx.Client(follow_redirects=True) as client:
        base = address.partition("?")[0]
        client.get(address)
        expected = (tmp_path / "density.csv").read_text()
        assert client.get(f"{base}api/densities.csv").text == expected
        shown = client.get(f"{base}api/label", params={"name": "buzz"}).json()["density"]
        rows = [line.split(",") for line in expected.splitlines() if line.startswith("buzz,")]
        found = [("(all)", shown), *((each["site"], each) for each in shown["sites"])]
        assert [[name, *(f"{each[key]:.6g}" for key in ("value", "low", "high"))] for name, each in found] == [
            row[1:5] for row in rows
        ]
        assert len(rows) == 3


def test_the_page_says_what_is_missing(season):
    with reviewing(season) as address, httpx.Client(follow_redirects=True) as client:
        base = address.partition("?")[0]
        client.get(address)
        assert "--model" in client.get(f"{base}api/retraining").json()["missing"]
        refused = client.post(f"{base}api/retraining/start", json={})
        assert (refused.status_code, refused.json()["error"]) == (
            400,
            client.get(f"{base}api/retraining").json()["missing"],
        )
