"""The review application by HTTP: queue, decisions, recordings; and what it refuses."""

import io
import json
from datetime import datetime, timedelta

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from avex_serve.annotations.reviews import read_reviews
from avex_serve.archive.report import REVIEW
from avex_serve.errors import NotFoundError
from avex_serve.page.assets import POLICY
from avex_serve.review.app import Material, ScoredPool, make_app
from avex_serve.review.book import Book
from avex_serve.review.pool import Pool, Queue, Sound

RATE = 22050
HOSTS = ["127.0.0.1:8766", "localhost:8766"]
HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture
def material(tmp_path):
    """Three recordings of 30 s in windows of 3 s; one of them is missing."""
    rng = np.random.default_rng(0)
    sounds = []
    for i, name in enumerate(("dawn.wav", f"{HOSTILE.replace('/', '')}.flac", "gone.wav")):
        path = tmp_path / "recordings" / f"site {i % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "gone.wav":
            soundfile.write(path, rng.uniform(-0.5, 0.5, 30 * RATE), RATE)
        start = datetime(2026, 4, 1, 5) + timedelta(days=i)
        sounds.append(Sound(str(path), start, 30.0, path.parent.name))
    starts = np.tile(np.arange(10) * 3.0, 3)
    scores = rng.random((30, 2)).astype(np.float32)
    pool = Pool(
        sounds,
        ["wren", HOSTILE],
        np.repeat(np.arange(3, dtype=np.int32), 10),
        np.stack([starts, starts + 3], axis=1),
        [(None, scores[:, 0]), (None, scores[:, 1])],
    )
    return Material(
        title="season",
        scored=ScoredPool(pool),
        book=Book(tmp_path / "reviews"),
        similar=lambda window: -np.abs(np.arange(30) - window),
    )


@pytest.fixture
def client(material):
    client = TestClient(make_app(material, "secret", HOSTS), base_url=f"http://{HOSTS[0]}")
    assert client.get("/?token=secret").status_code == 200
    return client


def post(client, path, **body):
    return client.post(f"/api/{path}", json=body)


def queue(client, **wanted):
    answer = post(client, "queue", **{"annotator": "bo", "label": "wren", **wanted})
    assert answer.status_code == 200, answer.text
    return answer.json()


def decide(client, window, decision="present", label="wren", annotator="bo", **more):
    body = {"annotator": annotator, "window": window, "answers": [{"label": label, "decision": decision}], **more}
    assert post(client, "decide", **body).json() == {"saved": 1}


def test_the_token_opens_it(material):
    client = TestClient(make_app(material, "secret", HOSTS), base_url=f"http://{HOSTS[0]}", follow_redirects=False)
    for path in ("/", "/api/start", "/api/recordings/0.wav", "/page/page.css", "/?token=wrong", "/?token="):
        assert client.get(path).status_code == 403
    answer = client.get("/?token=secret&label=wren&start=3")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?label=wren&start=3")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "127.0.0.1:9999"}, {"origin": "http://evil.example"}, {"origin": "null"}],
)
def test_other_sites_are_refused(client, headers):
    assert client.get("/api/start", headers=headers).status_code == 403
    assert client.post("/api/undo", json={"annotator": "bo"}, headers=headers).status_code == 403


def test_every_answer_has_the_policy(client):
    for path in (
        "/",
        "/api/start",
        "/api/recordings/99.wav",
        "/nowhere",
        "/page/review/main.js",
        "/api/reviews.csv",
    ):
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_there_is(client):
    start = client.get("/api/start").json()
    assert start["labels"] == ["wren", HOSTILE]
    assert start["dates"] == ["2026-04-01", "2026-04-03"]
    assert start["sites"] == ["site 0", "site 1"]
    assert (start["windows"], start["recordings"], start["annotators"]) == (30, 3, [])


def test_a_queue_is_that_of_the_pool(client, material):
    found = queue(client, strategy="margin", lowest=0.2, sites=["site 0"], hours=[4, 6], last="2026-04-01", count=4)
    windows, scores = material.scored.pool.select(
        0, Queue(strategy="margin", lowest=0.2, sites=["site 0"], last=datetime(2026, 4, 1).date())
    )
    assert found["total"] == windows.size
    assert [item["window"] for item in found["items"]] == windows[:4].tolist()
    assert [item["score"] for item in found["items"]] == pytest.approx(scores[:4].tolist())
    first = found["items"][0]
    sound = material.scored.pool.sounds[first["recording"]]
    assert (first["file"], first["site"], first["end"] - first["start"]) == (sound.path, sound.site, 3)
    assert first["time"] == str(sound.start + timedelta(seconds=first["start"]))


def test_windows_like_another(client):
    assert [item["window"] for item in queue(client, strategy="nearest", example=7, count=3)["items"]] == [7, 6, 8]


def test_decisions_are_written_and_left_out(client, material):
    first, second = (item["window"] for item in queue(client)["items"][:2])
    decide(client, first)
    decide(client, second, "absent", comment="a cricket")
    assert {first, second}.isdisjoint(item["window"] for item in queue(client)["items"])
    assert queue(client, skip="none")["items"][1]["decisions"] == [
        {"label": "wren", "decision": "absent", "comment": "a cricket"}
    ]
    assert [(review.decision, review.comment) for review in read_reviews(material.book.folder)] == [
        ("present", ""),
        ("absent", "a cricket"),
    ]
    table = client.get("/api/reviews.csv").text.splitlines()
    assert len(table) == 3
    assert client.get("/api/counts").json()["labels"]["wren"]["present"] == 1


def test_two_annotators(client):
    windows = [item["window"] for item in queue(client)["items"][:4]]
    for window, decision in zip(windows, ("present", "present", "absent", "absent"), strict=True):
        decide(client, window, decision, annotator="al")
    for window in windows[:3]:
        decide(client, window)
    assert queue(client, annotator="al", skip="new")["items"] == []
    assert [item["window"] for item in queue(client, skip="new")["items"]] == [windows[3]]
    assert queue(client, annotator="cy", skip="all")["total"] == 30 - 4
    (kappa,) = client.get("/api/counts").json()["agreement"]
    assert (kappa["windows"], kappa["agreeing"]) == (3, 2)
    agreed = client.get("/api/reviews.csv?agreed").text.splitlines()[1:]
    assert sorted(line.split(",")[-4] for line in agreed) == ["absent", "present", "present", "unsure"]


def test_another_label_and_undo(client, material):
    window = queue(client)["items"][0]["window"]
    answers = [{"label": "wren", "decision": "absent"}, {"label": "robin", "decision": "present"}]
    assert post(client, "decide", annotator="bo", window=window, answers=answers).json() == {"saved": 2}
    undone = post(client, "undo", annotator="bo").json()
    assert (undone["item"]["window"], undone["item"]["label"], undone["item"]["decisions"]) == (window, "wren", [])
    assert [each["label"] for each in undone["withdrawn"]] == ["wren", "robin"]
    assert post(client, "undo", annotator="bo").json() == {"item": None, "withdrawn": []}
    assert read_reviews(material.book.folder) == []


def test_a_link_of_a_report_finds_its_window(client, material):
    path = material.scored.pool.sounds[0].path
    item = client.get("/api/item", params={"file": path, "start": "6.5", "label": "wren", "annotator": "bo"}).json()
    assert (item["file"], item["start"], item["label"]) == (path, 6, "wren")
    for name, value in (
        ("file", "/etc/passwd"),
        ("start", "99"),
        ("start", "x"),
        ("start", "nan"),
        ("label", "eagle"),
    ):
        answer = client.get("/api/item", params={"file": path, "start": "6.5", "label": "wren", name: value})
        assert answer.status_code in (400, 404)


@pytest.mark.parametrize("number", [0, 1])
def test_recordings_are_sent_in_stretches(client, material, number):
    address = f"/api/recordings/{number}.wav"
    size = 44 + 2 * 30 * RATE
    whole = b""
    while len(whole) < size:
        last = min(len(whole) + 400_000, size) - 1
        answer = client.get(address, headers={"Range": f"bytes={len(whole)}-{last}"})
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {len(whole)}-{last}/{size}"
        whole += answer.content
    samples, rate = soundfile.read(io.BytesIO(whole), dtype="int16")
    expected, _ = soundfile.read(material.scored.pool.sounds[number].path, dtype="int16")
    assert rate == RATE
    assert np.abs(samples.astype(int) - expected).max() <= 1


def test_recordings_that_cannot_be_sent(client):
    assert client.get("/api/recordings/0.wav").status_code == 400
    assert client.get("/api/recordings/0.wav", headers={"Range": "bytes=9999999999-"}).status_code in (400, 416)
    gone = client.get("/api/recordings/2.wav", headers={"Range": "bytes=0-1"})
    assert gone.status_code == 404
    assert "gone.wav" in gone.json()["error"]
    for path in (
        "3.wav",
        "-1.wav",
        "99999999999999999999.wav",
        "9" * 5000 + ".wav",
        "../app.py",
        "%2e%2e%2fapp.py",
        "0.wav/../../../etc/passwd",
    ):
        assert client.get(f"/api/recordings/{path}", headers={"Range": "bytes=0-1"}).status_code == 404
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/nothing.js"):
        assert client.get(path).status_code == 404


def test_the_report_of_the_run_leads_here_on_any_port(client, material, tmp_path):
    assert client.get("/report").status_code == 404
    assert client.get("/api/start").json()["report"] is False
    material.report = tmp_path / "report.html"
    assert client.get("/report").status_code == 404
    material.report.write_text(
        f'<style>p {{}}</style><a href="{REVIEW}file=x&amp;start=3">{REVIEW}</a><script>1</script>'
    )
    answer = client.get("/report")
    assert '<a href="/?file=x&amp;start=3">' in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy
    assert "script" not in policy, "scripts in it don't run"


def test_the_same_windows_with_other_scores(client, material):
    pool = material.scored.pool
    scores = np.arange(30, dtype=np.float32)
    seen = np.arange(0, 30, 2)  # the other head has scores of every other window

    def rescore(name):
        if name != "new":
            raise NotFoundError(f"no scores of {name!r}")
        return ScoredPool(pool.with_scores(["robin"], [(seen, scores[seen])], 0.0), "logits", "new")

    material.rescore, material.probes = rescore, lambda: ["old", "new"]
    assert client.get("/api/start").json()["probes"] == ["old", "new"]
    first = queue(client, count=1)["items"][0]
    assert post(client, "scores", probe="older").status_code == 404
    assert post(client, "scores", probe="new").json() == {"probe": "new"}
    start = client.get("/api/start").json()
    assert (start["labels"], start["probe"], start["scale"]) == (["robin"], "new", "logits")
    found = queue(client, label="robin")
    assert [item["window"] for item in found["items"]] == seen[::-1].tolist()
    decide(client, first["window"], label="robin")
    (decided,) = material.book.reviews
    assert (decided.file, decided.start) == (first["file"], first["start"]), "windows keep their numbers"
    assert post(client, "queue", annotator="bo", label="wren").status_code == 404


def test_tables_cannot_be_retrained_on(client):
    decide(client, 0)
    assert post(client, "scores", probe="new").status_code == 404
    state = client.get("/api/retraining").json()
    assert (state["running"], state["heads"]) == (False, [])
    assert post(client, "retraining/start").json() == {"error": state["missing"]}
    assert "avex-serve run" in state["missing"]
    assert post(client, "retraining/cancel").status_code == 200
    for path in ("/retrained/1/after", "/retrained/0/before", "/retrained/1/other", "/retrained/-1/after"):
        assert client.get(path).status_code == 404


def test_nothing_is_retrained_before_a_decision(client):
    assert "nothing is decided yet" in post(client, "retraining/start").json()["error"]


WANTED = {"annotator": "bo", "label": "wren"}
DECISION = {"annotator": "bo", "window": 0, "answers": [{"label": "wren", "decision": "present"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("queue", {}),
        ("queue", {**WANTED, "label": "eagle"}),
        ("queue", {**WANTED, "annotator": "../bo"}),
        ("queue", {**WANTED, "strategy": "best"}),
        ("queue", {**WANTED, "strategy": "nearest"}),
        ("queue", {**WANTED, "seed": -1}),
        ("queue", {**WANTED, "seed": 1e99}),
        ("queue", {**WANTED, "lowest": "x"}),
        ("queue", {**WANTED, "lowest": 1, "highest": 0}),
        ("queue", {**WANTED, "hours": [1, 2, 3]}),
        ("queue", {**WANTED, "first": "2026-13-01"}),
        ("queue", {**WANTED, "example": -1}),
        ("queue", {**WANTED, "example": 30}),
        ("queue", {**WANTED, "count": 0}),
        ("queue", {**WANTED, "unknown": 0}),
        ("queue", []),
        ("decide", {**DECISION, "window": -1}),
        ("decide", {**DECISION, "window": 2**70}),
        ("decide", {**DECISION, "answers": []}),
        ("decide", {**DECISION, "answers": [{"label": "", "decision": "present"}]}),
        ("decide", {**DECISION, "answers": [{"label": "wren", "decision": ""}]}),
        ("decide", {**DECISION, "annotator": ""}),
        ("decide", {**DECISION, "comment": "x" * 1001}),
        ("undo", {"annotator": 3}),
        ("undo", {"annotator": "a/b"}),
    ],
)
def test_bodies_that_are_refused(client, material, path, body):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]
    assert not material.book.folder.exists()


def test_bodies_that_are_no_json(client):
    for content, kind, status in (
        (b"{", "application/json", 400),
        (b"\xff", "application/json", 400),
        (json.dumps(WANTED).encode(), "text/plain", 400),
        (b" " * 2**17, "application/json", 413),
    ):
        assert client.post("/api/queue", content=content, headers={"content-type": kind}).status_code == status
    assert client.get("/api/queue").status_code == 405
