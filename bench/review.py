"""How fast reviewing is, limited by the program alone.

    python bench/review.py [--browser /usr/bin/chromium]

Prints the time of a queue over 1,000,000 windows by strategy, the time and memory to open a recording of 4 GB, the
labels a minute of a reviewer who answers at once: over HTTP, and with a browser by key presses in the page, and the
time to the first view of this page and of the service's.
"""

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import soundfile

from avex_serve.demo.run import running_server
from avex_serve.page.waves import HEADER_BYTES, WaveFile, encode_header
from avex_serve.review.pool import Pool, Queue, Sound
from avex_serve.review.strategies import STRATEGIES
from avex_serve.service.settings import DEMO_BUNDLE

WINDOWS, RECORDINGS = 1_000_000, 5000
CLIPS = 100
VIEWS = 5


def time_queues() -> None:
    rng = np.random.default_rng(0)
    begin = datetime(2026, 4, 1)
    sounds = [Sound(f"/{i}.wav", begin + timedelta(minutes=17 * i), 1000.0, str(i % 9)) for i in range(RECORDINGS)]
    recording = np.repeat(np.arange(RECORDINGS, dtype=np.int32), WINDOWS // RECORDINGS)
    starts = np.tile(np.arange(WINDOWS // RECORDINGS) * 5.0, RECORDINGS)
    scores = rng.random(WINDOWS).astype(np.float32)
    pool = Pool(sounds, ["wren"], recording, np.stack([starts, starts + 5], axis=1), [(None, scores)])
    narrow = {"lowest": 0.1, "hours": (3, 20), "sites": [str(i) for i in range(1, 7)]}
    print(f"queue over {WINDOWS} windows, ms of one core: filtered, all of them")
    for strategy in STRATEGIES:
        taken = []
        for filters in (narrow, {"per_recording": 5}):
            begun = time.process_time()  # one thread; other processes don't count
            pool.select(0, Queue(strategy=strategy, similarity=scores, **filters))
            taken.append(1000 * (time.process_time() - begun))
        print(f"  {strategy:14}" + "".join(f"{each:8.0f}" for each in taken))


def open_large(folder: Path) -> None:
    """A 4 GB WAV, sparse on disk."""
    path = folder / "large.wav"
    frames = 2**31 - 2**20
    with path.open("wb") as file:
        file.write(encode_header(96000, frames))
        file.truncate(HEADER_BYTES + 2 * frames)
    begun = time.perf_counter()
    wave = WaveFile(path)
    middle = wave.size // 2 // 2 * 2
    wave.read(middle, middle + 2 * 96000 * 10 - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"recording of {wave.size / 1e9:.1f} GB: 10 s of its middle after {time.perf_counter() - begun:.3f} s")
    print(f"  peak memory of this process so far: {peak:.0f} MB")


def make_table(folder: Path) -> Path:
    """Recordings, and a table of CLIPS windows in them."""
    rng = np.random.default_rng(0)
    rows = ["file,start,end,label,score"]
    for i in range(10):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.uniform(-0.1, 0.1, 120 * 48000), 48000)
        rows += [f"{path},{j * 5},{j * 5 + 5},wren,{rng.random():.3f}" for j in range(CLIPS // 10)]
    table = folder / "found.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


@contextlib.contextmanager
def serving(table: Path):
    """The address of a review, with its token."""
    command = [sys.executable, "-m", "avex_serve", "review", "--table", str(table), "--port", "0"]
    command += ["--reviews", str(table.parent / f"reviews-{time.monotonic_ns()}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait()


def review_over_http(address: str) -> None:
    base = address.partition("?")[0]
    with httpx.Client(base_url=base, follow_redirects=True) as client:
        client.get(address)
        begun = time.perf_counter()
        body = {"annotator": "bench", "label": "wren", "count": CLIPS}
        items = client.post("api/queue", json=body).raise_for_status().json()["items"]
        for item in items:
            first = HEADER_BYTES + 2 * 48000 * int(item["start"])
            span = {"Range": f"bytes={first}-{first + 2 * 48000 * 7}"}
            client.get(f"api/recordings/{item['recording']}.wav", headers=span).raise_for_status()
            answers = [{"label": "wren", "decision": "present"}]
            body = {"annotator": "bench", "window": item["window"], "answers": answers}
            client.post("api/decide", json=body).raise_for_status()
        print(f"over HTTP: {60 * len(items) / (time.perf_counter() - begun):.0f} labels a minute")


def review_in_browser(address: str, browser: str) -> None:
    from playwright.sync_api import sync_playwright

    drawn = "() => document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(f"{address}&annotator=bench")
        page.wait_for_selector("[data-window]:not([data-window=''])")
        page.wait_for_function(drawn)
        taken = []
        begun = time.perf_counter()
        for _ in range(CLIPS - 1):
            shown = page.get_attribute("[data-window]", "data-window")
            pressed = time.perf_counter()
            page.keyboard.press("y")
            page.wait_for_function(f"() => document.querySelector('[data-window]').dataset.window !== '{shown}'")
            page.wait_for_function(drawn)
            taken.append(time.perf_counter() - pressed)
        rate = 60 * len(taken) / (time.perf_counter() - begun)
        print(f"in the browser: next clip drawn after {1000 * statistics.median(taken):.0f} ms (median), ", end="")
        print(f"{1000 * max(taken):.0f} ms (most); {rate:.0f} labels a minute")
        chromium.close()


def first_views(address: str, browser: str) -> None:
    """Time from opening an address to a page that can be used, in a browser that has nothing of it in its cache."""
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(DEMO_BUNDLE, Path(folder)) as server,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        views = {
            "review, with its first spectrogram": (f"{address}&annotator=bench", ".spectrogram[aria-busy=false]"),
            "service, with what is served": (f"http://127.0.0.1:{server.http_port}/", "select option"),
        }
        for name, (url, ready) in views.items():
            taken = []
            for _ in range(VIEWS):
                context = chromium.new_context()
                page = context.new_page()
                begun = time.perf_counter()
                page.goto(url)
                page.wait_for_selector(ready, state="attached")
                taken.append(time.perf_counter() - begun)
                context.close()
            print(f"first view of the page of the {name}: {1000 * statistics.median(taken):.0f} ms (median)")
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="/usr/bin/chromium", help="without it, the browser is left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        open_large(Path(name))
        time_queues()
        table = make_table(Path(name))
        with serving(table) as address:
            review_over_http(address)
        if os.path.exists(arguments.browser):  # noqa: PTH110
            with serving(table) as address:
                review_in_browser(address, arguments.browser)
                first_views(address, arguments.browser)


if __name__ == "__main__":
    main()
