"""Take pictures of the pages and reports for docs/: use those of the demo bundle in chromium, and photograph them.

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

import numpy as np
import soundfile

from avex_serve.cli import main as run_command
from avex_serve.service.settings import DEMO_BUNDLE
from avex_serve.synthetic import make_clip, make_recording
from tests.browsing import launched, wait_until

TARGET = Path(__file__).parents[1] / "docs" / "pictures"
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}
START_SECONDS = 60
# Hours of the day at which a sound of the demo is made.
CHORUS = {"hoot": (20, 22, 0, 2, 4), "trill": (4, 6, 8), "whistle": (6, 8, 10, 12, 14, 16, 18), "buzz": (10, 12, 14)}


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
        for name, (make, first) in {
            "report": (report_of_a_run, "Detections by label"),
            "evaluation": (report_of_a_training, "Figures by label"),
        }.items():
            context = browser.new_context(viewport={"width": 1240, "height": 1200}, color_scheme="light")
            page = context.new_page()
            page.goto(make(Path(folder) / name).as_uri())
            top = page.get_by_role("heading", name=first).bounding_box()["y"] - 20
            part = {"x": 0, "y": top, "width": 1240, "height": 1200}
            page.screenshot(path=TARGET / f"{name}.jpg", quality=80, full_page=True, clip=part)
            context.close()


def report_of_a_run(folder: Path) -> Path:
    """The page of a run over three days of recordings, in which each sound has its hours."""
    (folder / "season").mkdir(parents=True)
    random = np.random.default_rng(0)
    for day in (1, 2, 3):
        for hour in range(0, 24, 2):
            sounds = [name for name, hours in CHORUS.items() if hour in hours]
            windows = [
                make_clip(random, [each for each in sounds if random.random() < 0.3], snr_db=10) for _ in range(10)
            ]
            name = f"SITE_202405{day:02}_{hour:02}0000.wav"
            soundfile.write(folder / "season" / name, np.concatenate(windows), 16000)
    labels = [part for label in CHORUS for part in ("--label", label)]
    _command(folder, "run", str(DEMO_BUNDLE), "season", "--out", "results")
    _command(folder, "report", "results", "--examples", "2", *labels)
    return folder / "results" / "report.html"


def report_of_a_training(folder: Path) -> Path:
    """The page of a probe that is trained on faint sounds, so that it makes mistakes."""
    random = np.random.default_rng(0)
    for name in ("buzz", "trill", "up_sweep", "whistle", "noise"):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(50):
            sounds = [name] if name != "noise" else [[], ["wind"], ["rain"]][number % 3]
            clip = make_clip(random, sounds, snr_db=random.uniform(-20, -2))
            soundfile.write(folder / "clips" / name / f"{number}.wav", clip, 16000)
    _command(folder, "fit", "clips", "--output", "my_probe", "--cache", "cache")
    return folder / "my_probe" / "report.html"


def _command(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "avex_serve", *arguments]
    run(command, check=True, cwd=folder, stdout=DEVNULL, stderr=DEVNULL)


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
    options = ["--out", str(folder / "run"), "--hop", "0.5", "--embeddings"]
    _command(folder, "run", str(DEMO_BUNDLE), str(recording), *options)
    command = [sys.executable, "-m", "avex_serve"]
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
