"""Hostile requests to the review application, made up from its table of routes and the types of its bodies."""

import json
import re
import string
import sys
from urllib.parse import quote

import msgspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, seed
from hypothesis import strategies as st
from starlette.testclient import TestClient

from avex_serve.page.assets import STATIC
from avex_serve.review import app
from avex_serve.review.app import Material, ScoredPool, make_app, make_routes
from avex_serve.review.book import Book
from avex_serve.review.pool import Pool, Sound
from avex_serve.review.retraining import Retraining
from tests.fuzz.test_fuzz import SEED, fuzzed

HOST = "127.0.0.1:8766"
EXAMPLES = 60  # of each route
SECRET = b"the content of a file that nobody reviews"
BODIES = {
    "/api/queue": app.QueueRequest,
    "/api/decide": app.DecisionRequest,
    "/api/undo": app.UndoRequest,
    "/api/scores": app.ScoresRequest,
    "/api/retraining/start": app.NoRequest,
    "/api/retraining/cancel": app.NoRequest,
}
CODE = (".py", ".pyc", ".so")  # modules that are imported on first use
OPENED = []  # paths that this process opens
sys.addaudithook(lambda event, values: OPENED.append(values[0]) if event == "open" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def material(folder):
    """A recording of 30 s, a report, and next to them a file that is no part of the review."""
    (folder / "secret.wav").write_bytes(SECRET)
    soundfile.write(folder / "dawn.wav", np.zeros(8000 * 30), 8000)
    (folder / "run").mkdir()
    (folder / "run" / "report.html").write_text("<p>report")
    starts = np.arange(10) * 3.0
    scores = np.linspace(0, 1, 10, dtype=np.float32)
    pool = Pool(
        [Sound(str(folder / "dawn.wav"), None, 30.0, ".")],
        ["wren"],
        np.zeros(10, np.int32),
        np.stack([starts, starts + 3], axis=1),
        [(None, scores)],
    )
    return Material(
        title="fuzz",
        scored=ScoredPool(pool),
        book=Book(folder / "run" / "reviews"),
        similar=lambda window: -np.abs(np.arange(10) - window),
        report=folder / "run" / "report.html",
        retraining=Retraining(folder / "run", (), "not here"),
    )


@pytest.fixture(scope="module")
def client(material):
    client = TestClient(make_app(material, "secret", [HOST]), base_url=f"http://{HOST}", follow_redirects=False)
    client.get("/?token=secret")
    return client


def hostile(folder):
    """Texts that name files, and others."""
    secret = str(folder / "secret.wav")
    paths = [secret, f"file://{secret}", "../secret.wav", "..\\secret.wav", "%2e%2e/secret.wav", "secret.wav\0.js"]
    paths += ["//etc/passwd", "C:\\secret.wav", "0", "-1", "1e999", "NaN", "after", "wren", "<script>", ""]
    return st.sampled_from(paths) | st.text(max_size=20)


def bodies(kind, texts):
    """Bodies of a type whose fields are of any type, and such that are of it but for their values."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda each: st.lists(each, max_size=3) | st.dictionaries(texts, each, max_size=3),
        max_leaves=5,
    )
    strings = ("annotator", "label", "strategy", "comment", "decision", "probe")
    fields = {each.name: texts if each.name in strings else anything for each in msgspec.structs.fields(kind)} or {
        "more": anything
    }
    decisions = st.sampled_from(["present", "unsure"]) | texts
    answers = st.fixed_dictionaries({"label": st.just("wren") | texts, "decision": decisions})
    valid = {
        "annotator": st.just("bo") | texts,
        "label": st.just("wren") | texts,
        "window": st.integers(-2, 12) | st.integers(),
        "answers": st.lists(answers, max_size=3),
    }
    nearly = {name: valid.get(name, strategy) for name, strategy in fields.items()}
    return st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries({}, optional=nearly) | anything


def requests(route, folder):
    """Path, query, headers and body of requests to a route."""
    texts = hostile(folder)
    clean = texts.map(lambda text: text.encode("utf-8", "replace").decode())
    quoted = clean.map(lambda text: quote(text, safe="/%.:"))
    paths = st.just(route.path)
    for name in route.param_convertors:
        pattern = re.compile(rf"\{{{name}(:\w+)?\}}")
        paths = st.tuples(paths, quoted | st.just("0")).map(
            lambda pair, pattern=pattern: pattern.sub(lambda _: pair[1], pair[0])
        )
    kind = BODIES.get(route.path)
    body = (
        st.none() if kind is None else bodies(kind, texts).map(lambda each: json.dumps(each).encode()) | st.binary()
    )
    ranges = st.sampled_from(["bytes=0-99", "bytes=-1", "bytes=9-1", "bytes=0-999999999999999999"]) | st.text(
        string.printable.strip(), max_size=20
    )
    query = st.dictionaries(
        st.sampled_from(["file", "start", "label", "name", "annotator", "agreed"]), clean, max_size=4
    )
    return st.tuples(paths, query, ranges, body)


@pytest.mark.parametrize("path", [route.path for route in make_routes(Material("", None, None))])
def test_no_request_does_harm(material, client, folder, path):
    (route,) = (each for each in make_routes(material) if each.path == path)
    (method,) = route.methods - {"HEAD"}
    bare = TestClient(make_app(material, "secret", [HOST]), base_url=f"http://{HOST}", follow_redirects=False)
    mine = {str(folder / "dawn.wav"), str(folder / "run")}

    @seed(SEED)
    @fuzzed(EXAMPLES)
    @given(request=requests(route, folder))
    def ask(request):
        address, query, span, body = request
        headers = {"Range": span, "Content-Type": "application/json"}
        options = {"params": query, "headers": headers, "content": body}
        OPENED.clear()
        answer = client.request(method, address, **options)
        named = [str(each) for each in OPENED if not isinstance(each, int) and not str(each).endswith(CODE)]
        assert answer.status_code < 500, answer.text
        assert SECRET not in answer.content
        assert not [each for each in named if not each.startswith((*mine, str(STATIC)))], named
        assert bare.request(method, address, **options).status_code == 403

    ask()
    assert [each.name for each in sorted(folder.iterdir())] == ["dawn.wav", "run", "secret.wav"]
    assert {each.suffix for each in (folder / "run").rglob("*") if each.is_file()} <= {".csv", ".html"}


def test_every_body_is_fuzzed(material):
    assert {route.path for route in make_routes(material) if "POST" in route.methods} == BODIES.keys()
