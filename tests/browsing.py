"""Pages in chromium: one browser for all tests of a module; a console error fails the test."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

WAIT_SECONDS = 20
AXE = Path(__file__).with_name("vendor") / "axe.min.js"


@contextmanager
def launched():
    """Chromium, of the system or of playwright; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        found = shutil.which("chromium") or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("chromium is not installed: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser, *, expected=(), **options):
    """A page in a profile of its own. When the block ends, its console must hold no error but the expected ones.

    Args:
        browser: see `launched`.
        expected: parts of the messages that may be there.
        options: of the profile, such as ``viewport`` and ``color_scheme``.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * WAIT_SECONDS)
    page = context.new_page()
    faults = []

    def note(text):
        if not any(part in text for part in expected):
            faults.append(text)

    page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: note(str(error)))
    try:
        yield page
    finally:
        context.close()
    assert not faults, faults


def wait_until(page, expression):
    """Wait until an expression is true; playwright's own function needs eval, which the pages' policy forbids."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def check_accessible(page):
    """Assert that axe finds nothing on the page as it is."""
    page.evaluate(AXE.read_text("utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    faults = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
    assert not faults, faults


def check_width(page):
    """Assert that the page is no wider than its window."""
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]


def check_preloaded(page):
    """Assert that the document names every module that its script loads before it runs, and no other."""
    requests = dict(
        page.evaluate(
            """() => {
                const [{domContentLoadedEventStart: end}] = performance.getEntriesByType("navigation");
                return performance.getEntriesByType("resource")
                    .filter(each => each.name.endsWith(".js") && each.startTime < end)
                    .map(each => [each.name, each.initiatorType]);
            }"""
        )
    )
    scripts = [name for name, kind in requests.items() if kind == "script"]
    assert len(scripts) == 1, f"loaded after its importer: {scripts}"
    named = page.evaluate("[...document.querySelectorAll('link[rel=modulepreload]')].map(each => each.href)")
    assert sorted([*scripts, *named]) == sorted(requests)
    assert len(named) > 10
