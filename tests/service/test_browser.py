"""The page of docs/browser.html asks a service of another origin, in chromium."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
import yaml

from tests.browsing import opened
from tests.service.conftest import running_server

DOCS = Path(__file__).parents[2] / "docs"
KEY = "browser-key"


@pytest.fixture(scope="module")
def pages():
    """The address of a server of the folder of the page."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=DOCS)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_page_asks_and_is_refused_from_elsewhere(browser, pages, tmp_path, audio_bundle, wav):
    text = (DOCS / "securing.md").read_text()
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    cors = config["services"]["AvexService"]["http"]["cors"]
    cors["access_control_allow_origins"] = [pages]
    (tmp_path / "cors.yaml").write_text(yaml.safe_dump(config))
    recording = {"name": "recording.wav", "mimeType": "audio/wav", "buffer": wav}
    variables = {"AVEX_BUNDLE": str(audio_bundle), "AVEX_API_KEYS": f"page:{KEY}"}
    refused = ("401", "CORS policy", "ERR_FAILED", "404")  # 404: it has no icon
    with (
        running_server(tmp_path, BENTOML_CONFIG=str(tmp_path / "cors.yaml"), **variables) as server,
        opened(browser, expected=refused) as page,
    ):

        def ask(origin, key):
            page.goto(f"{origin}/browser.html")
            page.fill("#service", server.url)
            page.fill("#key", key)
            page.set_input_files("#recording", recording)
            page.click("button")
            page.wait_for_function("document.getElementById('answer').textContent")
            return page.text_content("#answer")

        assert ask(pages, KEY).startswith("0.0 s  ")
        assert "send one of the keys of this service" in ask(pages, "wrong")
        elsewhere = pages.replace("127.0.0.1", "localhost")
        assert f"does it allow {elsewhere}?" in ask(elsewhere, KEY)
