"""`avex-serve review RUN_DIR` as a process: from a run to labels that the other commands read."""

import csv
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from avex_serve.cli import main
from avex_serve.training.dataset import read_dataset
from tests.archive.test_report import Page
from tests.browsing import opened
from tests.bundles import LABELS, calibrated_copy


@contextmanager
def reviewing(*arguments):
    """The address that the command prints; it ends by Ctrl-C without an error."""
    command = [sys.executable, "-m", "avex_serve", "review", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\S+", process.stdout.readline())[0]
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_from_a_run_to_labels(archive, bundles, command, tmp_path):
    store = tmp_path / "run"
    command("run", bundles["plain"], archive, "--out", store, "--embeddings", "--threshold", "0")
    command("report", store, "--threshold", "0", "--examples", "1")
    link = next(
        attributes["href"]
        for attributes, _ in Page((store / "report.html").read_text()).all("a")
        if "href" in attributes
    )
    assert link.startswith("http://127.0.0.1:8766/?")
    named = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
    with reviewing(store) as address, httpx.Client(follow_redirects=True) as client:
        base = address.partition("?")[0]
        assert client.get(address).status_code == 200
        start = client.get(f"{base}api/start").json()
        assert start["title"] == "run"
        assert "nearest" in start["strategies"]
        item = client.get(f"{base}api/item", params=named).json()
        assert (item["file"], item["label"]) == (named["file"], named["label"])
        wanted = {"annotator": "bo", "label": named["label"], "strategy": "nearest", "example": item["window"]}
        items = client.post(f"{base}api/queue", json=wanted).json()["items"]
        assert items[0]["window"] == item["window"]
        for each, decision in zip(items, ("present", "absent"), strict=False):
            answers = [{"label": each["label"], "decision": decision}]
            body = {"annotator": "bo", "window": each["window"], "answers": answers}
            assert client.post(f"{base}api/decide", json=body).json() == {"saved": 1}
        sound = client.get(f"{base}api/recordings/{item['recording']}.wav", headers={"Range": "bytes=0-43"})
        assert sound.content[:4] == b"RIFF"
    dataset = read_dataset(store / "reviews")
    assert dataset.labels == (named["label"],)


def test_probabilities_of_a_calibrated_bundle(archive, bundles, browser, command, tmp_path):
    bundle = calibrated_copy(bundles["plain"], tmp_path / "calibrated")
    command("run", bundle, archive, "--out", tmp_path / "run", "--threshold", "0", "--format", "csv")
    with (tmp_path / "run" / "tables" / "detections.csv").open(newline="") as file:
        rows = {
            (row["file"], round(float(row["start"]), 3), row["label"]): row["probability"]
            for row in csv.DictReader(file)
        }
    with (
        reviewing(tmp_path / "run") as address,
        httpx.Client(follow_redirects=True) as client,
        opened(browser) as page,
    ):
        base = address.partition("?")[0]
        client.get(address)
        for label in LABELS:
            items = client.post(f"{base}api/queue", json={"annotator": "bo", "label": label}).json()["items"]
            assert items
            for each in items:
                known = rows[each["file"], round(each["start"], 3), label]
                assert each["probability"] == (pytest.approx(float(known), abs=1e-6) if known else None)
            page.goto(f"{address}&annotator=bo&label={label}")
            page.locator(".facts", has_text="score").wait_for()
            first = items[0]["probability"]
            shown = "" if first is None else f" · probability {first:.3f}"
            assert f"score {items[0]['score']:.3f}{shown} · " in page.text_content(".facts")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "expected either RUN_DIR or --table FILE"),
        (["nowhere"], "holds no store.json"),
        (["--table", "nowhere.csv"], "nowhere.csv: no such file"),
        (["run", "--target-precision", "1"], "expected more than 0 and less than 1"),
        (["run", "--port", "70000"], "port 70000 can't be used"),
        (["run", "--probe", "eagle"], "expected one of linear"),
    ],
)
def test_errors(archive, bundles, command, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    command("run", bundles["plain"], archive / "dawn.wav", "--out", "run")
    assert main(["review", *arguments]) == 2
    assert reason in capsys.readouterr().err
