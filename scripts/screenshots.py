"""Take pictures of the pages for docs/: serve the demo bundle, use the page in chromium, and photograph each view.

``python -m scripts.screenshots`` writes JPEG files into ``docs/pictures``. It needs playwright and chromium, as the
tests of the pages do.
"""

import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run
from typing import Any
from urllib.error import URLError

import soundfile

from avex_serve.cli import main as run_command
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_recording
from tests.browsing import launched, wait_until

TARGET = Path(__file__).parents[1] / "docs" / "pictures"
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}
START_SECONDS = 60


def main() -> None:
    """Write all pictures."""
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url, launched() as browser:
        recording = Path(folder) / "SITE_20240501_053000.wav"
        soundfile.write(recording, make_recording(0)[0], 16000)
        plot = ["plot", str(recording), "--bundle", str(DEMO_BUNDLE), "--end", "10"]
        run_command([*plot, "--output", str(TARGET / "detections.png")])
        for name, options in VIEWS.items():
            context = browser.new_context(**options)
            photograph(context.new_page(), url, recording, TARGET / f"page-{name}.jpg")
            context.close()
        with reviewed(Path(folder), recording) as url:
            context = browser.new_context(viewport={"width": 1280, "height": 960})
            photograph_review(context.new_page(), url, TARGET / "review.jpg")
            context.close()


def photograph_review(page: Any, url: str, target: Path) -> None:
    """The page of a review after some decisions, to a file."""
    page.goto(f"{url}&annotator=Ada&strategy=random")
    shown = ""
    for key in "ynnynunyynnnyynny ":
        page.wait_for_function(
            """before => {
                const shown = document.querySelector("[data-window]")?.dataset.window ?? "";
                const busy = document.querySelector(".spectrogram")?.getAttribute("aria-busy");
                return shown !== "" && shown !== before && busy === "false";
            }""",
            arg=shown,
        )
        shown = page.get_attribute("[data-window]", "data-window")
        page.keyboard.press(key)
    page.wait_for_timeout(3000)
    page.screenshot(path=target, quality=80)


@contextmanager
def reviewed(folder: Path, recording: Path) -> Iterator[str]:
    """A review of the demo bundle's results on a recording, and its address."""
    command = [sys.executable, "-m", "avex_serve"]
    options = ["--out", str(folder / "run"), "--hop", "0.5", "--embeddings"]
    run([*command, "run", str(DEMO_BUNDLE), str(recording), *options], check=True, stdout=DEVNULL, stderr=DEVNULL)
    process = Popen(
        [*command, "review", str(folder / "run"), "--model", "avex_demo", "--port", "0"], stdout=PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def photograph(page: Any, url: str, recording: Path, target: Path) -> None:
    """The page with a recording, to a file."""
    page.goto(url)
    wait_until(page, "document.querySelector('select').options.length > 0")
    page.get_by_label("Choose recordings").set_input_files(recording)
    wait_until(page, "/scores/.test(document.querySelector('.recordings .status')?.textContent ?? '')")
    wait_until(page, "document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'")
    page.wait_for_timeout(300)
    page.screenshot(path=target, full_page=True, quality=80)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A service of the demo bundle on a free port, and its address."""
    with socket.socket() as http, socket.socket() as grpc:
        http.bind(("127.0.0.1", 0))
        grpc.bind(("127.0.0.1", 0))
        port, other = http.getsockname()[1], grpc.getsockname()[1]
    bentoml = str(Path(sys.executable).with_name("bentoml"))
    command = [bentoml, "serve", "avex_serve.service:AvexService", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"AVEX_BUNDLE": str(DEMO_BUNDLE), "AVEX_GRPC_HOST": "127.0.0.1", "AVEX_GRPC_PORT": str(other)}
    process = Popen(
        ["env", *(f"{name}={value}" for name, value in settings.items()), *command], stderr=DEVNULL, cwd=folder
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/readyz", process)
        yield url
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def wait_until_ready(url: str, process: "Popen[bytes]") -> None:
    """Wait until the service answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
        except URLError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the service did not start")


if __name__ == "__main__":
    main()
